"""What gives a line its parts: the beat, a signal of the plant, or the camera's own trigger."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from agent.cameras.trigger import Announced, TriggerSource
from agent.line.beat import Beat


class Pace:
    """Says when to trigger the camera; asked by the line's clock, again and again.

    This one says never: the camera triggers itself, and its frames announce the parts.
    """

    next_ns: int | None = None  # when to ask again at the latest, time.monotonic_ns(); None: `wake` says so, or nobody

    def start(self, wake: Callable[[], object]) -> None:
        """Begin; wake is called when there is something to take. Raises CameraError if the signal cannot be had."""

    def stop(self) -> None:
        """Announce nothing more; never raises."""

    def take(self, now_ns: int) -> Announced | None:  # noqa: ARG002 - for those that count time
        """Return what has come and was not taken yet; None while nothing has."""
        return None


def pace_of(beat: Beat) -> Pace:
    """Return what gives this line its parts."""
    if beat.source is not None:
        return Signalled(beat.source)
    return Pace() if beat.by_camera else OnTheBeat(round(beat.takt_ms * 1e6))


@contextmanager
def running(pace: Pace, wake: Callable[[], object]) -> Iterator[None]:
    """Start it, and stop it in any case. Raises CameraError if the signal cannot be had."""
    pace.start(wake)
    try:
        yield
    finally:
        pace.stop()


class OnTheBeat(Pace):
    """Every takt, from the first question on."""

    def __init__(self, takt_ns: int) -> None:
        self._takt_ns = takt_ns

    def take(self, now_ns: int) -> Announced | None:
        """Return a part where it is time for one."""
        due_ns = now_ns if self.next_ns is None else self.next_ns
        if now_ns < due_ns:
            return None
        self.next_ns = due_ns + self._takt_ns
        if self.next_ns < now_ns:  # the machine slept: keep the beat from here, never in a burst
            self.next_ns = now_ns + self._takt_ns
        return Announced(now_ns)


class Signalled(Pace):
    """When a PLC or a pin says so."""

    def __init__(self, source: TriggerSource) -> None:
        self._source = source

    def start(self, wake: Callable[[], object]) -> None:
        """Listen to the source."""
        self._source.start(wake)

    def stop(self) -> None:
        """Listen no more."""
        self._source.stop()

    def take(self, now_ns: int) -> Announced | None:  # noqa: ARG002 - the source knows when it was
        """Return what the source has announced."""
        return self._source.announcements.take()
