"""Zones with limits of their own, in the graph: one map, one score, one threshold, whatever was drawn.

    limit of a zone   factor x (median + 3 deviations of good parts' highest map value inside)
    map               divided by its zone's limit, in the unit of the reference zone: a place is as strange as it looks
    score             the strangest of the map's peak and the detector's own score, both in deviations of good parts.
                      The score's deviations are divided by the factor of the zone in which the part is strangest, so a
                      lenient zone is lenient for the score too

The threshold is then the conformal quantile of this one score, so the promise about good parts holds for the part, over
all zones together, without dividing it among them; a stricter zone makes the others more lenient instead. Medians and
deviations come from the same held-out good parts (docs/detectors.md says what that costs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from calibration.preprocess import View, in_view
from calibration.thresholds import median_and_deviation
from calibration.zones import ELSEWHERE, DrawnZone, Zones
from trainer.errors import TrainingError
from trainer.learning import Learned, Material, Method, Options, Progress

DEVIATIONS = 3.0  # above the median: where zones are made equal
FLOOR = 0.3  # share of the zones' mean deviation added to each: a quiet zone must not reject for a trifle


def zoned(train: Method, drawn: Sequence[DrawnZone], view: View) -> Method:
    """Return the method with limits of their own for the zones that are drawn, those that are ignored aside.

    Raises TrainingError for a zone that the detector does not see, before anything is trained.
    """
    judged = [zone for zone in drawn if not zone.ignore]
    cells_of(judged, view, (view.height, view.width))

    def fit(material: Material, options: Options, progress: Progress) -> Learned:
        learned = train(material, options, progress)
        cells = cells_of(judged, view, (learned.good_maps.shape[1], learned.good_maps.shape[2]))
        factors = np.array([1.0, *(zone.factor for zone in judged)])
        gains = zone_gains(learned.good_maps, cells, factors)
        module = _linked(learned, cells, factors, gains, [ELSEWHERE, *(zone.name for zone in judged)])
        with torch.inference_mode():
            maps, scores = module.judged(
                torch.from_numpy(learned.good_maps)[:, None], torch.from_numpy(learned.good_scores).float()
            )
        return replace(
            learned,
            module=module.eval(),
            good_scores=scores.double().numpy(),
            good_peaks=maps.flatten(1).amax(1).double().numpy(),
            good_maps=maps[:, 0].numpy(),
        )

    return fit


def zones_of(module: nn.Module) -> Zones | None:
    """Return the zones that a trained module applies; None where none were drawn."""
    return module.zones if isinstance(module, Zoned) else None


class Zoned(nn.Module):
    """A detector under zones: image (N, C, h, w) -> anomaly_map (N, 1, h', w') in one unit, score (N,)."""

    def __init__(self, detector: nn.Module, zones: Zones, gains: Tensor, factors: Tensor, usual: Tensor) -> None:
        """gains, factors: (1, 1, h', w'). usual: (4,) median and deviation of the score, then of the map's peak."""
        super().__init__()
        self.detector = detector
        self.zones = zones
        self.register_buffer("gains", gains)
        self.register_buffer("factors", factors)
        self.register_buffer("usual", usual)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return (anomaly_map, score)."""
        return self.judged(*self.detector(image))

    def judged(self, anomaly_map: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        """Return (anomaly_map, score) under the zones, of what the detector says."""
        centre, scale, usual_peak, spread = self.usual
        anomaly_map = anomaly_map * self.gains
        strangest = (anomaly_map * self.factors).flatten(1).argmax(1)  # where factors do not count
        factor = self.factors.flatten()[strangest]  # (N,)
        peak = anomaly_map.flatten(1).amax(1)
        strangeness = torch.maximum((score - centre) / scale / factor, (peak - usual_peak) / spread)
        return anomaly_map, centre + scale * strangeness


def cells_of(drawn: Sequence[DrawnZone], view: View, shape: tuple[int, int]) -> NDArray[np.uint8]:
    """Return (h', w'): 0 where no zone is, else its number from 1; the later of two, from half of a cell on.

    A zone that covers half of no cell gets the one that it covers most. Raises TrainingError for one out of view.
    """
    cells = np.zeros(shape, np.uint8)
    for number, zone in enumerate(drawn, 1):
        seen = torch.from_numpy(in_view(zone.inside.astype(np.uint8), view, None).astype(np.float32))
        shares = F.adaptive_avg_pool2d(seen[None, None], shape)[0, 0].numpy()
        most = float(shares.max())
        if most <= 0.0:
            raise TrainingError(f"zone {zone.name}: outside what the detector sees: draw it inside the region")
        cells[shares >= min(0.5, most)] = number
    for number, zone in enumerate(drawn, 1):
        if not (cells == number).any():
            raise TrainingError(f"zone {zone.name}: covered by the zones after it: draw them apart, or leave it out")
    return cells


def zone_gains(
    maps: NDArray[np.float32], cells: NDArray[np.uint8], factors: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return (zones,): what a zone's map values are multiplied by; 1 for a reference zone with factor 1.

    maps: (m, h', w') of good parts. The reference zone is the first that has cells: elsewhere, as a rule.
    """
    numbers = [number for number in range(len(factors)) if (cells == number).any()]
    found = {number: median_and_deviation(maps[:, cells == number].max(axis=1)) for number in numbers}
    floor = FLOOR * float(np.mean([deviation for _, deviation in found.values()])) + 1e-6
    limits = {number: middle + DEVIATIONS * (deviation + floor) for number, (middle, deviation) in found.items()}
    unit = limits[numbers[0]]
    highest = max(limits.values())
    if not unit > 0.0:
        raise TrainingError(
            f"the anomaly maps of good parts reach {highest:g} at most, need more than 0: see the images"
        )
    gains = np.ones(len(factors))
    for number, limit in limits.items():
        gains[number] = unit / (
            max(limit, 0.1 * highest) * factors[number]
        )  # a zone that is always calm counts a tenth
    return gains


def _linked(
    learned: Learned,
    cells: NDArray[np.uint8],
    factors: NDArray[np.float64],
    gains: NDArray[np.float64],
    names: Sequence[str],
) -> Zoned:
    """Return the detector under zones, the map's peak brought to the unit of the score."""
    maps = learned.good_maps * gains[cells].astype(np.float32)
    centre, scale = median_and_deviation(learned.good_scores)
    usual_peak, spread = median_and_deviation(maps.reshape(len(maps), -1).max(axis=1))
    scale, spread = max(scale, 1e-6 * abs(centre), 1e-9), max(spread, 1e-6 * abs(usual_peak), 1e-9)
    gain = scale / spread
    return Zoned(
        learned.module,
        Zones(tuple(names), cells, gain, centre - gain * usual_peak),
        *(torch.from_numpy(values[cells]).float()[None, None] for values in (gains, factors)),
        torch.tensor([centre, scale, usual_peak, spread], dtype=torch.float32),
    )
