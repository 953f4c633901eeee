"""What has come since one looked last, several at once where one fell behind."""

from __future__ import annotations

import queue
from typing import TypeVar

Item = TypeVar("Item")


def next_batch(waiting: queue.SimpleQueue[Item | None], wait_s: float, most: int) -> list[Item] | None:
    """Return the next item and those that came meanwhile, at most `most`; none where none comes within wait_s.

    None in the queue is its end: what came before it is returned, then None.
    """
    batch: list[Item] = []
    try:
        item = waiting.get(timeout=wait_s)
    except queue.Empty:
        return batch
    while item is not None:
        batch.append(item)
        if len(batch) == most or waiting.empty():
            return batch
        item = waiting.get()
    if batch:
        waiting.put(None)  # the end comes next
    return batch or None
