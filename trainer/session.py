"""What the trainer's commands do, once their options are read: work, tables, files."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from calibration.console import console, note, progress_bars, say
from calibration.errors import InputError, RecipeError, TaktsightError
from calibration.recipe import Recipe, check_product, read_recipe, write_recipe
from calibration.thresholds import bound_told
from trainer.alone import alone, lock_of
from trainer.data import Dataset, Pictures, read_dataset
from trainer.evaluate import held_out_images, left_out_images, scored_images
from trainer.fit import FitRequest, FitResult, fit
from trainer.limits import HELD_OUT
from trainer.metrics import Evaluation, ScoredImage, evaluate
from trainer.report import ReportFacts, render_report
from trainer.report_reconstruction import Insight, insight
from trainer.training import checkpoint_of, forget


def learn(
    data: Path, request: FitRequest, *, part_pattern: str | None, bit_depth: int | None, product: str | None
) -> None:
    """Read data, fit, and write recipe and report; tables and notes go to the terminal.

    product: name of the product; None takes the folder's. Raises InputError before any image is read where the recipe
    cannot be written there or be of such a product.
    """
    check_place(request.recipe)
    dataset = read_dataset(data, part_pattern=part_pattern, bit_depth=bit_depth)
    if product is not None:
        dataset = replace(dataset, product=product)
    check_product(dataset.product)
    started_s = time.monotonic()
    with alone(
        lock_of(request.recipe), f"another fit makes {request.recipe}", "wait for its end, or give another file"
    ):
        try:
            with progress_bars() as progress:
                result = fit(dataset, replace(request, keep_checkpoint=True), progress)
        except KeyboardInterrupt:
            if checkpoint_of(request.recipe).exists():
                note(f"{checkpoint_of(request.recipe)} holds what was trained so far: go on with --resume")
            raise
        _finish(result, dataset, request, time.monotonic() - started_s)


def check_place(recipe: Path) -> None:
    """Raise InputError unless a recipe can be written there."""
    if not recipe.parent.is_dir():
        raise InputError(f"{recipe.parent}: not a folder: make it, or give another path for the recipe")
    if recipe.is_dir():
        raise InputError(f"{recipe}: a folder, need a file's path for the recipe: {recipe}/NAME.recipe")
    try:
        with tempfile.TemporaryFile(dir=recipe.parent):
            pass
    except OSError as error:
        raise InputError(f"{recipe.parent}: {error.strerror}: give a folder that can be written") from error


def measure(recipe: Path, data: Path, *, json_file: Path | None, report: Path | None, bit_depth: int | None) -> None:
    """Measure a recipe on the test images of data; figures go to the terminal, json_file and report."""
    loaded = read_recipe(recipe)
    trained_on = loaded.view.bit_depth
    dataset = read_dataset(data, bit_depth=bit_depth or (trained_on if trained_on > 8 else None))
    if not dataset.test:
        raise InputError(f"{data}: no test images found: need folders test/good and test/DEFECT")
    images, evaluation = _evaluated(loaded, dataset)
    _print_evaluation(evaluation)
    if json_file is not None:
        write_text(json_file, json.dumps({"recipe": loaded.digest, **evaluation.as_dict()}, indent=1) + "\n")
    if report is not None:
        good = loaded.metrics.get("good_scores", []) if of_the_fit(loaded) else []
        inside = insight(None, images, loaded.thresholds.score)
        write_text(report, _report(loaded, evaluation, images, good, (), inside=inside))
        say(f"report: {report}")


def write_text(path: Path, text: str) -> None:
    """Write a file for people. Raises InputError if it cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: give a file that can be written") from error


def _finish(result: FitResult, dataset: Dataset, request: FitRequest, fit_s: float) -> None:
    """Write the recipe, measure where there are test images, write it again with figures and report, and tell.

    A test image that cannot be read must not cost the training.
    """
    learnt = replace(result.recipe, metrics=_metrics(result, None))
    write_recipe(request.recipe, learnt)
    forget(checkpoint_of(request.recipe))
    evaluation, failure = None, None
    images = held_out_images(result)
    if dataset.test:
        try:
            images, evaluation = _evaluated(learnt, dataset)
        except TaktsightError as error:
            failure = error
    page = _report(
        learnt,
        evaluation,
        images,
        result.good_scores.tolist(),
        result.notes,
        parity=str(result.parity),
        inside=insight(result.module, images, learnt.thresholds.score),
        suspects=left_out_images(result),
    )
    recipe = replace(learnt, metrics=_metrics(result, evaluation), report=page)
    digest = write_recipe(request.recipe, recipe)
    report_file = request.recipe.with_name(f"{request.recipe.name}.html")
    write_text(report_file, recipe.report)
    for text in result.notes:
        note(text)
    _print_recipe(recipe, digest, result, request, fit_s)
    if evaluation is not None:
        _print_evaluation(evaluation)
    say(f"report: {report_file}")
    if failure is not None:
        note(f"{request.recipe} is written, without figures of the test images: mend them, then evaluate")
        raise failure


def _metrics(result: FitResult, evaluation: Evaluation | None) -> dict[str, Any]:
    return {
        "good_scores": result.good_scores.tolist(),
        "reported_threshold": result.recipe.thresholds.score,
        "parity": {"score": result.parity.worst_score, "map": result.parity.worst_peak},
        "evaluation": None if evaluation is None else evaluation.as_dict(),
    }


def taken_out(recipe: Path, out: Path) -> None:
    """Write the report that a recipe holds; a note says where it shows another threshold than the recipe has now.

    Raises RecipeError if it holds none, as after a fit that was interrupted while it measured.
    """
    loaded = read_recipe(recipe)
    if not loaded.report:
        raise RecipeError(f"{recipe}: holds no report: make one with taktsight-trainer evaluate --report")
    write_text(out, loaded.report)
    shown, limit = loaded.metrics.get("reported_threshold"), loaded.thresholds.score
    if shown is not None and shown != limit:
        note(
            f"the report was made with the threshold {shown:.4g}, the recipe's is now {limit:.4g}: overkill and escape "
            "in it are of the former; taktsight-trainer evaluate --report makes one of today's"
        )
    say(f"report: {out}")


def _evaluated(recipe: Recipe, dataset: Dataset) -> tuple[list[ScoredImage], Evaluation]:
    with progress_bars() as progress:
        images = scored_images(recipe, dataset.test, Pictures(dataset.photometric), progress)
    return images, evaluate(images, recipe.thresholds.score)


def _report(
    recipe: Recipe,
    evaluation: Evaluation | None,
    images: Sequence[ScoredImage],
    good_scores: Sequence[float],
    notes: Sequence[str],
    *,
    inside: Insight,
    parity: str = "",
    suspects: Sequence[ScoredImage] = (),
) -> str:
    limits = recipe.thresholds
    view = recipe.view
    facts = {
        "good images": str(recipe.training.get("good_images", "?")),
        "detector input": f"{view.width}x{view.height} px, {'colour' if view.colour else 'gray'}",
        "registration": str(recipe.training.get("registration", "?")),
        "false reject rate": f"{rate_told(recipe)} (n = {limits.n_good})",
        "thresholds fitted on": limits.fitted_on,
    }
    noticed = recipe.training.get("condition_noticed")
    if noticed:
        facts["light and focus"] = "noticed: " + ", ".join(f"{name} {share:.0%}" for name, share in noticed.items())
    defects = recipe.training.get("defects") or {}
    if defects:
        facts["labelled defects"] = ", ".join(f"{kind} {n}" for kind, n in defects.items())
    learnt = recipe.training.get("learnt_defects", "none")
    if learnt != "none":
        facts["learnt from defects"] = {"labels": "labelled ones", "synthetic": "made from good images"}[learnt]
    if recipe.training.get("frame_to_score"):
        facts["frame to score"] = recipe.training["frame_to_score"]
    if parity:
        facts["export parity"] = parity
    return render_report(
        ReportFacts(recipe.product, recipe.detector, facts, notes, recipe.training.get("decided", ())),
        evaluation,
        images,
        threshold=limits.score,
        map_threshold=limits.map,
        good_scores=np.asarray(good_scores, dtype=np.float64),
        inside=inside,
        suspects=suspects,
    )


def of_the_fit(recipe: Recipe) -> bool:
    """Return whether the thresholds rest on the images of the training, not on parts that were shown afterwards."""
    return recipe.thresholds.fitted_on.startswith(HELD_OUT)


def rate_told(recipe: Recipe) -> str:
    """Return the promise about good parts; what was left out counts as good in the bound, and not in the average."""
    limits = recipe.thresholds
    left_out = len(recipe.training.get("left_out", ())) if of_the_fit(recipe) else 0
    counted = f", the {left_out} left out counted as good" if left_out else ""
    bound = bound_told(limits.rate_upper_bound)
    return f"{limits.false_reject_rate:.2%} on average, below {bound} with 95 % confidence{counted}"


def _print_recipe(recipe: Recipe, digest: str, result: FitResult, request: FitRequest, fit_s: float) -> None:
    limits = recipe.thresholds
    table = Table(show_header=False, title=escape(f"{recipe.product}: {recipe.detector}"), title_justify="left")
    table.add_row("recipe", f"{escape(str(request.recipe))} ({request.recipe.stat().st_size / 1e6:.1f} MB)")
    table.add_row("digest", digest)
    table.add_row("learnt from", f"{recipe.training['good_images']} good images in {fit_s:.0f} s")
    table.add_row("registration", escape(str(recipe.training["registration"])))
    for text in recipe.training["decided"]:
        table.add_row("decided", escape(text))
    if recipe.training["frame_to_score"]:
        table.add_row("frame to score", escape(recipe.training["frame_to_score"]))
    table.add_row("export parity", str(result.parity))
    with_labels = limits.fitted_on.partition("; score: ")[2]
    source = f"{with_labels}, and" if with_labels else "from"
    table.add_row("threshold", f"{limits.score:.4g}, {source} {limits.n_good} good parts scored unseen")
    table.add_row(
        "good parts rejected",
        rate_told(recipe),
    )
    console.print(table)


def _print_evaluation(evaluation: Evaluation) -> None:
    table = Table(title="test images, exported graph", title_justify="left", show_header=False)
    parts = f"{evaluation.n_good} good, {evaluation.n_defective} defective"
    table.add_row("parts", parts)
    table.add_row("AUROC / AP / best F1", " / ".join(
        _figure(value) for value in (evaluation.auroc, evaluation.average_precision, evaluation.best_f1)
    ))  # fmt: skip
    table.add_row("pixel AUROC / AU-PRO", f"{_figure(evaluation.pixel_auroc)} / {_figure(evaluation.au_pro)}")
    table.add_row("overkill", f"{_figure(evaluation.overkill)} of good parts diverted at the threshold")
    table.add_row("escape", f"{_figure(evaluation.escape)} of defective parts passed at the threshold")
    no_verdict = evaluation.n_no_verdict_good + evaluation.n_no_verdict_defective
    table.add_row("no verdict", f"{no_verdict} parts")
    console.print(table)
    if evaluation.by_defect:
        console.print(_defect_table(evaluation))


def _defect_table(evaluation: Evaluation) -> Table:
    table = Table(title="by defect type", title_justify="left")
    for heading in ("type", "n", "detected", "recall", "precision", "AUROC"):
        table.add_column(heading, justify="left" if heading == "type" else "right")
    for name, figures in evaluation.by_defect.items():
        row = (figures.recall, figures.precision, figures.auroc)
        table.add_row(escape(name), str(figures.n), str(figures.detected), *(_figure(value) for value in row))
    return table


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
