"""What gives a line its parts: the beat keeps step and never bursts; a source and a camera speak for themselves."""

from __future__ import annotations

import pytest

from agent.cameras.trigger import Announced, Announcements
from agent.errors import CameraError
from agent.line.beat import Beat
from agent.line.pace import OnTheBeat, Pace, Signalled, pace_of, running


class Source:
    def __init__(self, fault: str = "") -> None:
        self.announcements = Announcements()
        self.fault = fault
        self.calls: list[str] = []

    def start(self, on_event):
        self.calls.append("start")
        if self.fault:
            raise CameraError(self.fault)
        self.announcements.on_event = on_event

    def stop(self):
        self.calls.append("stop")


def triggers(pace: OnTheBeat, moments: list[int]) -> list[int]:
    """Return the moments at which it was time for a part."""
    return [moment for moment in moments if pace.take(moment) is not None]


def test_the_first_part_comes_at_once_and_the_next_ones_in_step_even_where_one_is_asked_for_late():
    pace = OnTheBeat(100)
    assert triggers(pace, [7, 50, 106, 107, 150, 212, 305, 307]) == [7, 107, 212, 307]
    assert pace.next_ns == 407


def test_after_a_sleep_the_beat_goes_on_from_there_without_a_burst():
    pace = OnTheBeat(100)
    assert triggers(pace, [7, 1000, 1001, 1099, 1100]) == [7, 1000, 1100]


def test_a_part_of_the_beat_is_opened_when_it_was_asked_for():
    assert OnTheBeat(100).take(42) == Announced(42)


def test_a_camera_that_triggers_itself_is_never_triggered():
    pace = pace_of(Beat(takt_ms=1.0, deadline_ms=1.0, by_camera=True))
    assert type(pace) is Pace
    assert (pace.take(10**12), pace.next_ns) == (None, None)


def test_a_source_takes_the_place_of_the_beat_and_wakes_the_clock():
    source, woken = Source(), []
    pace = pace_of(Beat(takt_ms=1.0, deadline_ms=1.0, source=source))
    assert isinstance(pace, Signalled)
    with running(pace, lambda: woken.append(True)):
        source.announcements.put(Announced(5, lost=2))
        assert (pace.take(10**12), pace.take(10**12), pace.next_ns) == (Announced(5, lost=2), None, None)
    assert woken == [True]
    assert source.calls == ["start", "stop"]


def test_a_source_that_cannot_be_had_keeps_the_line_from_starting_and_one_that_was_had_is_left():
    broken = Source("the PLC is away")
    with pytest.raises(CameraError, match="the PLC is away"), running(Signalled(broken), lambda: None):
        pytest.fail("it runs")
    assert broken.calls == ["start"]
    source = Source()
    with pytest.raises(RuntimeError, match="the camera"), running(Signalled(source), lambda: None):
        raise RuntimeError("the camera")
    assert source.calls == ["start", "stop"]
