"""What gives a line its parts: the beat, a signal of the plant, or the camera's own trigger.

Who triggers the camera may come to a part too late: the process was put aside, parts waited. A picture that is taken
then shows another part, and this one would get its verdict. So each part has a moment until which it can be pictured:

    a signal    within_ms after the earliest moment at which it may have come, and a takt after it was announced: the
                next one may stand there then
    the beat    half a takt: beyond it a picture is nearer to the next part's moment than to its own

and none is pictured after its deadline.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from agent.cameras.trigger import Announced, TriggerSource
from agent.line.beat import Beat

log = logging.getLogger(__name__)

MOST_MISSED = 1000  # parts that a clock which was put aside tells of: a PLC's counter may go as far at once
MISSED = "the agent came to this part too late for a picture, another one may stand there by now: see docs/camera.md"
TOLD_LATE = "the trigger's source told of this part too late for a picture, or of several at once: see docs/camera.md"


class Pace:
    """Says when to trigger the camera; asked by the line's clock, again and again.

    This one says never: the camera triggers itself, and its frames announce the parts.
    """

    next_ns: int | None = None  # when to ask again at the latest, time.monotonic_ns(); None: `wake` says so, or nobody
    within_ns: int | None = None  # how long after it may have come a part can be pictured; None: nobody knows
    most_ns: int | None = None  # and so long after it was announced; None: within_ns is all
    why_lost = MISSED  # what is said of parts that are announced as lost

    def start(self, wake: Callable[[], object]) -> None:
        """Begin; wake is called when there is something to take. Raises CameraError if the signal cannot be had."""

    def stop(self) -> None:
        """Announce nothing more; never raises."""

    def take(self, now_ns: int) -> Announced | None:  # noqa: ARG002 - for those that count time
        """Return what has come and was not taken yet; None while nothing has."""
        return None

    def until_ns(self, announced: Announced) -> int | None:
        """Return until when the part that stands there now can be pictured, time.monotonic_ns(); None: at any time."""
        if self.within_ns is None:
            return None
        until_ns = (announced.at_ns if announced.since_ns is None else announced.since_ns) + self.within_ns
        return until_ns if self.most_ns is None else min(until_ns, announced.at_ns + self.most_ns)


def pace_of(beat: Beat) -> Pace:
    """Return what gives this line its parts."""
    takt_ns, deadline_ns = round(beat.takt_ms * 1e6), round(beat.deadline_ms * 1e6)
    if beat.source is not None:
        return Signalled(beat.source, min(takt_ns, deadline_ns))
    return Pace() if beat.by_camera else OnTheBeat(takt_ns, deadline_ns)


@contextmanager
def running(pace: Pace, wake: Callable[[], object]) -> Iterator[None]:
    """Start it, and stop it in any case. Raises CameraError if the signal cannot be had."""
    pace.start(wake)
    try:
        yield
    finally:
        pace.stop()


class OnTheBeat(Pace):
    """Every takt, from the first question on; a part has come when it was due, whenever it is asked for."""

    def __init__(self, takt_ns: int, most_ns: int | None = None) -> None:
        """most_ns: after a part has come, it is not pictured any more; None: half a takt is all."""
        self._takt_ns = takt_ns
        self.within_ns, self.most_ns = takt_ns // 2, most_ns

    def take(self, now_ns: int) -> Announced | None:
        """Return a part where it is time for one; one that is a takt late or more has gone by, and is lost."""
        due_ns = now_ns if self.next_ns is None else self.next_ns
        if now_ns < due_ns:
            return None
        missed = (now_ns - due_ns) // self._takt_ns
        unseen = max(0, missed - MOST_MISSED)
        if unseen:
            log.warning("%d parts of the beat went by unseen: the last %d get their verdicts", missed, MOST_MISSED)
            due_ns += unseen * self._takt_ns
        self.next_ns = due_ns + self._takt_ns
        return Announced(due_ns, lost=1, opens=False, unseen=unseen) if missed else Announced(due_ns)


class Signalled(Pace):
    """When a PLC or a pin says so."""

    why_lost = TOLD_LATE

    def __init__(self, source: TriggerSource, most_ns: int | None = None) -> None:
        """most_ns: after a part was announced, it is not pictured any more; None: the source's own limit is all."""
        self._source = source
        self.within_ns, self.most_ns = source.announcements.within_ns, most_ns

    def start(self, wake: Callable[[], object]) -> None:
        """Listen to the source."""
        self._source.start(wake)

    def stop(self) -> None:
        """Listen no more."""
        self._source.stop()

    def take(self, now_ns: int) -> Announced | None:  # noqa: ARG002 - the source knows when it was
        """Return what the source has announced."""
        return self._source.announcements.take()
