"""`taktsight-agent compile` and `selftest`: the engine ahead of time, and proof that it judges as the trainer did."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from agent.cameras.several import file_and_camera
from agent.config import Station, read_station
from agent.engines.build import load_runtime, plan_for
from agent.engines.cuda import open_gpu
from agent.engines.engine import KINDS, RUNTIMES, TENSORRT, TOLERANCES, EngineSettings, load_engine, open_engine
from agent.engines.parity import Difference, Parity, Wanted, difference, examined, require
from agent.engines.tensorrt import crop_plan
from agent.errors import EngineError
from agent.line.pipeline import Pipeline
from agent.recipes.store import RecipeStore
from agent.replay import ReplayItem, replay, replay_items
from calibration.console import console, progress_bars, say
from calibration.errors import InputError
from calibration.recipe import Recipe, read_recipe


def _engine_options(function: Callable[..., None]) -> Callable[..., None]:
    options: tuple[Callable[[Any], Any], ...] = (
        click.argument("source", metavar="STATION|RECIPE", type=click.Path(path_type=Path)),
        click.option("--precision", type=click.Choice(list(TOLERANCES)), help="In place of the station's."),
        click.option("--runtime", type=click.Choice(RUNTIMES), help="tensorrt: Python module."),
        click.option("--cache", type=click.Path(path_type=Path), help="tensorrt: folder of compiled plans."),
    )
    for option in reversed(options):
        function = option(function)
    return function


@click.command(
    "compile",
    short_help="Compile a recipe for this machine's GPU.",
    epilog="Example: taktsight-agent compile station.yaml",
)
@_engine_options
@click.option("--workspace-mb", type=click.IntRange(16, 65536), help="Device memory that building may use.")
def compile_command(source: Path, **wish: Any) -> None:
    """Compile the recipe that STATION runs (a .yaml file), or RECIPE, for the GPU of this machine; once is enough.

    A station with another engine than tensorrt has nothing to compile.
    """
    recipe, settings = _asked(source, kind=TENSORRT if _is_recipe(source) else None, **wish)
    if settings.kind != TENSORRT:
        say(f"{source}: engine.kind is {settings.kind}: nothing to compile")
        return
    gpu = open_gpu()
    runtime = load_runtime(settings.runtime)
    with gpu.current():
        plan = plan_for(recipe, settings, runtime, gpu.facts)
    crop_plan(recipe, settings, runtime, gpu)  # a start must find it ready
    how = f"compiled in {plan.facts.get('seconds')} s" if plan.is_new else "was compiled before"
    say(f"{recipe.product}: {how}, {len(plan.data) / 1e6:.1f} MB, {plan.key.precision} on {gpu.facts.name}")
    for layer, number in plan.facts.get("layers", {}).items():
        say(f"  {number:4} {layer}")


@click.command(
    "selftest",
    short_help="Show how the engine answers the recipe's sealed set.",
    epilog="Example: taktsight-agent selftest station.yaml --images images/flange/test",
)
@_engine_options
@click.option("--engine", "kind", type=click.Choice(["auto", *KINDS]), help="In place of the station's.")
@click.option("--images", type=click.Path(path_type=Path), help="Compare on these too, with a CPU engine in f32.")
def selftest_command(source: Path, images: Path | None, **wish: Any) -> None:
    """Show how the engine answers the sealed set of the recipe that STATION runs, or of RECIPE; it must pass to judge.

    What is compared, and the grey band: docs/engines.md.
    """
    recipe, settings = _asked(source, **wish)
    engine, tolerance = load_engine(recipe, settings), TOLERANCES[settings.precision]
    parity = examined(engine.infer, engine.label, recipe, tolerance)
    console.print(parity_table(parity, recipe))
    failed = None
    if images is not None:
        single = open_engine(recipe, EngineSettings(threads=settings.threads))
        by_label = _by_label(recipe, images, Pipeline(recipe, single), Pipeline(recipe, engine), tolerance)
        console.print(images_table(by_label, f"{engine.label} beside {single.label}"))
        failed = next((found for found in by_label.values() if not found.passed), None)
    require(parity)
    if failed is not None:
        raise EngineError(
            f"{engine.label} differs from {failed.label} by {failed.worst:.1e} of the threshold, {failed.flips} other "
            f"verdicts outside the grey band; at most {tolerance:g} and none are allowed: take another engine or "
            "precision"
        )
    say(f"{engine.label} passes: within {parity.worst:.1e} of the trainer's answers, {tolerance:g} is allowed")


def parity_table(parity: Parity, recipe: Recipe) -> Table:
    """Return a row per part of the sealed set."""
    limit = recipe.thresholds.score
    table = Table(title=f"{parity.label}: threshold {limit:.6g}", title_justify="left")
    for heading in ("part", "score", "trainer", "off", "map off", "verdict"):
        table.add_column(heading, justify="left" if heading in ("part", "verdict") else "right")
    for part in parity.parts:
        table.add_row(part.name, f"{part.score:.6g}", f"{part.wanted_score:.6g}", *_off(part), _verdict(part, limit))
    return table


def images_table(by_label: dict[str, Parity], title: str) -> Table:
    """Return a row per folder of images."""
    table = Table(title=title, title_justify="left")
    for heading in ("folder", "parts", "score off", "map off", "other verdicts", "of them in the grey band"):
        table.add_column(heading, justify="left" if heading == "folder" else "right")
    for label, parity in by_label.items():
        worst = [max((getattr(part, name) for part in parity.parts), default=0.0) for name in ("of_score", "of_map")]
        others = (parity.flips + parity.band_flips, parity.band_flips)
        table.add_row(label or "-", str(len(parity.parts)), *(f"{value:.1e}" for value in worst), *map(str, others))
    return table


def _by_label(recipe: Recipe, images: Path, single: Pipeline, other: Pipeline, tolerance: float) -> dict[str, Parity]:
    """Return, per folder, how `other` answers beside `single`; parts that neither judges are left out."""
    items, photometric = replay_items(images)
    if not photometric.is_identity:
        single = Pipeline(recipe, single.engine, photometric)
        other = Pipeline(recipe, other.engine, photometric)
    found: dict[str, list[Difference]] = defaultdict(list)
    with progress_bars() as progress:
        wanted = list(replay(items, single, recipe.view, progress))
        for (item, expected), (_, verdict) in zip(wanted, replay(items, other, recipe.view, progress), strict=True):
            if expected.score is None or expected.anomaly_map is None:
                continue
            if verdict.score is None or verdict.anomaly_map is None:
                raise EngineError(f"{item.name}: {other.engine.label} gives no verdict: {verdict.detail}")
            told = _told(item, expected.score, expected.anomaly_map)
            found[item.label].append(
                difference(told, verdict.anomaly_map, verdict.score, thresholds=recipe.thresholds, tolerance=tolerance)
            )
    return {label: Parity(single.engine.label, tolerance, tuple(parts)) for label, parts in sorted(found.items())}


def _told(item: ReplayItem, score: float, anomaly_map: Any) -> Wanted:
    return Wanted(item.name, score, float(anomaly_map.max()), anomaly_map)


def _off(part: Difference) -> tuple[str, str]:
    return f"{part.of_score:.1e}", f"{part.of_map:.1e}"


def _verdict(part: Difference, limit: float) -> str:
    word, other = ("reject", "pass") if part.score > limit else ("pass", "reject")
    return word + (f", not {other}" if part.flips else "") + (" (grey band)" if part.in_band else "")


def _asked(source: Path, **wish: Any) -> tuple[Recipe, EngineSettings]:
    """Return the recipe and the engine's settings of a station or a recipe, with the options that were given."""
    given = {name: value for name, value in wish.items() if value is not None}
    if _is_recipe(source):
        recipe, settings = read_recipe(source), EngineSettings()
        if given.get("kind") == TENSORRT and "precision" not in given:
            given["precision"] = "f32" if recipe.graph_f16 is None else "f16"
    else:
        station = read_station(source)
        recipe, settings = _recipe_of(station), station.engine
    return recipe, replace(settings, **given)


def _recipe_of(station: Station) -> Recipe:
    settings = station.recipes
    return RecipeStore(settings.folder, settings.trust, settings.recipe).current()[1]


def _is_recipe(source: Path) -> bool:
    file, camera = file_and_camera(source)
    if not file.is_file():
        raise InputError(f"{source}: not found: give a station's .yaml file or a recipe")
    return camera is None and file.suffix not in (".yaml", ".yml")
