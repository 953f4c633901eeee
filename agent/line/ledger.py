"""The promise in one data structure: every trigger is opened once and settled exactly once."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from calibration.frame import Frame


@dataclass(slots=True)
class OpenTrigger:
    """A trigger that has no verdict yet."""

    trigger_id: int
    opened_ns: int
    deadline_ns: int
    frame: Frame | None = None  # once it came


class Ledger:
    """Open triggers, oldest first. Any thread may call; whoever settles a trigger first speaks for it."""

    def __init__(self, deadline_ms: float) -> None:
        self._deadline_ns = round(deadline_ms * 1e6)
        self._open: dict[int, OpenTrigger] = {}
        self._lock = threading.Lock()

    def open(self, trigger_id: int, now_ns: int) -> None:
        """Note a trigger. Raises ValueError if it is open already."""
        with self._lock:
            if trigger_id in self._open:
                raise ValueError(f"trigger {trigger_id} is open already")
            self._open[trigger_id] = OpenTrigger(trigger_id, now_ns, now_ns + self._deadline_ns)

    def arrived(self, frame: Frame) -> bool:
        """Note a trigger's frame; False if its trigger is unknown, settled, or has a frame already."""
        with self._lock:
            entry = self._open.get(frame.trigger_id)
            if entry is None or entry.frame is not None:
                return False
            entry.frame = frame
            return True

    def settle(self, trigger_id: int) -> OpenTrigger | None:
        """Take a trigger out, for the caller to speak for it; None if another did before."""
        with self._lock:
            return self._open.pop(trigger_id, None)

    def deadline_ns(self, trigger_id: int) -> int | None:
        """Return the trigger's deadline, monotonic clock; None once it has its verdict."""
        entry = self._open.get(trigger_id)
        return None if entry is None else entry.deadline_ns

    def overdue(self, now_ns: int) -> list[OpenTrigger]:
        """Take out every trigger whose deadline has passed."""
        with self._lock:
            late = [entry for entry in self._open.values() if entry.deadline_ns <= now_ns]
            for entry in late:
                del self._open[entry.trigger_id]
            return late

    def next_deadline_ns(self) -> int | None:
        """Return the earliest deadline, monotonic clock; None while nothing is open."""
        with self._lock:
            return min((entry.deadline_ns for entry in self._open.values()), default=None)

    def __len__(self) -> int:
        return len(self._open)
