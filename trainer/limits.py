"""From held-out scores of good images to thresholds, and which good images had better be none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibration.thresholds import (
    Thresholds,
    good_parts_needed,
    median_and_deviation,
    rate_upper_bound,
    reject_threshold,
    smallest_rate,
    strangers,
)
from trainer.data import Item
from trainer.errors import TrainingError
from trainer.learning import Learned

STANDS_APART = 1.5  # times the next lower score
NAMED = 5
WELL_NOTICED = 0.9  # share of good images; a fault of light or focus that is noticed on fewer is named


@dataclass(frozen=True, slots=True)
class Suspect:
    """A good image that scores as no good part does."""

    item: Item
    score: float  # by a model that never saw it
    anomaly_map: NDArray[np.float32]  # (h', w')
    picture: NDArray[np.float32]  # (C, h, w)


def fitted_thresholds(learned: Learned, false_reject_rate: float, *, left_out: int = 0) -> tuple[Thresholds, list[str]]:
    """Return thresholds at the wanted rate, or at the nearest one that so few good parts support, and a note if so.

    left_out: suspects beside these good parts; the bound of the rate counts them as good.
    """
    n_good = len(learned.good_scores)
    rate = max(false_reject_rate, smallest_rate(n_good))
    notes = []
    if rate > false_reject_rate:
        missing = good_parts_needed(false_reject_rate) - n_good
        notes.append(
            f"{n_good} good parts were scored unseen; a false reject rate of {false_reject_rate:g} needs {missing} "
            f"more. The threshold is set for {rate:.4f} instead"
        )
    good_median, good_deviation = median_and_deviation(learned.good_scores)
    thresholds = Thresholds(
        score=reject_threshold(learned.good_scores, rate),
        map=reject_threshold(learned.good_peaks, rate),
        false_reject_rate=rate,
        rate_upper_bound=rate_upper_bound(n_good, rate, left_out=left_out),
        n_good=n_good,
        fitted_on="torch f32, held-out good images",
        good_median=good_median,
        good_deviation=good_deviation,
    )
    if thresholds.map <= 0.0:
        raise TrainingError(
            f"the anomaly maps of good parts peak at {thresholds.map:g}, need more than 0: see the images"
        )
    return thresholds, notes


def suspicious_notes(good_scores: NDArray[np.float64], names: Sequence[str]) -> list[str]:
    """Return a note naming good images that stand apart: one defective part among them lifts the threshold.

    Apart: strangers that were not left out, or at most 5 % of the images, the lowest of them with 1.5 times the score
    of the next. A long tail without such a gap is a product's own variation.
    """
    order = np.argsort(-good_scores, kind="stable")
    scores = good_scores[order]
    gaps = [rank for rank in range(1, max(2, len(scores) // 20 + 1)) if scores[rank - 1] > STANDS_APART * scores[rank]]
    count = max([*gaps, len(strangers(good_scores))])
    if count == 0:
        return []
    apart = [names[index] for index in order[:count]]
    return [
        f"good images whose scores stand apart from the others ({len(apart)}): {', '.join(apart[:NAMED])}. See the "
        "report: a defective part among the good ones lifts the threshold: take it out and fit again"
    ]


def left_out_note(names: Sequence[str]) -> str:
    """Return a note on the good images that were not learnt from."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return (
        f"good images left out, because they score as no good part does ({len(names)}): {', '.join(names[:NAMED])}"
        f"{more}. Look at them in the report: defective ones do not belong among the good; where all are good, fit "
        "again with --keep-suspects"
    )


def unregistered_notes(unregistered: Sequence[str], looked_at: int) -> list[str]:
    """Return a note on the good images that could not be aligned. unregistered: name and reason of each."""
    if not unregistered:
        return []
    missing = len(unregistered)
    return [f"{missing} of {looked_at} good images could not be registered and were left out: {unregistered[0]}"]


def unnoticed_notes(told: Mapping[str, float]) -> list[str]:
    """Return a note on what the limits of light and focus let through, because good parts vary as much themselves.

    told: fault -> share of good images on which it is noticed.
    """
    missed = [f"{name} ({share:.0%} noticed)" for name, share in told.items() if share < WELL_NOTICED]
    if not missed:
        return []
    return [f"light and focus vary much on good parts: the detector alone must tell {', '.join(missed)}"]
