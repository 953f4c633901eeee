"""What gives a line its parts: the beat keeps step and forgets no part; a source and a camera speak for themselves."""

from __future__ import annotations

from dataclasses import replace

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


def taken(pace: OnTheBeat, moments: list[int]) -> list[Announced]:
    """Return what came at these moments, each asked until nothing more did."""
    found = []
    for moment in moments:
        while (announced := pace.take(moment)) is not None:
            found.append(announced)
    return found


def test_the_first_part_comes_at_once_and_each_has_come_when_it_was_due_however_late_it_is_asked_for():
    pace = OnTheBeat(100)
    found = taken(pace, [7, 50, 106, 107, 150, 212, 305, 307])
    assert found == [Announced(7), Announced(107), Announced(207), Announced(307)]
    assert pace.next_ns == 407


def test_a_part_that_is_more_than_half_a_takt_late_can_be_pictured_no_more():
    pace = OnTheBeat(100)
    assert [pace.until_ns(announced) for announced in taken(pace, [7, 167])] == [57, 157]


def test_parts_that_a_sleep_of_takts_let_go_by_are_lost_each_at_its_moment_and_the_beat_keeps_step():
    pace = OnTheBeat(100)
    gone = [Announced(due, lost=1, opens=False) for due in (107, 207)]
    assert taken(pace, [7, 357, 406, 407]) == [Announced(7), *gone, Announced(307), Announced(407)]


def test_of_very_many_parts_that_went_by_the_last_are_told_and_the_log_has_their_number(caplog):
    pace = OnTheBeat(100)
    now_ns = 7 + 5000 * 100 + 30
    first, *gone, last = taken(pace, [7, now_ns])
    assert (first, last) == (Announced(7), Announced(now_ns - 30))
    lost = [Announced(last.at_ns - number * 100, lost=1, opens=False) for number in range(1000, 0, -1)]
    assert gone == [replace(lost[0], unseen=3999), *lost[1:]]
    assert pace.next_ns == now_ns + 70
    assert [record.message for record in caplog.records] == [
        "4999 parts of the beat went by unseen: the last 1000 get their verdicts"
    ]


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
