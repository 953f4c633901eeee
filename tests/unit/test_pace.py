"""What gives a line its parts: the beat keeps step and never bursts; a source and a camera speak for themselves."""

from __future__ import annotations

import pytest

from agent.cameras.trigger import Announced, Announcements
from agent.errors import CameraError
from agent.line.beat import Beat
from agent.line.pace import OnTheBeat, Pace, Signalled, pace_of, running

MS = 1_000_000


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


@pytest.mark.parametrize(
    ("takt_ms", "deadline_ms", "until_ms"), [(100.0, 90.0, 50), (100.0, 400.0, 50), (100.0, 20.0, 20)]
)
def test_a_part_of_the_beat_is_pictured_within_half_a_takt_and_never_after_its_deadline(takt_ms, deadline_ms, until_ms):
    pace = pace_of(Beat(takt_ms, deadline_ms))
    assert pace.until_ns(pace.take(7)) == 7 + until_ms * MS


@pytest.mark.parametrize(
    ("within_ms", "takt_ms", "deadline_ms", "until_ms"),
    [(50.0, 100.0, 400.0, 50), (50.0, 30.0, 90.0, 30), (500.0, 400.0, 100.0, 100)],
)
def test_an_announced_part_is_pictured_within_its_limit_and_before_the_next_one_can_come(
    within_ms, takt_ms, deadline_ms, until_ms
):
    source = Source()
    source.announcements = Announcements(within_ms=within_ms)
    pace = pace_of(Beat(takt_ms, deadline_ms, source=source))
    assert pace.until_ns(Announced(7)) == 7 + until_ms * MS
    assert pace.until_ns(Announced(45 * MS, since_ns=0)) == min(round(within_ms), 45 + until_ms) * MS


def test_nothing_is_known_of_when_a_part_goes_by_that_the_camera_announces():
    assert pace_of(Beat(100.0, 90.0, by_camera=True)).until_ns(Announced(7)) is None
