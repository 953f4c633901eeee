"""How well a detector separates good parts from defective ones: per part, per defect type and per pixel.

One rule everywhere: a part is rejected when its score lies strictly above the threshold. A part without a verdict is
diverted from the line like a reject, so it is never counted as passed, and in every ranking it stands above all scores.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score

from calibration.errors import InputError
from calibration.frame import reflectance
from trainer.data import types_of

GOOD = "good"  # the label of a part without a defect; every other label is the name of a defect type
MAX_BINS = 1 << 22  # bins of the pixel histograms: 96 MB in all, at least 13 bits of mantissa kept apart

Outcome = Literal["pass", "reject", "no_verdict"]


@dataclass(frozen=True, slots=True)
class ScoredImage:
    """One part, what is true of it and what the detector said; the last three only where somebody will look at them."""

    name: str  # such as "test/crack/017.png"
    label: str  # "good" or the defect type's folder name; "crack+stain" has both
    score: float | None  # None: no verdict (not registered, unreadable)
    reason: str = ""  # why there is no verdict, or why the image counts for nothing
    anomaly_map: NDArray[np.float32] | None = None  # (h, w)
    mask: NDArray[np.bool_] | None = None  # (h, w) true defect in the map's view, any size; None: unknown
    picture: NDArray[np.float32] | NDArray[np.uint8] | None = None  # (h, w) or (h, w, 3) that the detector saw

    @property
    def view(self) -> NDArray[np.float32] | None:
        """The picture in reflectance 0..1; one of bytes, a quarter of the memory, is of an 8-bit camera."""
        if self.picture is None or self.picture.dtype == np.float32:
            return self.picture
        return reflectance(self.picture, 8)

    @property
    def defective(self) -> bool:
        """Whether the part has a defect in truth."""
        return self.label != GOOD

    def outcome(self, threshold: float) -> Outcome:
        """Return what the line is told about this part."""
        if self.score is None:
            return "no_verdict"
        return "reject" if self.score > threshold else "pass"


@dataclass(frozen=True, slots=True)
class DefectFigures:
    """How one defect type fares at the threshold, against all good parts."""

    n: int
    detected: int  # rejected or without a verdict: it did not reach the customer
    recall: float  # detected / n
    precision: float | None  # detected / (detected + all good parts diverted); None where neither happened
    auroc: float | None  # this type against all good parts; None without good parts


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Everything that a table about one detector needs. A figure is None where the images cannot define it.

    Parts without a verdict count as diverted: a good one is overkill, a defective one is detected, and in auroc,
    average_precision and best_f1 they rank above every score.
    """

    n_good: int
    n_defective: int
    n_no_verdict_good: int
    n_no_verdict_defective: int
    auroc: float | None
    average_precision: float | None
    best_f1: float | None  # at the threshold that labels would choose: for tables, not for production
    best_f1_threshold: float | None  # reject strictly above it; None where no part has a score
    pixel_auroc: float | None
    au_pro: float | None  # up to a false positive rate of 0.3, normalised to 0..1
    threshold: float
    overkill: float | None  # share of the good parts diverted at the threshold
    escape: float | None  # share of the defective parts passed at the threshold
    precision: float | None  # at the threshold, like the next two
    recall: float | None
    f1: float | None
    by_defect: Mapping[str, DefectFigures]  # by the name of the type, in order of name

    def as_dict(self) -> dict[str, Any]:
        """Return the same facts as plain JSON values."""
        return {
            **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
            "by_defect": {defect: dataclasses.asdict(figures) for defect, figures in self.by_defect.items()},
        }


def evaluate(images: Sequence[ScoredImage], threshold: float) -> Evaluation:
    """Return the figures of a detector on these images at the recipe's threshold.

    Raises InputError if there are no images, or a score, map or threshold is not a finite number.
    """
    _check(images, threshold)
    defective = np.array([image.defective for image in images])
    diverted = np.array([image.outcome(threshold) != "pass" for image in images])
    no_verdict = np.array([image.score is None for image in images])
    auroc, average_precision, best_f1, best_f1_threshold = _ranking_figures(images, defective)
    pixel, pro = _pixel_figures(images)
    precision, recall, f1 = _figures_at_threshold(defective, diverted)
    return Evaluation(
        n_good=int(np.sum(~defective)),
        n_defective=int(np.sum(defective)),
        n_no_verdict_good=int(np.sum(no_verdict & ~defective)),
        n_no_verdict_defective=int(np.sum(no_verdict & defective)),
        auroc=auroc,
        average_precision=average_precision,
        best_f1=best_f1,
        best_f1_threshold=best_f1_threshold,
        pixel_auroc=pixel,
        au_pro=pro,
        threshold=float(threshold),
        overkill=_share(diverted[~defective]),
        escape=_share(~diverted[defective]),
        precision=precision,
        recall=recall,
        f1=f1,
        by_defect=_by_defect(images, diverted),
    )


def ranks(images: Sequence[ScoredImage]) -> NDArray[np.float64]:
    """Return (n,) numbers that order the parts as their scores do, with the parts without a verdict on top."""
    scores = [math.inf if image.score is None else float(image.score) for image in images]
    return np.unique(scores, return_inverse=True)[1].astype(np.float64)


def _check(images: Sequence[ScoredImage], threshold: float) -> None:
    if not images:
        raise InputError("no images to evaluate: give a folder with test parts")
    if not math.isfinite(threshold):
        raise InputError(f"threshold is {threshold}, want a finite number: calibrate the recipe again")
    check_finite(images)


def check_finite(images: Sequence[ScoredImage]) -> None:
    """Raise InputError with the image's name if a score or a map holds a value that is not finite."""
    for image in images:
        if image.score is not None and not math.isfinite(image.score):
            raise InputError(f"{image.name}: score is {image.score}, want a finite number: check the detector's export")
        if image.anomaly_map is not None and not np.isfinite(image.anomaly_map).all():
            raise InputError(f"{image.name}: anomaly map has values that are not finite: check the detector's export")


def _share(flags: NDArray[np.bool_]) -> float | None:
    return float(np.mean(flags)) if flags.size else None


def _ratio(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def _figures_at_threshold(
    defective: NDArray[np.bool_], diverted: NDArray[np.bool_]
) -> tuple[float | None, float | None, float | None]:
    """Return precision, recall and F1 of "diverted" as a guess at "defective"; all None without a defective part."""
    if not defective.any():
        return None, None, None
    found = int(np.sum(defective & diverted))
    n_defective, n_diverted = int(np.sum(defective)), int(np.sum(diverted))
    return _ratio(found, n_diverted), _ratio(found, n_defective), _ratio(2 * found, n_defective + n_diverted)


def _ranking_figures(
    images: Sequence[ScoredImage], defective: NDArray[np.bool_]
) -> tuple[float | None, float | None, float | None, float | None]:
    """Return AUROC, average precision, the best F1 and its threshold; all None where one class is missing."""
    if defective.all() or not defective.any():
        return None, None, None, None
    order = ranks(images)
    auroc = float(roc_auc_score(defective, order))
    average_precision = float(average_precision_score(defective, order))
    precision, recall, lowest_rejected = precision_recall_curve(defective, order)
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)
    best = int(np.argmax(f1[:-1]))  # the last point of the curve has no threshold
    return auroc, average_precision, float(f1[best]), _threshold_below(images, int(lowest_rejected[best]))


def _threshold_below(images: Sequence[ScoredImage], lowest_rejected_rank: int) -> float | None:
    """Return the threshold that rejects this rank and all above: half-way to the next lower score."""
    scores = np.unique([image.score for image in images if image.score is not None])
    if scores.size == 0:
        return None
    if lowest_rejected_rank == 0:
        return float(np.nextafter(scores[0], -np.inf))
    passed = float(scores[lowest_rejected_rank - 1])
    if lowest_rejected_rank == scores.size:  # only the parts without a verdict are diverted
        return passed
    rejected = float(scores[lowest_rejected_rank])
    middle = passed / 2 + rejected / 2
    return middle if passed <= middle < rejected else passed


def _by_defect(images: Sequence[ScoredImage], diverted: NDArray[np.bool_]) -> dict[str, DefectFigures]:
    kinds = [() if image.label == GOOD else types_of(image.label) for image in images]
    order, good = ranks(images), np.array([image.label == GOOD for image in images])
    figures = {}
    for defect in sorted({kind for several in kinds for kind in several}):
        this = np.array([defect in several for several in kinds])  # a part with several defects counts for each
        n, detected = int(np.sum(this)), int(np.sum(diverted[this]))
        figures[defect] = DefectFigures(
            n=n,
            detected=detected,
            recall=detected / n,
            precision=_ratio(detected, detected + int(np.sum(diverted[good]))),
            auroc=float(roc_auc_score(this[this | good], order[this | good])) if good.any() else None,
        )
    return figures


def _pixel_figures(images: Sequence[ScoredImage]) -> tuple[float | None, float | None]:
    """Return pixel AUROC and AU-PRO over all images with a map and a known mask; None where no mask shows a defect.

    A good part without a mask gets an empty one, of the size of the first known mask.
    """
    known = [image.mask for image in images if image.anomaly_map is not None and image.mask is not None]
    if not any(mask.any() for mask in known):
        return None, None
    empty = np.zeros_like(known[0])
    maps, masks = [], []
    for image in images:
        if image.anomaly_map is not None and (image.mask is not None or not image.defective):
            maps.append(image.anomaly_map)
            masks.append(empty if image.mask is None else image.mask)
    if all(mask.all() for mask in masks):
        return None, None
    tally = _tally(maps, masks)
    return _pixel_auroc(tally), _au_pro(tally, 0.3)


def pixel_auroc(maps: Sequence[NDArray[np.float32]], masks: Sequence[NDArray[np.bool_]]) -> float:
    """Return the area under the ROC curve over all pixels of all images together.

    maps: (h, w) each, resized (linear) to its mask. masks: (H, W) each, True on the defect.

    Raises InputError if the masks hold only one class, or their number differs from that of the maps.
    """
    return _pixel_auroc(_tally(maps, masks))


def au_pro(
    maps: Sequence[NDArray[np.float32]], masks: Sequence[NDArray[np.bool_]], max_false_positive_rate: float = 0.3
) -> float:
    """Return the area under the per-region overlap curve up to a false positive rate, normalised to 0..1.

    maps, masks: as in `pixel_auroc`. A region is an 8-connected component of a mask; all regions weigh the same.
    max_false_positive_rate: share of the defect-free pixels, in (0, 1].

    Raises InputError as `pixel_auroc` does.
    Source: Bergmann et al. 2021, IJCV 129, 1038-1059, sec. 4.1.
    """
    return _au_pro(_tally(maps, masks), max_false_positive_rate)


@dataclass(frozen=True, slots=True)
class _PixelTally:
    """Histograms of pixels over the map's value, (bins,) each, from the highest value to the lowest."""

    free: NDArray[np.int64]  # pixels without a defect
    defect: NDArray[np.int64]  # pixels of a defect
    overlap: NDArray[np.float64]  # pixels of a defect, each weighing 1 / (pixels of its region * number of regions)


def _tally(maps: Sequence[NDArray[np.float32]], masks: Sequence[NDArray[np.bool_]]) -> _PixelTally:
    """Sort all pixels into bins of the map's value.

    A bin holds one float32 value, or where the values span too many of them, neighbours that share the leading bits:
    they then count as ties. One image at a time is in memory beside the bins.
    """
    if len(maps) != len(masks) or not maps:
        raise InputError(f"{len(maps)} anomaly maps for {len(masks)} masks, want one map for each mask")
    lowest = min(int(_keys(anomaly_map).min()) for anomaly_map in maps)
    highest = max(int(_keys(anomaly_map).max()) for anomaly_map in maps)
    shift = max(0, (highest - lowest).bit_length() - MAX_BINS.bit_length() + 1)
    bins = ((highest - lowest) >> shift) + 1
    free, defect = np.zeros(bins, np.int64), np.zeros(bins, np.int64)
    overlap, n_regions = np.zeros(bins, np.float64), 0
    for values, regions in _pixels(maps, masks):
        place = (highest - np.clip(_keys(values), lowest, highest)) >> shift
        inside = regions > 0
        np.add.at(free, place[~inside], 1)
        np.add.at(defect, place[inside], 1)
        areas = np.bincount(regions.ravel())
        np.add.at(overlap, place[inside], 1.0 / areas[regions[inside]])
        n_regions += areas.size - 1
    if n_regions == 0 or not free.any():
        raise InputError("the masks hold only one class of pixels, want defects and what surrounds them: check masks")
    return _PixelTally(free, defect, overlap / n_regions)


def _pixels(
    maps: Sequence[NDArray[np.float32]], masks: Sequence[NDArray[np.bool_]]
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int32]]]:
    """Yield (H, W) map values and (H, W) region numbers, 0 outside every region, one image at a time."""
    for anomaly_map, mask in zip(maps, masks, strict=True):
        values = np.asarray(anomaly_map, dtype=np.float32)
        if values.shape != mask.shape:
            values = cv2.resize(values, mask.shape[::-1], interpolation=cv2.INTER_LINEAR)
        yield values, cv2.connectedComponents(np.ascontiguousarray(mask, dtype=np.uint8), connectivity=8)[1]


def _keys(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return integers in the order of the values: the bits of a float32, negative numbers mirrored."""
    bits = (np.asarray(values, dtype=np.float32) + np.float32(0)).view(np.int32).astype(np.int64)  # -0.0 becomes 0.0
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _pixel_auroc(tally: _PixelTally) -> float:
    free_rate, defect_rate = _rates(tally.free), _rates(tally.defect)
    return float(auc(free_rate, defect_rate))


def _au_pro(tally: _PixelTally, max_false_positive_rate: float) -> float:
    free_rate, overlap = _rates(tally.free), _rates(tally.overlap)
    inside = free_rate <= max_false_positive_rate
    last = np.interp(max_false_positive_rate, free_rate, overlap)
    area = auc(np.append(free_rate[inside], max_false_positive_rate), np.append(overlap[inside], last))
    return float(area / max_false_positive_rate)


def _rates(counts: NDArray[np.int64] | NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the share of the total at or above each bin, (bins + 1,), from 0 to 1."""
    shares = np.concatenate([[0.0], np.cumsum(counts, dtype=np.float64)])
    return shares / shares[-1]
