"""One self-contained HTML page that shows a line engineer what a recipe does to parts, and which parts to look at."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv

from calibration.chart import number
from calibration.errors import InputError
from trainer.figures import ranking_curves, scale_bar_uri, score_chart
from trainer.galleries import evaluation_galleries, first_looks
from trainer.metrics import GOOD, Evaluation, ScoredImage, check_finite
from trainer.report_reconstruction import Insight

CONFIDENCE = 0.95
MOST_LISTED = 40  # rows of the table of parts without a verdict
SALIENT = ("cnn", "vgg16", "siamese")  # their maps show what speaks for a defect, not how far a place is from good ones


@dataclass(frozen=True, slots=True)
class ReportFacts:
    """What the header says about the recipe; the same inputs give the same bytes, so put no dates here."""

    product: str
    detector: str
    facts: Mapping[str, str]  # label -> value: image size, backbone, registration, good parts, seed, parity, ...
    notes: Sequence[str] = ()  # warnings for the reader
    decided: Sequence[str] = ()  # what the training chose by itself: no warnings


@dataclass(frozen=True, slots=True)
class Tile:
    """One big number and what it rests on."""

    label: str
    value: str
    basis: str
    caution: str = ""


def write_report(
    path: Path,
    facts: ReportFacts,
    evaluation: Evaluation | None,
    images: Sequence[ScoredImage],
    *,
    threshold: float,
    map_threshold: float,
    good_scores: NDArray[np.float64],
) -> None:
    """Write the report to path; arguments as in `render_report`.

    Raises InputError if a threshold cannot be drawn or the file cannot be written.
    """
    page = render_report(
        facts, evaluation, images, threshold=threshold, map_threshold=map_threshold, good_scores=good_scores
    )
    try:
        path.write_text(page, encoding="utf-8", newline="\n")
    except OSError as error:
        raise InputError(f"{path}: report not written ({error.strerror}): check that the folder exists") from error


def render_report(
    facts: ReportFacts,
    evaluation: Evaluation | None,
    images: Sequence[ScoredImage],
    *,
    threshold: float,
    map_threshold: float,
    good_scores: NDArray[np.float64],
    inside: Insight | None = None,
    suspects: Sequence[ScoredImage] = (),
) -> str:
    """Return the report as one HTML page without scripts or outside references; the same inputs give the same text.

    evaluation: of these images at this threshold; None where there are good parts only.
    map_threshold: map value drawn in yellow, above 0. good_scores: (n,) of the calibration parts, may be empty.
    inside: what there is to show of the detector itself; None: nothing. suspects: good images that were left out.

    Raises InputError if a threshold, a score or a map is not finite.
    """
    _check(images, threshold, map_threshold, good_scores)
    galleries = first_looks if evaluation is None else evaluation_galleries
    silent = [image for image in images if image.score is None]
    return _template().render(
        facts=facts,
        verdict=_good_only_verdict(images, good_scores, threshold) if evaluation is None else verdict(evaluation),
        remark=_remark(evaluation, len(silent)),
        tiles=() if evaluation is None else _tiles(evaluation),
        evaluation=evaluation,
        threshold=number(threshold),
        chart=score_chart(_score_groups(evaluation, images, good_scores), threshold),
        curves=None if evaluation is None else ranking_curves(images, evaluation),
        further=() if evaluation is None else _further_figures(evaluation),
        galleries=galleries(images, threshold, map_threshold, suspects),
        scale_bar=scale_bar_uri(),
        n_caught=0 if evaluation is None else evaluation.n_defective - _n_escaped(evaluation),
        silent=silent[:MOST_LISTED],
        n_silent=len(silent),
        silent_in_row=Counter(_row_of(image.label) for image in silent),
        inside=inside or Insight(),
        salient=facts.detector.rpartition("+")[2] in SALIENT,
        percent=percent,
        figure=figure,
    )


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html")


def _check(
    images: Sequence[ScoredImage], threshold: float, map_threshold: float, good_scores: NDArray[np.float64]
) -> None:
    if not math.isfinite(threshold):
        raise InputError(f"threshold is {threshold}, want a finite number: calibrate the recipe again")
    if not (math.isfinite(map_threshold) and map_threshold > 0):
        raise InputError(f"map threshold is {map_threshold}, want a number above 0: calibrate the recipe again")
    if not np.isfinite(good_scores).all():
        raise InputError("a score of a good part is not a finite number: check the detector's export")
    check_finite(images)


# ---- words and numbers -----------------------------------------------------------------------------------------------


def verdict(evaluation: Evaluation) -> str:
    """Return in one sentence what the recipe would have done to the tested parts."""
    clauses = []
    if evaluation.n_defective:
        defective, escaped = _parts(evaluation.n_defective, "defective"), _n_escaped(evaluation)
        caught = f"all {defective} were caught" if evaluation.n_defective > 1 else "the only defective part was caught"
        clauses.append(f"{escaped} of {defective} would have been passed" if escaped else caught)
    if evaluation.n_good:
        clauses.append(f"{_n_overkill(evaluation) or 'none'} of {_parts(evaluation.n_good, 'good')} rejected")
    return _capital(", ".join(clauses)) + "."


def _good_only_verdict(images: Sequence[ScoredImage], good_scores: NDArray[np.float64], threshold: float) -> str:
    scores = good_scores if len(good_scores) else [image.score for image in images if image.score is not None]
    above = sum(score > threshold for score in scores)
    return (
        f"Learned from good parts, not yet tested on a defective one. {above or 'None'} of "
        f"{len(scores)} good image{'' if len(scores) == 1 else 's'} would have been rejected."
    )


def _remark(evaluation: Evaluation | None, n_silent: int) -> str:
    """Return how the parts without a verdict were counted; empty where there are none."""
    if not n_silent:
        return ""
    counted = "not counted here" if evaluation is None else "counted as rejected, because the line diverts them too"
    return f"{_parts(n_silent)} without a verdict: {counted}."


def _parts(n: int, kind: str = "") -> str:
    return f"{n} {kind} part{'' if n == 1 else 's'}".replace("  ", " ")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _n_overkill(evaluation: Evaluation) -> int:
    return round((evaluation.overkill or 0.0) * evaluation.n_good)


def _n_escaped(evaluation: Evaluation) -> int:
    return round((evaluation.escape or 0.0) * evaluation.n_defective)


def _tiles(evaluation: Evaluation) -> tuple[Tile, ...]:
    escaped, overkill = _n_escaped(evaluation), _n_overkill(evaluation)
    n = evaluation.n_good + evaluation.n_defective
    return (
        Tile(
            "Escape",
            percent(evaluation.escape),
            _basis(escaped, evaluation.n_defective, "defective", "passed"),
            _upper_bound(escaped, evaluation.n_defective),
        ),
        Tile(
            "Overkill",
            percent(evaluation.overkill),
            _basis(overkill, evaluation.n_good, "good", "rejected"),
            _upper_bound(overkill, evaluation.n_good),
        ),
        Tile(
            "AUROC",
            figure(evaluation.auroc),
            _parts(n, "tested"),
            "1: every defective part scores above every good one. 0.5: no better than chance.",
        ),
    )


def _basis(count: int, n: int, kind: str, fate: str) -> str:
    return f"{count} of {_parts(n, kind)} {fate}" if n else f"no {kind} parts tested"


def _upper_bound(count: int, n: int) -> str:
    """Say how high the true share may be: one-sided Clopper-Pearson bound."""
    if n == 0:
        return ""
    bound = 1.0 if count == n else float(betaincinv(count + 1, n - count, CONFIDENCE))
    return f"With {n} tested, the true share may be up to {percent(bound)} (95 % confidence)."


def _further_figures(evaluation: Evaluation) -> tuple[tuple[str, str, str], ...]:
    """Return label, value and meaning of the figures that papers compare."""
    best = "no score to draw a line at"
    if evaluation.best_f1_threshold is not None:
        best = f"at {number(evaluation.best_f1_threshold)}, chosen with labels: for comparison, not for production"
    return (
        ("Average precision", figure(evaluation.average_precision), "area under the precision-recall curve"),
        ("F1 at the threshold", figure(evaluation.f1), "precision and recall in one number"),
        ("Best F1", figure(evaluation.best_f1), best),
        ("Pixel AUROC", figure(evaluation.pixel_auroc), "how well the map marks the defect, pixel by pixel"),
        ("AU-PRO", figure(evaluation.au_pro), "the same, every defect weighing alike, to 0.3 false positives"),
    )


def percent(share: float | None) -> str:
    """Return a share 0..1 as per cent with one decimal, a tiny one with one digit, never rounded to 0 % or 100 %."""
    if share is None:
        return "—"
    if share in (0.0, 1.0):
        return f"{share:.0%}".replace("%", " %")
    text = f"{100 * share:.1f}" if share >= 0.001 else f"{100 * share:.1g}"
    return ("> 99.9" if text == "100.0" else text) + " %"


def figure(value: float | None) -> str:
    """Return a figure of merit 0..1 with four digits, never rounded to 1."""
    if value is None:
        return "—"
    return "> 0.9999" if 0.99995 <= value < 1.0 else f"{value:.4f}"


# ---- score chart -----------------------------------------------------------------------------------------------------


def _row_of(label: str) -> str:
    return "good, test" if label == GOOD else label


def _score_groups(
    evaluation: Evaluation | None, images: Sequence[ScoredImage], good_scores: NDArray[np.float64]
) -> dict[str, NDArray[np.float64]]:
    """Return the scores of each row of the chart, empty groups left out."""
    groups = {"good, calibration": np.asarray(good_scores, dtype=np.float64)}
    if evaluation is not None or not len(good_scores):
        for label in [GOOD, *sorted({image.label for image in images} - {GOOD})]:
            scores = [image.score for image in images if image.label == label and image.score is not None]
            groups[_row_of(label)] = np.array(scores, dtype=np.float64)
    return {label: scores for label, scores in groups.items() if len(scores)}
