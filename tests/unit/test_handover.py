"""From the line into the ring: every verdict, and as many pictures as there is room for."""

from __future__ import annotations

import gc
import json
import os
from dataclasses import replace

import numpy as np
import pytest

from agent.between import handover
from agent.between.handover import HEATMAPS_UP_TO, PICTURES_UP_TO, Handover, Wanted
from agent.between.record import Charge, decoded
from agent.between.ring import BOARD_BYTES, Ring
from agent.line.beat import Settled
from agent.publishing.messages import Origin
from agent.verdict import Outcome, Reason, Verdict
from calibration.frame import Frame

SLOTS = 20
FRAME_BYTES = 1024
ORIGIN = Origin("cell7", "0123456789ab", "flange", "d" * 64, "onnx", simulated=True, on_no_verdict="reject")
PIXELS = np.zeros((32, 32), np.uint8)
PICTURE = np.zeros((8, 8), np.float32)


class Inspector:
    """Has a name."""

    def __init__(self, recipe):
        self.recipe = recipe


FIRST = Inspector("first")


def settled(trigger_id, outcome=Outcome.REJECT, *, frame=True, inspector=FIRST):
    scored = {} if outcome is Outcome.NO_VERDICT else {"score": 0.5, "threshold": 0.1}
    reason = Reason.SCORE if scored else Reason.LATE
    pictures = {"anomaly_map": PICTURE, "picture": PICTURE} if scored else {}
    verdict = Verdict(trigger_id, outcome, reason, **scored, **pictures)
    return Settled(verdict, Frame(PIXELS, 1, trigger_id, 0, 0) if frame else None, inspector)


class Bench:
    """A handover and the other end of its ring."""

    def __init__(self, *, heatmaps=True, pictures="all", picture_bytes=20 * 2048, slots=SLOTS):
        self.ring = Ring.make(slots=slots, slot_bytes=2048, picture_bytes=picture_bytes)
        self.wake = os.eventfd(0, os.EFD_NONBLOCK)
        self.full = []
        self.handover = Handover(self.ring, self.wake, Wanted(heatmaps, pictures), self.charge, self.full.append)

    def charge(self, inspector):
        return Charge(replace(ORIGIN, recipe=inspector.recipe), 0.25)

    def deliver(self, *parts):
        """Hand parts over, as the line does."""
        for part in parts:
            self.handover.opened(part.verdict.trigger_id)
        self.handover.deliver(parts)

    def take(self, most=10**6):
        """Return parts as the publish process reads them."""
        records = self.ring.read(most)
        parts = [decoded(record.data, [bytes(picture) for picture in record.pictures]) for record in records]
        self.ring.release(len(records))
        return parts

    def close(self):
        self.ring.close()
        os.close(self.wake)


@pytest.fixture
def bench():
    """Returns a function that makes one."""
    made = []

    def make(**options):
        made.append(Bench(**options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def triggers(parts):
    return [part.verdict.trigger_id for part in parts]


def test_parts_come_in_their_order_with_their_pictures_and_who_judged(bench):
    one = bench()
    one.deliver(settled(1), settled(2, Outcome.PASS, inspector=Inspector("second")), settled(3, Outcome.NO_VERDICT))
    parts = one.take()
    assert triggers(parts) == [1, 2, 3]
    assert [part.charge.origin.recipe for part in parts] == ["first", "second", "first"]
    assert [part.verdict.anomaly_map is not None for part in parts] == [True, True, False]
    assert [part.frame is not None for part in parts] == [True, True, True]
    assert not any(one.handover.counters().values())


def test_the_publish_process_is_woken_once_for_each_batch(bench):
    one = bench()
    one.deliver(settled(1), settled(2))
    assert os.eventfd_read(one.wake) == 1


@pytest.mark.parametrize(
    ("heatmaps", "pictures", "outcome", "wanted"),
    [
        (False, "none", Outcome.REJECT, (False, False, False)),
        (True, "none", Outcome.REJECT, (True, False, False)),
        (False, "rejects", Outcome.REJECT, (True, True, True)),
        (False, "rejects", Outcome.PASS, (False, False, False)),
        (True, "rejects", Outcome.PASS, (True, False, False)),
        (False, "all", Outcome.PASS, (True, True, True)),
        (False, "rejects", Outcome.NO_VERDICT, (False, False, True)),
        (True, "none", Outcome.NO_VERDICT, (False, False, False)),
    ],
)
def test_what_nobody_wants_does_not_cross(bench, heatmaps, pictures, outcome, wanted):
    one = bench(heatmaps=heatmaps, pictures=pictures)
    one.deliver(settled(1, outcome))
    (part,) = one.take()
    found = (part.verdict.anomaly_map is not None, part.verdict.picture is not None, part.frame is not None)
    assert found == wanted
    assert not any(one.handover.counters().values())


def test_under_pressure_heatmaps_go_first_then_frames_and_never_a_verdict(bench):
    one = bench()
    one.deliver(*(settled(number) for number in range(1, SLOTS + 1)))
    counters = one.handover.counters()
    parts = one.take()
    assert triggers(parts) == list(range(1, SLOTS + 1))
    has_map = [part.verdict.anomaly_map is not None for part in parts]
    has_frame = [part.frame is not None for part in parts]
    assert has_map == sorted(has_map, reverse=True)
    assert has_frame == sorted(has_frame, reverse=True)
    assert 0 < sum(has_map) < sum(has_frame) <= SLOTS
    assert counters["shed_heatmaps"] == has_map.count(False)
    assert counters["shed_images"] == has_frame.count(False)
    of_one = FRAME_BYTES + 256 + 64
    first_without_map = has_map.index(False)
    assert first_without_map * of_one > HEATMAPS_UP_TO * 20 * 2048 > (first_without_map - 1) * of_one
    assert PICTURES_UP_TO > HEATMAPS_UP_TO
    one.deliver(settled(99))
    assert one.take()[0].verdict.anomaly_map is not None, "with room again, all is there again"


def test_frames_larger_than_the_room_are_shed_and_counted(bench):
    one = bench(picture_bytes=512)
    one.deliver(settled(1), settled(2, frame=False))
    parts = one.take()
    assert triggers(parts) == [1, 2]
    assert [part.frame for part in parts] == [None, None]
    assert parts[1].verdict.anomaly_map is not None
    assert one.handover.counters() == {"shed_heatmaps": 1, "shed_images": 1, "given_up": 0}


def test_a_part_without_a_frame_is_no_shed_picture(bench):
    one = bench()
    share = one.ring.write(b"", [memoryview(bytes(19 * 2048))])
    one.deliver(settled(1, Outcome.NO_VERDICT, frame=False))
    assert share
    assert one.handover.counters()["shed_images"] == 0


def test_what_finds_no_slot_waits_is_told_and_comes_later_in_order(bench):
    one = bench()
    one.deliver(*(settled(number) for number in range(1, SLOTS + 6)))
    assert one.handover.unwritten == 5
    assert len(one.full) == 5
    assert one.full[0].startswith(f"{SLOTS} verdicts wait in memory, the publish process does not store them")
    assert triggers(one.take(3)) == [1, 2, 3]
    one.deliver(settled(SLOTS + 6))  # none may overtake
    one.handover.came_round({})
    assert triggers(one.take()) == list(range(4, SLOTS + 4))
    assert (one.ring.pending, one.handover.unwritten) == (0, 3)
    one.handover.came_round({})
    assert triggers(one.take()) == [SLOTS + 4, SLOTS + 5, SLOTS + 6]
    one.deliver(settled(SLOTS + 7))
    assert triggers(one.take()) == [SLOTS + 7]
    assert one.handover.given_up == 0


def test_going_round_wakes_the_publish_process_for_what_waited(bench):
    one = bench()
    one.deliver(*(settled(number) for number in range(1, SLOTS + 2)))
    os.eventfd_read(one.wake)
    one.take()
    one.handover.came_round({})
    assert os.eventfd_read(one.wake) == 1
    one.handover.came_round({})
    with pytest.raises(BlockingIOError):
        os.eventfd_read(one.wake)


def test_beyond_the_last_place_the_newest_are_given_up_counted_and_told(bench, monkeypatch):
    monkeypatch.setattr(handover, "MOST_WAITING", 3)
    one = bench()
    one.deliver(*(settled(number) for number in range(1, SLOTS + 8)))
    assert (one.handover.given_up, one.handover.unwritten, len(one.full)) == (4, 3, 7)
    assert one.ring.open_triggers() == [SLOTS + 1, SLOTS + 2, SLOTS + 3]
    one.take()
    one.handover.came_round({})
    assert triggers(one.take()) == [SLOTS + 1, SLOTS + 2, SLOTS + 3]
    assert one.handover.counters()["given_up"] == 4


def test_a_trigger_is_open_until_its_record_is_in_the_ring(bench):
    one = bench(slots=2)
    for trigger_id in range(1, 6):
        one.handover.opened(trigger_id)
    one.handover.withdrawn(5)
    assert one.ring.open_triggers() == [1, 2, 3, 4]
    one.handover.deliver([settled(2), settled(1), settled(3)])
    assert one.ring.open_triggers() == [3, 4]
    one.take()
    one.handover.came_round({})
    assert one.ring.open_triggers() == [4]


@pytest.mark.parametrize("waits", [False, True])
def test_a_process_killed_right_after_a_record_left_no_open_trigger_that_has_one(bench, monkeypatch, waits):
    one = bench(slots=1)
    if waits:
        one.deliver(settled(7), settled(1))
        one.take()
    one.handover.opened(2)

    def killed(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(one.ring, "note_closed", killed)
    with pytest.raises(KeyboardInterrupt):
        if waits:
            one.handover.came_round({})
        else:
            one.deliver(settled(1))
    assert one.ring.open_triggers() == [2]
    assert triggers(one.take()) == [1]


def test_frames_that_somebody_asked_for_come_whatever_the_archive_keeps(bench):
    one = bench(heatmaps=False, pictures="none")
    one.handover.send_frames(2)
    one.deliver(
        settled(1, Outcome.PASS), settled(2, Outcome.NO_VERDICT, frame=False), settled(3), settled(4, Outcome.PASS)
    )
    parts = one.take()
    assert [(part.is_captured, part.frame is not None) for part in parts] == [
        (True, True), (False, False), (True, True), (False, False),
    ]  # fmt: skip


def test_a_frame_that_was_asked_for_and_found_no_room_is_replaced_by_a_later_one(bench):
    one = bench(slots=1)
    one.handover.send_frames(1)
    one.deliver(settled(9, frame=False), settled(1))
    one.take()
    one.handover.came_round({})
    (part,) = one.take()
    assert (part.is_captured, part.frame) == (False, None)
    one.deliver(
        settled(2),
    )
    (part,) = one.take()
    assert part.is_captured
    assert part.frame is not None


def test_the_word_about_the_inspect_process_is_on_the_board(bench):
    one = bench()
    one.handover.came_round({"state": "running"})
    assert json.loads(one.ring.board()) == {"state": "running"}


def test_a_word_that_is_too_long_goes_without_its_alarms_and_harms_no_record(bench):
    one = bench()
    one.deliver(settled(1))
    one.handover.came_round({"ended": True, "alarms": [{"code": "x", "detail": "y" * BOARD_BYTES}]})
    assert json.loads(one.ring.board()) == {"ended": True, "alarms": []}
    one.handover.came_round({"state": "z" * BOARD_BYTES})
    assert json.loads(one.ring.board()) == {"ended": True, "alarms": []}
    assert triggers(one.take()) == [1]


def test_the_heap_is_still_between_parts_and_tidied_after_them(bench):
    one = bench()
    try:
        one.handover.freeze()
        assert not gc.isenabled()
        one.handover.rested()
    finally:
        gc.enable()
        gc.unfreeze()


def test_a_part_that_cannot_be_told_is_counted_and_costs_the_others_nothing(bench):
    one = bench()
    one.deliver(settled(1), settled(2, inspector=Inspector("x" * 4000)), settled(3))
    assert triggers(one.take()) == [1, 3]
    assert one.handover.given_up == 1
    assert one.ring.open_triggers() == []
