"""Verdicts on their way from the store to the user's loop, and how far the loop has come."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence

from taktsight_subscribe.messages import Verdict
from taktsight_subscribe.store import Placed

MAX_WAITING = 1000  # verdicts in memory; further ones wait in the store


class HandOver:
    """Filled by the receiver, emptied by the user's thread. Asking for a verdict confirms the one before."""

    def __init__(self, position: int) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[Placed] = deque()
        self._filled = position  # of the last verdict that was put in
        self._taken = position
        self._confirmed = position
        self._has_ended = False

    @property
    def filled(self) -> int:
        """Position of the last verdict that was put in."""
        return self._filled

    @property
    def confirmed(self) -> int:
        """Position up to which the loop is done with everything."""
        return self._confirmed

    def room(self) -> int:
        """Return how many more verdicts may be put in."""
        return MAX_WAITING - len(self._waiting)

    def put(self, verdicts: Sequence[Placed]) -> None:
        """Put verdicts in, in order."""
        with self._changed:
            self._waiting.extend(verdicts)
            self._filled = verdicts[-1].position
            self._changed.notify_all()

    def end(self) -> None:
        """Let nobody wait any more."""
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    def confirm(self) -> None:
        """The loop is done with all that it took."""
        self._confirmed = self._taken

    def take(self, timeout_s: float) -> Verdict | None:
        """Confirm the verdict before and return the next one; None if none came in time, or none will."""
        self.confirm()
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while not self._waiting:
                left_s = deadline_s - time.monotonic()
                if self._has_ended or left_s <= 0:
                    return None
                self._changed.wait(left_s)
            placed = self._waiting.popleft()
            self._taken = placed.position
            return placed.verdict
