"""What happened on a line so far, counted."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field

from agent.verdict import Verdict

KEPT_LATENCIES = 10_000  # of each stage, the last ones


@dataclass(slots=True)
class Tally:
    """Numbers of one run. Written by one thread per field."""

    triggers: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    parts_unseen: int = 0  # parts of the beat without trigger and verdict: too many went by at once
    stale_frames: int = 0  # frames whose trigger had its verdict already, or that nobody asked for
    late_results: int = 0  # inspections that ended after their deadline
    shed_pictures: int = 0  # verdicts handed on without frame and heatmap, because the outlets were behind
    delivery_faults: int = 0  # verdicts that an outlet could not take; the log says why
    stage_ms: dict[str, deque[float]] = field(default_factory=lambda: defaultdict(_bounded))

    @property
    def verdicts(self) -> int:
        """All verdicts settled so far."""
        return sum(self.outcomes.values())

    def count(self, verdict: Verdict) -> None:
        """Count one verdict."""
        self.outcomes[verdict.outcome] += 1
        self.reasons[verdict.reason] += 1
        for stage, duration_ms in verdict.stage_ms.items():
            self.stage_ms[stage].append(duration_ms)
        if verdict.latency_ms is not None:
            self.stage_ms["trigger to verdict"].append(verdict.latency_ms)


def _bounded() -> deque[float]:
    return deque(maxlen=KEPT_LATENCIES)
