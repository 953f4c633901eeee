"""Batches of a queue: what is there, at most so many, nothing for a while, the end."""

from __future__ import annotations

import queue

from agent.line.batch import next_batch


def filled(*items):
    waiting = queue.SimpleQueue()
    for item in items:
        waiting.put(item)
    return waiting


def test_what_waits_comes_at_once_up_to_the_most():
    waiting = filled(1, 2, 3, 4, 5)
    assert [next_batch(waiting, 0.01, 3), next_batch(waiting, 0.01, 3), next_batch(waiting, 0.01, 3)] == [
        [1, 2, 3],
        [4, 5],
        [],
    ]


def test_the_end_comes_after_what_came_before_it_and_once():
    waiting = filled(1, None)
    assert next_batch(waiting, 0.01, 3) == [1]
    assert next_batch(waiting, 0.01, 3) is None
    assert waiting.empty()
