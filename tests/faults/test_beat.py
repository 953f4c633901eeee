"""Parts on the beat whose clock is put aside: none is pictured when the next one may stand there, none is forgotten."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from agent.line.beat import Beat, Observer, Settled
from agent.line.loop import Line
from agent.line.tally import Tally
from agent.outputs.output import NoOutput
from agent.verdict import Outcome, Reason, Verdict
from calibration.frame import Frame

TAKT_S = 60  # of a clock that leaps: nobody waits for it, and no load comes near half of it
BEAT = Beat(TAKT_S * 1e3, TAKT_S * 0.9e3)
SEEN, LOST = (Outcome.PASS, Reason.SCORE), (Outcome.NO_VERDICT, Reason.FRAME_LOST)
LATE = "the agent came to this part too late for a picture"


class Ahead:
    """Stands in for the module `time`: it is later than it was, by what a test says."""

    def __init__(self) -> None:
        self.by_s = 0.0

    def monotonic_ns(self) -> int:
        return time.monotonic_ns() + round(self.by_s * 1e9)


class Conveyor(NoOutput):
    """A camera, an inspector that passes all, and a gate; notes which parts were pictured and when each was opened."""

    def __init__(self) -> None:
        self.pictured: list[int] = []
        self.opened_ns: dict[int, int] = {}
        self._frames: list[Frame] = []

    def start(self) -> None:
        pass

    def trigger(self, trigger_id: int, until_ns: int | None = None) -> None:
        self.pictured.append(trigger_id)
        self._frames.append(Frame(np.zeros((8, 8), np.uint8), trigger_id, trigger_id, 0, 0))

    def next_frame(self, timeout_s: float) -> Frame | None:
        if not self._frames:
            time.sleep(0.001)
        return self._frames.pop(0) if self._frames else None

    def inspect(self, frame: Frame, deadline_ns: int | None = None) -> Verdict:
        return Verdict(frame.trigger_id, *SEEN, score=0.0, threshold=1.0)

    def act(self, trigger_id: int, action: str, opened_ns: int) -> None:
        self.opened_ns[trigger_id] = opened_ns

    def stop(self) -> None:
        pass


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> Ahead:
    """The line's clock."""
    clock = Ahead()
    monkeypatch.setattr("agent.line.loop.time", clock)
    return clock


def run(
    parts: int, observer: Observer | None = None, after: Callable[[int], None] = lambda trigger_id: None
) -> tuple[Conveyor, list[Verdict]]:
    """Return what became of so many parts. after: is called with each when it has its verdict."""
    return counted(parts, observer, after)[:2]


def counted(
    parts: int, observer: Observer | None = None, after: Callable[[int], None] = lambda trigger_id: None
) -> tuple[Conveyor, list[Verdict], Tally]:
    """Return what `run` returns, and what the line counted."""
    conveyor, verdicts = Conveyor(), []

    def deliver(batch: Sequence[Settled]) -> None:
        for settled in batch:
            verdicts.append(settled.verdict)
            after(settled.verdict.trigger_id)

    tally = Line(conveyor, conveyor, BEAT, deliver, output=conveyor, observer=observer).run(parts)
    return conveyor, verdicts, tally


@pytest.mark.parametrize(("held_up_s", "is_pictured"), [(10, True), (31, False)])
def test_a_part_that_the_clock_came_to_after_half_a_takt_is_not_pictured(
    ahead: Ahead, held_up_s: int, is_pictured: bool
) -> None:
    class Stall(Observer):
        def opened(self, trigger_id: int) -> None:
            ahead.by_s += held_up_s

    conveyor, verdicts = run(1, Stall())
    assert [(verdict.outcome, verdict.reason) for verdict in verdicts] == [SEEN if is_pictured else LOST]
    assert conveyor.pictured == ([1] if is_pictured else [])


@pytest.mark.parametrize(
    ("late_takts", "lost"),
    [(0.2, []), (0.9, [3]), (1.2, [3]), (1.9, [3, 4]), (3.2, [3, 4, 5])],
    ids=str,
)
def test_a_clock_that_was_put_aside_loses_the_parts_that_went_by_and_keeps_step(
    ahead: Ahead, late_takts: float, lost: list[int]
) -> None:
    def leap(trigger_id: int) -> None:
        """Go on to the next part; after the second one, that much farther."""
        takts = trigger_id + late_takts if trigger_id == 2 else trigger_id
        ahead.by_s = max(ahead.by_s, takts * TAKT_S)

    conveyor, verdicts = run(8, after=leap)
    assert [verdict.trigger_id for verdict in verdicts] == list(range(1, 9))
    wanted = {number: LOST if number in lost else SEEN for number in range(1, 9)}
    assert {verdict.trigger_id: (verdict.outcome, verdict.reason) for verdict in verdicts} == wanted
    assert conveyor.pictured == [number for number, said in wanted.items() if said is SEEN]
    assert all(LATE in verdict.detail for verdict in verdicts if verdict.trigger_id in lost)
    moments_ns = [conveyor.opened_ns[number] - conveyor.opened_ns[1] for number in range(1, 9)]
    assert moments_ns == [number * TAKT_S * 10**9 for number in range(8)]  # deadline and gate count from the part


@pytest.mark.parametrize(("gone_by", "unseen"), [(1000, 0), (1003, 3)])
def test_parts_beyond_the_last_thousand_that_went_by_are_counted(ahead: Ahead, gone_by: int, unseen: int) -> None:
    def leap(trigger_id: int) -> None:
        if trigger_id == 1:
            ahead.by_s = (1 + gone_by) * TAKT_S

    _, verdicts, tally = counted(1002, after=leap)
    assert (tally.parts_unseen, tally.triggers, len(verdicts)) == (unseen, 1002, 1002)
    assert [verdict.reason for verdict in verdicts] == [Reason.SCORE, *[Reason.FRAME_LOST] * 1000, Reason.SCORE]
