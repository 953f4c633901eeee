"""Whether good parts still score as they did at calibration, watched without knowing which parts are good.

Only parts that passed are looked at. A wave of defects is rejected and leaves no trace here; those few that escape are
bounded by CLIP. Good parts that creep towards the threshold pass for long before they are rejected, and that is seen.
Both directions count: scores that fall are what a lens out of focus or a dirty window does, and then defects escape.

A score x stands as z = (x - good median) / good deviation. Two sums (CUSUM, Page 1954) add up z - a and -z - a, the
allowance a being the change that nobody needs to hear of: lots differ, and median and deviation are estimates. A sum
that reaches LIMIT is drift, until it is back at 0. An average with exponential weights (EWMA) says how far it went.
How long until a false alarm, and until a true one: `python benchmarks/drift.py`, its table in docs/health.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

ALLOWANCE = 1.0  # deviations
LEAST_ALLOWANCE = 0.5  # towards a threshold that is near
LIMIT = 50.0  # deviations summed up: a level 2 deviations off is found after 50 parts that passed
CLIP = 3.0  # deviations: so far one part counts, however strange it is
WEIGHT = 0.01  # of the newest part in the average: a memory of about 100 parts


@dataclass(frozen=True, slots=True)
class DriftState:
    """What is known of drift at one moment."""

    watched: bool  # False: the recipe does not say how good parts scored
    parts: int  # that passed and were looked at
    level: float | None  # average distance from the calibration's median, deviations; None before the first part
    rising: float  # sums of the CUSUM, 0 to `limit`
    falling: float
    direction: str  # "none", "up" (towards the threshold) or "down"
    limit: float = LIMIT


class Drift:
    """Watches one recipe on one station. One thread."""

    def __init__(self, good_median: float | None, good_deviation: float | None) -> None:
        """Watch nothing where either is None, or the deviation is not above 0."""
        self._median = good_median
        self._deviation = good_deviation if good_deviation is not None and good_deviation > 0 else None
        self._parts = 0
        self._sum = self._weights = 0.0
        self._rising = self._falling = 0.0
        self.direction = "none"  # or "up", towards the threshold, or "down"

    def note(self, score: float, threshold: float) -> None:
        """Take the score of one part that passed, and the threshold that it passed."""
        if self._median is None or self._deviation is None or not math.isfinite(score):
            return
        z = min(max((score - self._median) / self._deviation, -CLIP), CLIP)
        allowed_up = _allowance_up((threshold - self._median) / self._deviation)
        self._parts += 1
        self._sum += WEIGHT * (z - self._sum)
        self._weights += WEIGHT * (1.0 - self._weights)
        self._rising = min(max(self._rising + z - allowed_up, 0.0), LIMIT)  # held at LIMIT: it must find back, too
        self._falling = min(max(self._falling - z - ALLOWANCE, 0.0), LIMIT)
        self.direction = self._decided()

    def state(self) -> DriftState:
        """Return what is known now."""
        return DriftState(
            watched=self._median is not None and self._deviation is not None,
            parts=self._parts,
            level=self._sum / self._weights if self._parts else None,
            rising=self._rising,
            falling=self._falling,
            direction=self.direction,
        )

    def _decided(self) -> str:
        """Return the direction: one that was found stays until its sum is back at 0."""
        sums = {"up": self._rising, "down": self._falling}
        if self.direction != "none" and sums[self.direction] > 0.0:
            return self.direction
        return next((direction for direction, total in sums.items() if total >= LIMIT), "none")


def _allowance_up(threshold_z: float) -> float:
    """Return a third of the way to the threshold, at most ALLOWANCE: below a near one, what passes is low by selection.

    threshold_z: distance of the threshold from the good median, deviations.
    """
    return min(ALLOWANCE, max(LEAST_ALLOWANCE, threshold_z / 3))
