"""The parity gate: an engine judges parts only if it would have judged the trainer's parts as the trainer did.

A recipe carries a sealed set: prepared parts, from the easiest to the hardest good one, and one with a gross fault,
with the network's own scores and maps. Every engine answers it before it judges, and on demand (`taktsight-agent
selftest`). What is demanded, with the tolerance of its precision:

    score   within tolerance of the trainer's, relative to the score or the threshold, whichever is larger
    map     the same at every place, relative to the map's peak or the map threshold
    flips   no part on the other side of the threshold, unless the trainer's score lies in the grey band round it:
            tolerance x threshold to both sides, where the precision itself decides
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agent.errors import EngineError
from calibration.recipe import Recipe
from calibration.thresholds import Thresholds

# Largest difference with which a precision may go live.
# f32: rounding order only, 1e-6 measured, so 1e-3 catches a wrong graph or driver.
# f16: the graph was chosen for 5e-3 in scores and 2e-2 in maps (trainer.half); a GPU adds in another order.
# bf16 keeps 8 bits: its scores move by per cent, which is why thresholds must be fitted on it; 0.25 only catches an
# engine that is broken.
TOLERANCES = {"f32": 1e-3, "bf16": 0.25, "f16": 2e-2}

# Thresholds serve a precision that they were not fitted on only where the gate holds one to the other this closely.
SERVED_BY = {"f16": ("f16", "f32")}

Infer = Callable[[NDArray[np.float32]], tuple[NDArray[np.float32], float]]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What one part is to be answered with."""

    name: str  # "part 1", or a file's
    score: float
    peak: float  # of the map
    anomaly_map: NDArray[np.float32] | None = None  # (h', w'); None: the peak alone is known


@dataclass(frozen=True, slots=True)
class Difference:
    """One part's answers side by side."""

    name: str
    wanted_score: float
    score: float
    wanted_peak: float
    peak: float
    of_score: float  # relative, as the gate counts
    of_map: float
    flips: bool  # the verdict is another one
    in_band: bool  # the wanted score lies in the grey band

    @property
    def worst(self) -> float:
        """The larger of the two differences; NaN if there is one."""
        return float(np.max([self.of_score, self.of_map]))

    def is_within(self, tolerance: float) -> bool:
        """Return whether the part may differ like this."""
        return self.worst <= tolerance and (self.in_band or not self.flips)


@dataclass(frozen=True, slots=True)
class Parity:
    """An engine's answers to a set of parts."""

    label: str  # of the engine
    tolerance: float
    parts: tuple[Difference, ...]

    @property
    def worst(self) -> float:
        """The largest difference; NaN if there is one, 0 of no parts."""
        return float(np.max([0.0, *(part.worst for part in self.parts)]))

    @property
    def flips(self) -> int:
        """How many verdicts are others, outside the grey band."""
        return sum(part.flips and not part.in_band for part in self.parts)

    @property
    def band_flips(self) -> int:
        """How many verdicts are others, inside the grey band."""
        return sum(part.flips and part.in_band for part in self.parts)

    @property
    def passed(self) -> bool:
        """Whether the engine may judge."""
        return all(part.is_within(self.tolerance) for part in self.parts)


def sealed_set(recipe: Recipe) -> list[tuple[NDArray[np.float32], Wanted]]:
    """Return each part of the recipe's self-test, (1, C, h, w), with the trainer's answers."""
    selftest = recipe.selftest
    maps = [None] * len(selftest.scores) if selftest.maps is None else [plane[0] for plane in selftest.maps]
    return [
        (batch[None], Wanted(f"part {number}", score, peak, anomaly_map))
        for number, (batch, score, peak, anomaly_map) in enumerate(
            zip(selftest.batches, selftest.scores, selftest.map_peaks, maps, strict=True), start=1
        )
    ]


def examined(infer: Infer, label: str, recipe: Recipe, tolerance: float) -> Parity:
    """Return how an engine answers the recipe's sealed set."""
    return Parity(
        label,
        tolerance,
        tuple(
            difference(wanted, *infer(batch), thresholds=recipe.thresholds, tolerance=tolerance)
            for batch, wanted in sealed_set(recipe)
        ),
    )


def difference(
    wanted: Wanted, anomaly_map: NDArray[np.float32], score: float, *, thresholds: Thresholds, tolerance: float
) -> Difference:
    """Return one part's answers side by side. anomaly_map: (h', w')."""
    peak, limit = float(anomaly_map.max()), thresholds.score
    apart = abs(peak - wanted.peak)
    if wanted.anomaly_map is not None:
        same_size = wanted.anomaly_map.shape == anomaly_map.shape
        apart = float(np.abs(anomaly_map - wanted.anomaly_map).max()) if same_size else float("inf")
    return Difference(
        name=wanted.name,
        wanted_score=wanted.score,
        score=score,
        wanted_peak=wanted.peak,
        peak=peak,
        of_score=abs(score - wanted.score) / max(abs(wanted.score), limit),
        of_map=apart / max(abs(wanted.peak), thresholds.map),
        flips=(score > limit) != (wanted.score > limit),
        in_band=abs(wanted.score - limit) <= tolerance * limit,
    )


def thresholds_serve(fitted_on: str, label: str) -> bool:
    """Return whether thresholds fitted on an engine ("torch f32, ...") serve another ("tensorrt f16, NVIDIA L4")."""
    precision = label.partition(",")[0].rpartition(" ")[2]
    known = fitted_on.replace(",", " ").split()
    return any(served in known for served in SERVED_BY.get(precision, (precision,)))


def require(parity: Parity) -> None:
    """Raises EngineError, naming the answer that is furthest off, if the engine must not judge parts."""
    failed = [part for part in parity.parts if not part.is_within(parity.tolerance)]
    if not failed:
        return
    part = max(failed, key=lambda part: (np.isnan(part.worst), part.worst))  # a NaN is further off than any number
    what = f"map {part.peak:.6g} for {part.wanted_peak:.6g} on {part.name}"
    if np.isnan(part.of_score) or part.of_score >= part.of_map:
        what = f"score {part.score:.6g} for {part.wanted_score:.6g} on {part.name}"
    raise EngineError(
        f"{parity.label} differs from the trainer's answers by {part.worst:.1e} of the threshold (self-test: {what}"
        f"{', another verdict' if part.flips else ''}), at most {parity.tolerance:g} is allowed: choose another "
        "engine or precision in station.yaml"
    )
