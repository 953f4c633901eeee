"""What the report draws: score rows, ranking curves and pictures, as plain numbers and data URIs for the template.

Places are per cent of a plot's width or height, so that the page can stretch a plot without stretching its text.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

from calibration.chart import round_numbers
from calibration.heatmap import overlay, scale_bar
from trainer.metrics import Evaluation, ScoredImage, ranks

BINS = 56  # over the width of the score chart; one of their edges is the threshold
FULL_ROW = 4  # parts in a bin from which on the fullest bin of a row takes its whole height
LEAST_BAR = 7.0  # per cent of a row's height, so that a single part stays visible beside hundreds
LOGARITHMIC_ABOVE = 30.0  # highest score / median score from which on a linear axis would hide the good parts
ENLARGED_SIDE_PX = 320  # a tiny picture is enlarged up to here
PHOTO_QUALITY = 85  # JPEG
MASK_OUTLINE = ((0, 0, 0), (0, 229, 255))  # RGB of the outer and of the inner line: seen on any ground, never heat


@dataclass(frozen=True, slots=True)
class Tick:
    """A number on an axis."""

    place: float
    text: str


@dataclass(frozen=True, slots=True)
class Bar:
    """One bin of a histogram, standing on the row's floor."""

    left: float
    width: float
    height: float


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """The scores of one group of parts."""

    label: str
    n: int
    n_above: int  # scores above the threshold
    bars: tuple[Bar, ...]


@dataclass(frozen=True, slots=True)
class ScoreChart:
    """All groups over one axis of scores."""

    rows: tuple[ScoreRow, ...]
    ticks: tuple[Tick, ...]
    threshold: float  # place
    logarithmic: bool


@dataclass(frozen=True, slots=True)
class Curve:
    """A curve in a unit square and the point where the recipe works."""

    path: str  # SVG path; y counts downwards
    point: tuple[float, float] | None  # from the left, from the bottom


def score_chart(groups: Mapping[str, NDArray[np.float64]], threshold: float) -> ScoreChart:
    """Return the histogram of each group of scores, (n,) each; every row has its own height.

    A bar lies wholly on one side of the threshold; a score equal to it is counted on the passing side.
    """
    scores = np.concatenate([*groups.values(), [threshold]])
    logarithmic = bool(scores.min() > 0 and scores.max() > LOGARITHMIC_ABOVE * np.median(scores))
    to_axis = np.log10 if logarithmic else np.asarray
    low, high = (float(v) for v in (to_axis(scores.min()), to_axis(scores.max())))
    margin = 0.03 * (high - low) or 0.1 * max(1.0, abs(high))
    low, high = low - margin, high + margin
    width, zero = (high - low) / BINS, float(to_axis(threshold))
    rows = []
    for label, group in groups.items():
        above = group > threshold
        bins = np.ceil((to_axis(group) - zero) / width).astype(int) - 1  # bin 0 starts at the threshold
        bins = np.where(above, np.maximum(bins, 0), np.minimum(bins, -1))
        bars = _bars(bins, 100 * (zero - low) / (high - low), 100 / BINS)
        rows.append(ScoreRow(label, len(group), int(np.sum(above)), bars))
    values = _decades(low, high) if logarithmic else round_numbers(low, high)
    ticks = tuple(Tick(_place(float(to_axis(value)), low, high), f"{value:.10g}") for value in values)
    return ScoreChart(tuple(rows), ticks, _place(zero, low, high), logarithmic)


def _bars(bins: NDArray[np.int_], origin: float, width: float) -> tuple[Bar, ...]:
    filled, counts = np.unique(bins, return_counts=True)
    heights = np.maximum(LEAST_BAR, 100 * counts / max(FULL_ROW, counts.max(initial=0)))
    return tuple(
        Bar(round(origin + width * int(place), 2), round(width, 2), round(float(height), 1))
        for place, height in zip(filled, heights, strict=True)
    )


def _place(value: float, low: float, high: float) -> float:
    return round(100 * (value - low) / (high - low), 2)


def _decades(low: float, high: float) -> list[float]:
    """Return powers of ten between 10**low and 10**high, thinned to seven; with 2 and 5 times where there are few."""
    factors = (1, 2, 5) if high - low < 2.5 else (1,)
    exponents = range(math.floor(low), math.ceil(high) + 1)
    exponents = exponents[:: max(1, math.ceil((high - low) / 7))]
    return [factor * 10.0**e for e in exponents for factor in factors if low <= math.log10(factor) + e <= high]


def ranking_curves(images: Sequence[ScoredImage], evaluation: Evaluation) -> tuple[Curve, Curve] | None:
    """Return the ROC and the precision-recall curve with the threshold's point; None where one class is missing."""
    if evaluation.auroc is None:
        return None
    truth, order = [image.defective for image in images], ranks(images)
    false_rate, true_rate, _ = roc_curve(truth, order)
    precision, recall, _ = precision_recall_curve(truth, order)
    roc = Curve(_path(false_rate, true_rate), _point(evaluation.overkill, evaluation.recall))
    return roc, Curve(_path(recall[:-1], precision[:-1]), _point(evaluation.recall, evaluation.precision))


def _path(x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
    points = dict.fromkeys(f"{100 * a:.5g} {100 - 100 * b:.5g}" for a, b in zip(x, y, strict=True))
    return "M" + "L".join(points)


def _point(x: float | None, y: float | None) -> tuple[float, float] | None:
    return None if x is None or y is None else (round(100 * x, 2), round(100 * y, 2))


def photo_panels(image: ScoredImage, map_threshold: float, side_px: int) -> tuple[str, str]:
    """Return the part as the detector saw it, and with map and true outline over it, as data URIs.

    The longer side is at most side_px. Both are empty where no view was kept, the second where there is no map.
    """
    if image.view is None:
        return "", ""
    view = _fitted(np.clip(image.view, 0.0, 1.0).astype(np.float32), side_px)
    photo = np.rint(view * 255).astype(np.uint8)
    if image.anomaly_map is None:
        return jpeg_uri(photo), ""
    anomaly_map = np.asarray(image.anomaly_map, dtype=np.float32)
    return jpeg_uri(photo), jpeg_uri(_outlined(overlay(photo, anomaly_map, map_threshold), image.mask))


def _fitted(view: NDArray[np.float32], side_px: int) -> NDArray[np.float32]:
    """Return the picture shrunk to the side; a small one is enlarged by a whole factor, to keep outlines thin."""
    height, width = view.shape[:2]
    ratio = side_px / max(height, width)
    if ratio >= 1:
        factor = max(1, min(side_px, ENLARGED_SIDE_PX) // max(height, width))
        return cv2.resize(view, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC).clip(0, 1)
    size = max(1, round(width * ratio)), max(1, round(height * ratio))
    return cv2.resize(view, size, interpolation=cv2.INTER_AREA)


def _outlined(picture: NDArray[np.uint8], mask: NDArray[np.bool_] | None) -> NDArray[np.uint8]:
    """Return the picture with a line just outside the true defect, so that the line does not hide it."""
    if mask is None or not mask.any():
        return picture
    height, width = picture.shape[:2]
    touched = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA) > 0.0
    discs = [cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size)) for size in (5, 11, 13)]
    gap, line, shadow = (cv2.dilate(touched.astype(np.uint8), disc) > 0 for disc in discs)
    drawn = picture.copy()
    drawn[shadow & ~line] = MASK_OUTLINE[0]
    drawn[line & ~gap] = MASK_OUTLINE[1]
    return drawn


def jpeg_uri(picture: NDArray[np.uint8]) -> str:
    """Return (H, W) gray or (H, W, 3) RGB as a JPEG data URI."""
    return _uri("jpeg", picture, [cv2.IMWRITE_JPEG_QUALITY, PHOTO_QUALITY])


def scale_bar_uri() -> str:
    """Return the legend of the map's colours as a PNG data URI: zero at the left, twice the threshold at the right."""
    return _uri("png", scale_bar(256, 1), [])


def _uri(kind: str, picture: NDArray[np.uint8], options: list[int]) -> str:
    _, data = cv2.imencode(f".{kind}", picture if picture.ndim == 2 else picture[:, :, ::-1], options)
    return f"data:image/{kind};base64,{base64.b64encode(data.tobytes()).decode('ascii')}"
