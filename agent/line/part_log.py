"""What the log says of single parts: rejects and parts without verdict, never one that passed.

The first of a kind is told at once. What follows within a minute is counted, and told in one line.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from agent.journal import fields
from agent.verdict import Outcome, Reason, Verdict

log = logging.getLogger(__name__)

SUM_UP_EVERY_S = 60.0
UNTOLD = (Reason.PAUSED, Reason.HALTED)  # of the whole line, which says so once


@dataclass(slots=True)
class _Repeated:
    """One kind of verdict since it was told last."""

    told_s: float
    count: int = 0


class PartLog:
    """Tells of parts, with journal fields. One thread."""

    def __init__(self, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._repeated: dict[tuple[Outcome, Reason], _Repeated] = {}

    def note(self, verdict: Verdict, recipe: str) -> None:
        """Tell of this part, or count it."""
        if verdict.outcome is Outcome.PASS or verdict.reason in UNTOLD:
            return
        kind = (verdict.outcome, verdict.reason)
        repeated = self._repeated.get(kind)
        if repeated is not None:
            repeated.count += 1
            return
        self._repeated[kind] = _Repeated(self._monotonic())
        score = None if verdict.score is None else f"{verdict.score:.6g}"
        what = fields(
            verdict=verdict.outcome,
            reason=verdict.reason,
            recipe=recipe,
            trigger=verdict.trigger_id,
            part=verdict.part_id,
            score=score,
        )
        rejected = verdict.outcome is Outcome.REJECT
        figures = f" {verdict.score:.3f}, threshold {verdict.threshold:.3f}" if rejected else ""
        told = f": {verdict.detail}" if verdict.detail else ""
        level = logging.INFO if rejected else logging.WARNING
        log.log(level, "part %d: %s, %s%s%s", verdict.trigger_id, *kind, figures, told, extra=what)

    def sum_up(self) -> None:
        """Tell what was counted for a minute; what did not come again is news when it comes next."""
        now_s = self._monotonic()
        for kind, repeated in list(self._repeated.items()):
            if now_s - repeated.told_s < SUM_UP_EVERY_S:
                continue
            if repeated.count == 0:
                del self._repeated[kind]
                continue
            outcome, reason = kind
            what = fields(verdict=outcome, reason=reason, count=repeated.count)
            seconds = now_s - repeated.told_s
            log.warning("%d more parts: %s, %s, in %.0f s", repeated.count, outcome, reason, seconds, extra=what)
            self._repeated[kind] = _Repeated(now_s)
