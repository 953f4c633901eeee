"""Which part a frame shows: from the camera's own count of frames, its count of triggers, and its clock.

A wrong pairing is worse than none: where two parts could be meant, neither gets the frame.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

MOST_LOST_AT_START = 64  # a first frame_id beyond that says that the camera does not begin anew with each start
MOST_LOST = 10_000  # in one go; more is a count that began anew
SHORT_IDS = 65535  # 16-bit block ids of GigE Vision 1.x go from 65535 to 1
COUNTER_WRAP = 2**32
KEPT_TRIGGERS = 64
KEPT_OFFSETS, LEAST_OFFSETS = 16, 4  # pairs that tell how long after its trigger a camera exposes
ASTRAY_NS = 10**9  # an answer that did not come until then does not come any more
MOST_ERROR_NS = 250 * 10**6  # between the trigger and the exposure, beyond what is usual
SURE = 3  # the next trigger must be at least so many times as far away


class FrameIds:
    """The camera's count of frames, in which every gap is a frame that was lost on its way."""

    def __init__(self, first: int = 1) -> None:
        """first: what a camera of this kind begins with: 0 for USB3 Vision, 1 for GigE Vision."""
        self._first = first
        self._last: int | None = None
        self.duplicates = self.restarts = 0

    def advance(self, frame_id: int) -> int:
        """Return how many frames the camera has sent since the last one, this one included; 0: it came before."""
        last = self._last
        if last is None:
            self._last = frame_id
            step = frame_id - self._first + 1
            return step if 0 < step <= MOST_LOST_AT_START else 1
        step = frame_id - last
        if step < 0 and last <= SHORT_IDS:
            step += SHORT_IDS
        if step == 0:
            self.duplicates += 1
            return 0
        self._last = frame_id
        if not 0 < step <= MOST_LOST:
            self.restarts += 1
            return 1
        return step


class Arrivals:
    """Parts that the camera's own trigger announces, counted over reconnects. One thread writes."""

    def __init__(self) -> None:
        self.parts = 0
        self.ignored_triggers = 0  # the camera counted them and took no picture: it was still busy
        self._duplicates = 0  # in earlier counts of frames
        self._ids = FrameIds()
        self._counter: int | None = None
        self._told_lost = 0  # since the last frame

    @property
    def duplicate_frames(self) -> int:
        """How many frames came a second time."""
        return self._duplicates + self._ids.duplicates

    def connected(self, first_frame_id: int, counter_before: int | None, counter_now: int | None) -> int | None:
        """Begin a new count of frames; return how many parts went by meanwhile, None if nothing tells.

        counter_before: the camera's count of triggers before it was set up anew; counter_now: after.
        """
        self._duplicates += self._ids.duplicates
        self._ids = FrameIds(first_frame_id)
        last, self._counter = self._counter, counter_now
        missed = None
        if last is not None and counter_before is not None:
            step = (counter_before - last) % COUNTER_WRAP
            missed = max(step - self._told_lost, 0) if step <= MOST_LOST else None
        self._told_lost = 0
        self.parts += missed or 0
        return missed

    def lost(self) -> None:
        """Count a part whose frame came incomplete."""
        self._told_lost += 1
        self.parts += 1

    def number(self, frame_id: int, counter: int | None) -> int | None:
        """Return the number of the part that a frame shows, from 1; None for a frame that came before.

        counter: how many triggers the camera has counted, where it tells; one it took no picture for is a part, too.
        """
        step = self._ids.advance(frame_id)
        if step == 0:
            return None
        if counter is not None and self._counter is not None:
            triggers = (counter - self._counter) % COUNTER_WRAP
            if step < triggers <= MOST_LOST:
                self.ignored_triggers += triggers - step
                step = triggers
        if counter is not None:
            self._counter = counter
        self.parts += max(step - self._told_lost, 1)
        self._told_lost = 0
        return self.parts


@dataclass(slots=True)
class _Given:
    """A trigger that was given, between two moments of the host's clock."""

    trigger_id: int
    before_ns: int
    after_ns: int
    open: bool = True


class Pairing:
    """Triggers that we give, and the frames that answer them. One thread.

    A camera may ignore a trigger, lose its frame or answer late, so neither order nor number tells which trigger a
    frame belongs to. The camera's clock does: the exposure follows its trigger after about the same time each time;
    where that leaves a doubt, order and number must say the same. Until that time is known, and for cameras without a
    clock, one part at a time is under way.
    """

    def __init__(self, first_frame_id: int = 1) -> None:
        self._ids = FrameIds(first_frame_id)
        self._last: _Given | None = None  # the last one that was answered
        self._frames_since = 0
        self._given: deque[_Given] = deque(maxlen=KEPT_TRIGGERS)
        self._offsets_ns: deque[int] = deque(maxlen=KEPT_OFFSETS)  # camera clock minus host clock, of pairs
        self._quiet_until_ns = 0
        self.unpaired = 0  # frames that belong to no part that waits for one

    @property
    def _knows_clock(self) -> bool:
        return len(self._offsets_ns) >= LEAST_OFFSETS

    def may_trigger(self, now_ns: int) -> bool:
        """Return whether the answer to a trigger given now could be told from those to the ones before."""
        return self._knows_clock or (now_ns >= self._quiet_until_ns and not self._open(now_ns))

    def given(self, trigger_id: int, before_ns: int, after_ns: int) -> None:
        """Note a trigger, and the host's clock before and after it was given."""
        self._given.append(_Given(trigger_id, before_ns, after_ns))

    def is_waiting(self, now_ns: int) -> bool:
        """Return whether a trigger may still be answered."""
        return bool(self._open(now_ns))

    def answered(self, frame_id: int, exposed_ns: int, now_ns: int) -> int | None:
        """Return the trigger that a frame answers; None where there is none, or it cannot be told which.

        exposed_ns: camera clock; 0 where the camera does not tell.
        """
        self._frames_since += self._ids.advance(frame_id)
        waiting = self._open(now_ns)
        if self._knows_clock and exposed_ns:
            found = self._nearest(exposed_ns)
            if found is None and waiting:
                self._forget(waiting, now_ns)
        else:
            found = waiting[0] if len(waiting) == 1 and now_ns >= self._quiet_until_ns else None
        if found is None or not found.open:
            self.unpaired += 1
            return None
        found.open = False
        self._last, self._frames_since = found, 0
        if exposed_ns:
            self._offsets_ns.append(exposed_ns - found.before_ns)
        return found.trigger_id

    def _open(self, now_ns: int) -> list[_Given]:
        return [given for given in self._given if given.open and now_ns - given.before_ns < ASTRAY_NS]

    def _nearest(self, exposed_ns: int) -> _Given | None:
        """Return the trigger, answered or not, whose exposure this was; None if that cannot be told."""
        expected_ns = exposed_ns - min(self._offsets_ns)  # what was put off, here or there, was late, never early
        near = sorted(
            (max(given.before_ns - expected_ns, expected_ns - given.after_ns, 0), -number)
            for number, given in enumerate(self._given)
        )
        if not near or near[0][0] > MOST_ERROR_NS:
            return None
        nearest = self._given[-near[0][1]]
        is_sure = len(near) == 1 or near[1][0] >= SURE * near[0][0]
        return nearest if is_sure or nearest is self._next_in_order() else None

    def _next_in_order(self) -> _Given | None:
        """Return the trigger that a frame answers if the camera took each one since the last that was answered."""
        numbers = {id(given): number for number, given in enumerate(self._given)}
        number = numbers.get(id(self._last), len(self._given)) + self._frames_since
        return self._given[number] if number < len(self._given) else None

    def _forget(self, waiting: list[_Given], now_ns: int) -> None:
        """Begin anew once all answers must have come: the camera's clock was set, or it is slower than the parts."""
        for given in waiting:
            given.open = False
        self._offsets_ns.clear()
        self._quiet_until_ns = now_ns + ASTRAY_NS
