"""Warnings that repeat: said at once, then counted and summed once a minute."""

from __future__ import annotations

import logging
import time

REPEAT_S = 60.0


class Quiet:
    """Logs a kind of warning at most once a minute, with the number of times that it was held back."""

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._quiet_until_s: dict[str, float] = {}
        self._held_back: dict[str, int] = {}

    def __call__(self, kind: str, text: str, *values: object) -> None:
        """Log text % values as a warning of this kind, or count it."""
        now_s = time.monotonic()
        if now_s < self._quiet_until_s.get(kind, 0.0):
            self._held_back[kind] = self._held_back.get(kind, 0) + 1
            return
        self._quiet_until_s[kind] = now_s + REPEAT_S
        held_back = self._held_back.pop(kind, 0)
        if held_back:
            text += " (and %d times more since)"
            values = (*values, held_back)
        self._log.warning(text, *values)
