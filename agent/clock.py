"""What time it is beside the line: UTC for people, the monotonic clock for order, and a flag when the two disagree."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

LEAST_STEP_MS = 100.0
MOST_SLEW = 0.0005  # NTP turns a clock by at most 500 ppm; what goes beyond was a step
ASK_KERNEL_EVERY_NS = 10 * 10**9
READINGS, QUICK_NS = 5, 10**6  # of both clocks, until one took no longer than this
TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised


@dataclass(frozen=True, slots=True)
class Stamp:
    """When something happened, on both clocks."""

    created_utc: datetime  # wall clock: may jump
    monotonic_ms: float  # since the run began: orders and spaces what happened in one run, whatever the wall clock does
    clock_step_ms: float = 0.0  # how far the wall clock was moved since the stamp before; 0 for NTP's gentle turning
    synchronized: bool | None = None  # with a time server, as the kernel says; None: it does not say


class StationClock:
    """Stamps for one run, in the order of the calls. One thread."""

    def __init__(
        self,
        *,
        wall_ns: Callable[[], int] = time.time_ns,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
        is_synchronized: Callable[[], bool | None] | None = None,
        began_ns: int | None = None,
    ) -> None:
        """began_ns: when the run began, on the monotonic clock; None: now."""
        self._wall_ns = wall_ns
        self._monotonic_ns = monotonic_ns
        self._is_synchronized = is_synchronized or kernel_says_synchronized
        now_ns, self._offset_ns = self._read()
        self._began_ns = now_ns if began_ns is None else began_ns
        self._seen_ns = self._asked_ns = now_ns
        self._synchronized = self._is_synchronized()
        self.last_step_ms = 0.0  # the last step of this run, 0 if there was none

    def stamp(self, moment_ns: int | None = None) -> Stamp:
        """Return the stamp of a moment on the monotonic clock, ns; None: now."""
        now_ns, offset_ns = self._read()
        step_ms = self._step_ms(now_ns, offset_ns)
        if now_ns - self._asked_ns >= ASK_KERNEL_EVERY_NS:
            self._asked_ns, self._synchronized = now_ns, self._is_synchronized()
        moment_ns = now_ns if moment_ns is None else moment_ns
        created = datetime.fromtimestamp(0, UTC) + timedelta(microseconds=(moment_ns + self._offset_ns) // 1000)
        return Stamp(created, (moment_ns - self._began_ns) / 1e6, step_ms, self._synchronized)

    def _read(self) -> tuple[int, int]:
        """Return the monotonic clock and how far the wall clock is ahead of it, both read at one moment.

        A thread may be put aside for 100 ms between two reads (a GIL stall, measured), which would look like a step.
        """
        readings = []
        for _ in range(READINGS):
            before_ns, wall_ns, after_ns = self._monotonic_ns(), self._wall_ns(), self._monotonic_ns()
            readings.append((after_ns - before_ns, after_ns, wall_ns - (before_ns + after_ns) // 2))
            if after_ns - before_ns <= QUICK_NS:
                break
        _, now_ns, offset_ns = min(readings)
        return now_ns, offset_ns

    def _step_ms(self, now_ns: int, offset_ns: int) -> float:
        """Take over the present offset between the clocks; return how far it jumped."""
        moved_ns, elapsed_ns = offset_ns - self._offset_ns, now_ns - self._seen_ns
        self._offset_ns, self._seen_ns = offset_ns, now_ns
        if abs(moved_ns) < LEAST_STEP_MS * 1e6 + MOST_SLEW * elapsed_ns:
            return 0.0
        self.last_step_ms = moved_ns / 1e6
        return self.last_step_ms


def kernel_says_synchronized() -> bool | None:
    """Return whether a time server disciplines this machine's clock; None where the kernel may not be asked."""
    try:
        answer = ctypes.CDLL(None).adjtimex(
            ctypes.create_string_buffer(512)
        )  # modes 0: only asks; the struct is 208 bytes
    except (OSError, AttributeError):
        return None
    return None if answer < 0 else answer != TIME_ERROR
