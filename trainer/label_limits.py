"""Score thresholds where there are labelled defects, beside the one that rests on good parts alone.

A threshold from labels fits the defects that were shown. The statement of how many good parts it rejects is kept: it is
read off the good parts that were scored unseen, as for the conformal threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from calibration.errors import InputError
from calibration.thresholds import Thresholds, rate_upper_bound
from trainer.data import Dataset, Item
from trainer.errors import TrainingError
from trainer.labels import LEARNT, labelled
from trainer.learning import Learned, Material, in_chunks
from trainer.limits import GoodParts

GOOD_ONLY = "false_reject_rate"
LEARNERS = ("cnn", "vgg16", "siamese")  # detectors and scorers that learn from labelled defects
FEWEST_SCORES = 2  # of either kind: below it no normal can be fitted


def needed_defects(dataset: Dataset, rule: str, detector: str) -> tuple[Item, ...]:
    """Return the labelled defects if the threshold's rule or the detector looks at them, else none.

    Raises InputError for one whose part is not known, while those of the good images are.
    """
    if rule == GOOD_ONLY and not learns_from_labels(detector):
        return ()
    unknown = [item.file for item in dataset.defects if item.part_id is None]
    if unknown and dataset.good[0].part_id is not None:
        raise InputError(
            f"{unknown[0]}: the part pattern finds nothing in its name, and defects that are learnt from need a part: "
            "mend the pattern"
        )
    return dataset.defects


def learns_from_labels(detector: str) -> bool:
    """Return whether a detector, or the scorer of a pair, learns from labelled defects."""
    return detector.rpartition("+")[2] in LEARNERS


def check_labels(material: Material, rule: str, detector: str) -> None:
    """Raise TrainingError before the training if what needs labels has none, or too few images.

    Parts that the detector learns from give no threshold: of the others there must be two.
    """
    if rule != GOOD_ONLY:
        defects = labelled(material, f"the threshold {rule}")
        parts = dict(zip(defects.parts, defects.fold.tolist(), strict=True))
        unseen = sum(fold == 1 for fold in parts.values())
        if learns_from_labels(detector) and unseen < FEWEST_SCORES:
            raise TrainingError(
                f"the threshold {rule} needs {FEWEST_SCORES} defective parts that {detector} does not learn from, "
                f"{unseen} of {len(parts)} found: add images to train/DEFECT (7 of one type suffice, or 2 "
                "of each of two), or choose a detector that learns from good images alone"
            )
    if detector.endswith("+siamese") and material.defects is not None:
        labelled(material, "siamese")


def with_labels(thresholds: Thresholds, good: GoodParts, learned: Learned, material: Material, rule: str) -> Thresholds:
    """Return the thresholds with the score's found by this rule; the conformal ones as they are for GOOD_ONLY.

    good: the parts that the thresholds rest on. The rule sees every part that was scored unseen, good or defective, by
    the highest score of its images. Defects that the detector learnt from are left out.

    Raises TrainingError if labels are missing, or good and defective scores cannot be told apart.
    """
    if rule == GOOD_ONLY:
        return thresholds
    defects = labelled(material, f"the threshold {rule}")
    unseen = defects.fold == 1 if learned.learnt_defects == LEARNT else np.ones(len(defects), dtype=bool)
    chosen = np.flatnonzero(unseen)
    judged = in_chunks(learned.module, defects.batch[chosen], lambda *_: None, rule, size=1)[1].double().numpy()
    scores = _highest(judged, [defects.parts[index] for index in chosen])
    limit = RULES[rule](good.scores, scores)
    passed = int((good.scores <= limit).sum())
    if passed == 0:
        raise TrainingError(
            f"{rule} gives {limit:.4g}, below every good part's score: the defects score no higher than good parts; "
            "choose another detector or leave out --threshold"
        )
    rate = 1.0 - passed / (len(good.scores) + 1)
    return replace(
        thresholds,
        score=float(limit),
        false_reject_rate=rate,
        rate_upper_bound=rate_upper_bound(len(good.scores), rate, left_out=good.left_out),
        fitted_on=f"{thresholds.fitted_on}; score: {rule} with {len(scores)} defective parts",
    )


def normal_intersection(good: NDArray[np.float64], defective: NDArray[np.float64]) -> float:
    """Return the score at which normals fitted to good and to defective scores are equally high.

    good: (n,), defective: (m,), each at least 2 and not all equal. Of two crossings the one between the means counts.
    Raises TrainingError if there is none, or the defective mean is not above the good one.
    Source: paper 000, sec. 3.2.1 and 4.5, fig. 17: both densities weigh the same, however many images there are.
    """
    (a, s), (b, t) = fitted_normal(good, "good"), fitted_normal(defective, "defective")
    if b <= a:
        raise TrainingError(
            f"defective parts score {b:.4g} on average, good ones {a:.4g}: no threshold can lie between them; "
            "choose another detector"
        )
    # log densities are equal where ((x - a) / s)^2 / 2 + log s = ((x - b) / t)^2 / 2 + log t
    square, linear = 1 / s**2 - 1 / t**2, -2 * (a / s**2 - b / t**2)
    constant = a**2 / s**2 - b**2 / t**2 + 2 * math.log(s / t)
    if abs(square) < 1e-12 * (1 / s**2 + 1 / t**2):
        crossings = [-constant / linear]
    else:
        root = math.sqrt(max(0.0, linear**2 - 4 * square * constant))
        crossings = [(-linear - root) / (2 * square), (-linear + root) / (2 * square)]
    between = [x for x in crossings if a <= x <= b]
    if not between:  # one normal is the higher one from mean to mean: its deviation is far the smaller
        raise TrainingError(
            f"defective parts score {b:.4g} +- {t:.4g}, good ones {a:.4g} +- {s:.4g}: these normals do not cross "
            "between their means, so no threshold can lie there; choose another detector, or leave out --threshold"
        )
    return between[0]


def best_f1(good: NDArray[np.float64], defective: NDArray[np.float64]) -> float:
    """Return the score above which to reject for the highest F1 on these parts; half-way between two scores.

    It is fitted to the very parts that it is judged on: for tables, not for production.
    """
    _enough(good, "good")
    _enough(defective, "defective")
    scores = np.unique(np.concatenate([good, defective]))
    limits = np.concatenate([[np.nextafter(scores[0], -np.inf)], (scores[:-1] + scores[1:]) / 2])
    caught = len(defective) - np.searchsorted(np.sort(defective), limits, side="right")
    wrong = len(good) - np.searchsorted(np.sort(good), limits, side="right")
    f1 = 2 * caught / (len(defective) + caught + wrong)
    return float(limits[len(f1) - 1 - int(np.argmax(f1[::-1]))])  # of equal ones the highest: fewest good rejected


def fitted_normal(scores: NDArray[np.float64], kind: str) -> tuple[float, float]:
    """Return (mean, standard deviation) of scores (n,). Raises TrainingError if there are too few or all are equal."""
    _enough(scores, kind)
    deviation = float(np.std(scores, ddof=1))
    if deviation == 0.0:
        raise TrainingError(
            f"all {len(scores)} {kind} parts score {scores[0]:.4g}: no normal can be fitted; add images"
        )
    return float(np.mean(scores)), deviation


def _highest(scores: NDArray[np.float64], parts: Sequence[str]) -> NDArray[np.float64]:
    """Return the highest score of each part. scores: (m,) of images, parts: (m,) which part each shows."""
    return np.array([scores[[other == part for other in parts]].max() for part in dict.fromkeys(parts)])


def _enough(scores: NDArray[np.float64], kind: str) -> None:
    if len(scores) < FEWEST_SCORES:
        raise TrainingError(f"{len(scores)} {kind} part scored unseen, need at least {FEWEST_SCORES}: add images")
    if not np.isfinite(scores).all():
        raise TrainingError(f"a {kind} part's score is not a finite number: check the images")


RULES: dict[str, Callable[[NDArray[np.float64], NDArray[np.float64]], float]] = {
    "normal_intersection": normal_intersection,
    "best_f1": best_f1,
}
