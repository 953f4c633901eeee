"""Which part a frame shows: every gap is a part, and in doubt a frame belongs to none."""

from __future__ import annotations

import random

import pytest

from agent.cameras.reckoning import ASTRAY_NS, LEAST_OFFSETS, Arrivals, FrameIds, Pairing

MS = 10**6
TAKT = 50 * MS
CAMERA_CLOCK = 10**15  # began long before ours


@pytest.mark.parametrize(
    ("first", "ids", "steps"),
    [
        (1, [1, 2, 3], [1, 1, 1]),
        (1, [1, 2, 5], [1, 1, 3]),
        (1, [3, 4], [3, 1]),  # two lost before the first that came
        (0, [0, 1], [1, 1]),  # USB3 Vision
        (1, [65401, 65402], [1, 1]),  # a camera that goes on counting over starts
        (1, [65534, 65535, 1, 2], [1, 1, 1, 1]),
        (1, [65534, 2], [1, 3]),  # 65535 and 1 are lost; there is no 0
        (1, [5, 5, 6], [5, 0, 1]),
        (1, [70000, 70001], [1, 1]),
        (1, [40000, 3], [1, 1]),  # began anew
        (1, [10, 200_000], [10, 1]),
    ],
)
def test_gaps_of_frame_ids_are_counted(first, ids, steps):
    count = FrameIds(first)
    assert [count.advance(frame_id) for frame_id in ids] == steps


def test_each_skipped_frame_is_a_part_and_a_frame_that_comes_twice_is_none():
    arrivals = Arrivals()
    arrivals.connected(1, None, None)
    assert [arrivals.number(frame_id, None) for frame_id in (1, 2, 2, 5)] == [1, 2, None, 5]
    assert arrivals.parts == 5
    assert arrivals.duplicate_frames == 1


def test_a_frame_that_came_incomplete_is_counted_once_and_not_again_as_a_gap():
    arrivals = Arrivals()
    arrivals.connected(1, None, None)
    arrivals.number(1, None)
    arrivals.lost()
    assert arrivals.parts == 2
    arrivals.lost()
    assert arrivals.number(4, None) == 4
    assert arrivals.number(6, None) == 6


def test_a_trigger_that_the_camera_was_too_busy_for_is_a_part():
    arrivals = Arrivals()
    arrivals.connected(1, 7, 0)  # setting it up has set its counter to 0
    assert [arrivals.number(*frame) for frame in ((1, 1), (2, 3), (3, 4))] == [1, 3, 4]
    assert arrivals.ignored_triggers == 1


def test_a_trigger_counter_that_wraps_is_no_leap():
    arrivals = Arrivals()
    arrivals.connected(1, None, 2**32 - 1)
    assert [arrivals.number(1, 0), arrivals.number(2, 1)] == [1, 2]


def test_parts_that_went_by_while_the_connection_was_lost_are_counted_if_the_camera_did():
    arrivals = Arrivals()
    arrivals.connected(1, 0, 0)
    arrivals.number(1, 1)
    assert arrivals.connected(1, 5, 5) == 4
    assert arrivals.parts == 5
    assert arrivals.number(1, 6) == 6


def test_without_a_counter_or_with_one_that_began_anew_nobody_claims_to_know():
    arrivals = Arrivals()
    arrivals.connected(1, 900, 900)
    arrivals.number(1, 901)
    assert arrivals.connected(1, 0, 0) is None
    assert arrivals.connected(1, None, None) is None
    assert arrivals.parts == 1


class Rig:
    """A camera with a clock of its own that exposes `delay` after its trigger, and its triggers."""

    def __init__(self, has_clock=True):
        self.pairing, self.has_clock = Pairing(), has_clock
        self.now, self.frame_id = 5 * 10**9, 0

    def give(self, trigger_id, delay=2 * MS, took=MS // 3, ignored=False):
        """Give a trigger and return its frame: the camera's number for it, and the moment of its exposure."""
        assert self.pairing.may_trigger(self.now)
        self.pairing.given(trigger_id, self.now, self.now + took)
        self.frame_id += not ignored
        return self.frame_id, self.now + delay + CAMERA_CLOCK if self.has_clock else 0

    def answer(self, frame, after=8 * MS):
        return self.pairing.answered(*frame, self.now + after)

    def learn(self, count=LEAST_OFFSETS + 2):
        """Let so many parts go by without a fault."""
        for trigger_id in range(1, count + 1):
            assert self.answer(self.give(trigger_id)) == trigger_id
            self.now += TAKT
        return count


def test_frames_are_paired_with_their_triggers():
    Rig().learn(50)


def test_after_a_trigger_that_the_camera_ignored_the_next_frame_belongs_to_the_next_trigger():
    rig = Rig()
    last = rig.learn()
    rig.give(last + 1, ignored=True)
    rig.now += TAKT
    assert rig.answer(rig.give(last + 2)) == last + 2
    rig.now += TAKT
    assert rig.answer(rig.give(last + 3)) == last + 3


def test_a_frame_that_comes_after_the_next_trigger_still_belongs_to_its_own():
    rig = Rig()
    last = rig.learn()
    late = rig.give(last + 1)
    rig.now += TAKT
    prompt = rig.give(last + 2)
    assert rig.answer(late, after=0) == last + 1
    assert rig.answer(prompt) == last + 2


def test_a_frame_that_comes_twice_or_that_nobody_asked_for_is_paired_with_nothing():
    rig = Rig()
    last = rig.learn()
    exposed = rig.give(last + 1)
    assert rig.answer(exposed) == last + 1
    assert rig.answer(exposed) is None
    rig.now += 3 * TAKT
    assert rig.answer((99, rig.now + CAMERA_CLOCK)) is None
    assert rig.pairing.unpaired == 2


def test_a_thread_that_is_put_aside_while_it_triggers_does_not_confuse_the_pairing():
    rig = Rig()
    last = rig.learn()
    for number in range(last + 1, last + 5):
        assert rig.answer(rig.give(number, delay=30 * MS, took=31 * MS), after=40 * MS) == number
        rig.now += TAKT


def test_one_slow_answer_among_the_first_does_not_shift_those_after_it():
    rig = Rig()
    for trigger_id in range(1, 10):
        exposed = rig.give(trigger_id, delay=45 * MS if trigger_id == 2 else 2 * MS)
        assert rig.answer(exposed, after=49 * MS) == trigger_id
        rig.now += TAKT


def test_a_camera_that_is_slow_for_once_is_understood_where_order_and_number_agree():
    rig = Rig()
    last = rig.learn()
    assert rig.answer(rig.give(last + 1, delay=32 * MS), after=40 * MS) == last + 1
    rig.now += TAKT
    slow = rig.give(last + 2, delay=22 * MS)
    rig.now += TAKT
    assert rig.answer(slow, after=0) == last + 2


def test_in_doubt_a_frame_is_nobodys_and_the_pairing_begins_anew_after_a_silence():
    rig = Rig()
    last = rig.learn()
    rig.give(last + 1, ignored=True)
    frame_id, exposed = rig.give(last + 2)
    rig.now += TAKT
    rig.give(last + 3, ignored=True)
    assert rig.answer((frame_id, exposed + TAKT // 2)) is None  # half way between two
    assert not rig.pairing.may_trigger(rig.now)
    rig.now += ASTRAY_NS + 20 * MS
    assert rig.answer(rig.give(last + 4)) == last + 4


def test_a_camera_without_a_clock_has_one_part_under_way_at_a_time():
    rig = Rig(has_clock=False)
    rig.give(1)
    assert not rig.pairing.may_trigger(rig.now + TAKT)
    assert rig.pairing.may_trigger(rig.now + ASTRAY_NS)
    rig.now += ASTRAY_NS
    rig.give(2)
    assert rig.answer((1, 0)) == 2
    assert rig.pairing.may_trigger(rig.now)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_lost_late_or_ignored_no_frame_goes_to_another_part(seed):
    dice, rig = random.Random(seed), Rig()
    under_way, wrong, right, last_ns = [], [], 0, 0
    for trigger_id in range(1, 400):
        for arrives, truth, frame in [item for item in sorted(under_way) if item[0] <= rig.now]:
            found = rig.pairing.answered(*frame, rig.now)
            wrong += [(truth, found)] if found not in (None, truth) else []
            right += found == truth
            under_way.remove((arrives, truth, frame))
        if rig.pairing.may_trigger(rig.now):
            fate = dice.choices(("seen", "lost", "ignored"), (90, 5, 5))[0]
            delay = 2 * MS + dice.randrange(3 * MS) + (dice.random() < 0.05) * dice.randrange(20 * MS)
            frame = rig.give(trigger_id, delay=delay, ignored=fate == "ignored")
            if fate == "seen":
                last_ns = max(last_ns, rig.now + dice.choice((8, 20, 60, 130)) * MS)  # frames come in order
                under_way.append((last_ns, trigger_id, frame))
        rig.now += TAKT
    assert wrong == []
    assert right > 250
