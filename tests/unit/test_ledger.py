from __future__ import annotations

import threading

import numpy as np
import pytest

from agent.line.ledger import Ledger
from calibration.frame import Frame

MS = 1_000_000


def frame(trigger_id: int) -> Frame:
    return Frame(np.zeros((4, 4), np.uint8), trigger_id, trigger_id, 0, 0)


def test_a_trigger_is_settled_once() -> None:
    ledger = Ledger(deadline_ms=100)
    ledger.open(1, now_ns=0)
    assert ledger.settle(1) is not None
    assert ledger.settle(1) is None
    assert ledger.overdue(10**12) == []


def test_a_trigger_is_overdue_at_its_deadline_and_not_before() -> None:
    ledger = Ledger(deadline_ms=100)
    ledger.open(1, now_ns=0)
    ledger.open(2, now_ns=50 * MS)
    assert ledger.next_deadline_ns() == 100 * MS
    assert ledger.overdue(100 * MS - 1) == []
    assert [entry.trigger_id for entry in ledger.overdue(100 * MS)] == [1]
    assert ledger.next_deadline_ns() == 150 * MS


def test_a_frame_belongs_to_its_own_trigger_only() -> None:
    ledger = Ledger(deadline_ms=100)
    ledger.open(2, now_ns=0)
    assert not ledger.arrived(frame(1)), "the frame of a settled or unknown trigger"
    assert ledger.arrived(frame(2))
    assert not ledger.arrived(frame(2)), "a second frame for the same trigger"


def test_the_same_trigger_cannot_be_opened_twice() -> None:
    ledger = Ledger(deadline_ms=100)
    ledger.open(1, now_ns=0)
    with pytest.raises(ValueError, match="open already"):
        ledger.open(1, now_ns=5)


def test_of_many_threads_exactly_one_speaks_for_each_trigger() -> None:
    ledger = Ledger(deadline_ms=1)
    count = 500
    for trigger_id in range(count):
        ledger.open(trigger_id, now_ns=0)
    spoken: list[int] = []
    start = threading.Barrier(4)

    def settle_all() -> None:
        start.wait()
        spoken.extend(trigger_id for trigger_id in range(count) if ledger.settle(trigger_id) is not None)

    def sweep() -> None:
        start.wait()
        spoken.extend(entry.trigger_id for entry in ledger.overdue(10**9))

    threads = [threading.Thread(target=work) for work in (settle_all, settle_all, settle_all, sweep)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(spoken) == list(range(count))
    assert len(ledger) == 0
