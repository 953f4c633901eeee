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
HELD_OUT = "torch f32, held-out good images"  # what the thresholds of a new recipe are fitted on
WELL_NOTICED = 0.9  # share of good images; a fault of light or focus that is noticed on fewer is named


@dataclass(frozen=True, slots=True)
class Suspect:
    """A good image that scores as no good part does."""

    item: Item
    score: float  # by a model that never saw it
    anomaly_map: NDArray[np.float32]  # (h', w')
    picture: NDArray[np.float32]  # (C, h, w)


@dataclass(frozen=True, slots=True)
class GoodParts:
    """What a threshold rests on: each good part counts once, however many images of it there are."""

    scores: NDArray[np.float64]  # (n,) the highest of each part's images, by a model that never saw it
    peaks: NDArray[np.float64]  # (n,) the same of the anomaly maps
    left_out: int = 0  # suspects beside them; the bound of the rate counts them as good


def good_parts(learned: Learned, parts: Sequence[str] | None = None, left_out: Sequence[str] = ()) -> GoodParts:
    """Return the parts behind the held-out images.

    parts: (m,) which part each of learned.good_scores is of; None: every image shows another. left_out: the same of the
    suspects; a part with one of those counts as left out.
    """
    if parts is None:
        return GoodParts(learned.good_scores, learned.good_peaks, len(left_out))
    gone = set(left_out)
    images: dict[str, list[int]] = {}
    for index, part in enumerate(parts):
        if part not in gone:
            images.setdefault(part, []).append(index)
    if not images:
        raise TrainingError("every good part has an image that was left out: see the images, or use --keep-suspects")
    scores, peaks = (
        np.array([values[chosen].max() for chosen in images.values()])
        for values in (learned.good_scores, learned.good_peaks)
    )
    return GoodParts(scores, peaks, len(gone))


def fitted_thresholds(good: GoodParts, false_reject_rate: float) -> tuple[Thresholds, list[str]]:
    """Return thresholds at the wanted rate, or at the nearest one that so few good parts support, and a note if so."""
    n_good = len(good.scores)
    rate = max(false_reject_rate, smallest_rate(n_good))
    notes = []
    if rate > false_reject_rate:
        missing = good_parts_needed(false_reject_rate) - n_good
        notes.append(
            f"{n_good} good parts were scored unseen; a false reject rate of {false_reject_rate:g} needs {missing} "
            f"more. The threshold is set for {rate:.4f} instead"
        )
    good_median, good_deviation = median_and_deviation(good.scores)
    thresholds = Thresholds(
        score=reject_threshold(good.scores, rate),
        map=reject_threshold(good.peaks, rate),
        false_reject_rate=rate,
        rate_upper_bound=rate_upper_bound(n_good, rate, left_out=good.left_out),
        n_good=n_good,
        fitted_on=HELD_OUT,
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
