"""What judges at a station: whose recipe, on which engine, whether it answers as the trainer did, and soon enough."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from agent.doctor.finding import Finding, fail, ok, warn
from agent.doctor.machine import Case
from agent.engines.engine import TENSORRT, TOLERANCES, Engine, open_engine, prove
from agent.engines.parity import thresholds_serve
from agent.engines.tensorrt import lies_ready
from agent.line.beat import Beat
from agent.recipes.store import RecipeStore
from calibration.errors import TaktsightError
from calibration.recipe import Recipe

MOST_SHARE = 0.6  # of deadline or takt for the engine alone: registration, a late frame and load need the rest
WANTED = "an engine that reproduces the trainer's answers"
MOST_RUNS, MOST_S = 20, 1.0  # of the timing: an agent may run beside us


def trust(case: Case) -> Iterator[Finding]:
    """Yield whose recipes may run here."""
    trusted = case.station.recipes.trust
    keys = ", ".join(f"{key.key_id} ({key.name})" for key in trusted.keys)
    if trusted.unsigned:
        yield warn(
            "recipe.trust",
            "recipes that nobody signed may run",
            "recipes.keys alone",
            "have recipes signed (taktsight-trainer sign), then take `unsigned: allow` out of station.yaml",
        )
    else:
        yield ok("recipe.trust", f"signed by {keys}")


def judging(case: Case) -> Iterator[Finding]:
    """Yield the recipe that is to judge, then how it does on this device's engine."""
    store = _store(case)
    try:
        name, recipe = store.current()
    except TaktsightError as error:
        yield fail(
            "recipe", str(error), "a recipe that may run here", "taktsight-agent recipes list shows what there is"
        )
        return
    yield ok("recipe", f"{name or case.station.recipe.name}: {recipe_facts(recipe)}")
    if ended := store.ended():
        yield warn(
            "recipe.choice",
            ended,
            "a choice that holds, or none",
            "taktsight-agent recipes list; activate the recipe that is to judge",
        )
    yield from engine_findings(case, recipe)


def engine_findings(case: Case, recipe: Recipe) -> Iterator[Finding]:
    """Yield whether the engine answers as the trainer did, in which time, and what thresholds were fitted on."""
    settings = case.station.engine
    unseen = _unseen(case, recipe)
    if unseen is not None:
        yield unseen
        return
    try:
        engine = open_engine(recipe, settings)
        difference = prove(engine, recipe, TOLERANCES[settings.precision])
    except TaktsightError as error:
        yield fail("engine", str(error), WANTED, "see engine in station.yaml")
        return
    yield ok("engine", f"{engine.label} reproduces the trainer's answers within {difference:.0e}")
    yield inference_finding(inference_ms(engine, recipe), case.station.beat)
    yield thresholds_finding(recipe, engine.label)


def _unseen(case: Case, recipe: Recipe) -> Finding | None:
    """Return why an engine on a GPU is not opened, None where it is.

    A plan is as good as a program, so who is not the agent's user runs none of its plans; and a doctor compiles none.
    """
    settings, ours, account = case.station.engine, case.machine.user, case.account()
    if settings.kind != TENSORRT:
        return None
    if ours.uid != account.uid:
        return warn(
            "engine",
            f"not looked at: the plans in {settings.cache} are {account.name}'s, and {ours.name} runs none of them",
            WANTED,
            f"sudo -u {account.name} taktsight-agent selftest {case.file}",
        )
    try:
        is_ready = lies_ready(recipe, settings)
    except TaktsightError:  # told when it is opened, or a CPU engine stands in
        return None
    if is_ready:
        return None
    return warn(
        "engine",
        "not compiled for this device yet: the first start takes up to minutes",
        "a plan that lies ready",
        f"taktsight-agent compile {case.file}, then ask again",
    )


def inference_ms(engine: Engine, recipe: Recipe) -> list[float]:
    """Return how long each of up to 20 inferences took, for a second at most; the engine is warm by its proof."""
    batch = recipe.selftest.batches[:1]
    took_ms: list[float] = []
    until_ns = time.monotonic_ns() + int(MOST_S * 1e9)
    while len(took_ms) < MOST_RUNS and (not took_ms or time.monotonic_ns() < until_ns):
        began_ns = time.monotonic_ns()
        engine.infer(batch)
        took_ms.append((time.monotonic_ns() - began_ns) / 1e6)
    return took_ms


def inference_finding(took_ms: list[float], beat: Beat) -> Finding:
    """Return whether the engine leaves the rest of the path its time, within the deadline and within the takt."""
    middle_ms, most_ms = float(np.median(took_ms)), min(beat.deadline_ms, beat.takt_ms)
    limit = "deadline" if beat.deadline_ms <= beat.takt_ms else "takt"
    found = (
        f"{middle_ms:.1f} ms (median of {len(took_ms)}, longest {max(took_ms):.1f}), "
        f"{100 * middle_ms / most_ms:.0f} % of the {limit}"
    )
    action = "more engine.threads, another engine, a recipe with a smaller --size, or a longer deadline_ms"
    if middle_ms >= most_ms:
        return fail("engine.time", found, f"less than {most_ms:g} ms: else every part is late", action)
    if middle_ms > MOST_SHARE * most_ms:
        return warn(
            "engine.time", found, f"{100 * MOST_SHARE:.0f} % at most: registration and waiting need the rest", action
        )
    return ok("engine.time", found)


def thresholds_finding(recipe: Recipe, label: str) -> Finding:
    """Return whether thresholds were fitted on this precision. label: "openvino f32, 2 threads"."""
    fitted_on, precision = recipe.thresholds.fitted_on, label.partition(",")[0].rpartition(" ")[2]
    if thresholds_serve(fitted_on, label):
        return ok("recipe.thresholds", f"fitted on {fitted_on}, {recipe.thresholds.n_good} good parts")
    return warn(
        "recipe.thresholds",
        f"fitted on {fitted_on}, the engine runs {precision}",
        "thresholds of the precision that judges: scores differ by per cent",
        "taktsight-agent replay --scores with this engine, then taktsight-calibration threshold",
    )


def stored_recipes(case: Case) -> Iterator[Finding]:
    """Yield what else lies in the recipe folder and could be commanded, and what of it could not run."""
    listed = _store(case).listed()
    refused = [one for one in listed if one.trouble]
    if refused:
        names = ", ".join(one.name for one in refused)
        yield warn(
            "recipe.folder",
            f"{len(refused)} of {len(listed)} recipes cannot run here: {names}",
            "recipes that can be activated",
            "taktsight-agent recipes verify says why; bring them in anew or remove them",
        )
    else:
        yield ok("recipe.folder", f"{len(listed)} recipes in {case.station.recipes.folder}")


def recipe_facts(recipe: Recipe) -> str:
    """Return product, signer and digest in a line."""
    signature = recipe.signature
    signed = "unsigned" if signature is None else f"revision {signature.revision}, signed by {signature.key}"
    return f"{recipe.product}, {recipe.detector}, {signed}, digest {recipe.digest[:12]}"


def _store(case: Case) -> RecipeStore:
    settings = case.station.recipes
    return RecipeStore(settings.folder, settings.trust, settings.recipe)
