"""Tiles and zones from a folder of good images to a verdict: what was drawn is what the station applies."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

from agent.engines.engine import EngineSettings, open_engine, prove
from agent.line.pipeline import Pipeline
from agent.verdict import Outcome
from calibration.frame import Frame
from calibration.recipe import Recipe, read_recipe, write_recipe
from trainer.data import read_dataset
from trainer.fit import FitRequest, fit
from trainer.learning import Options

HEIGHT, WIDTH = 120, 200  # of an image
ZONES = {
    "format": "taktsight.zones/1",
    "zones": [
        {"name": "thread", "factor": 0.7, "polygon": [[0, 0], [60, 0], [60, 120], [0, 120]]},
        {"name": "clamp", "ignore": True, "polygon": [[170, 0], [200, 0], [200, 120], [170, 120]]},
    ],
}


def silent(what: str, done: int, total: int) -> None:
    pass


def part(generator: np.random.Generator) -> np.ndarray:
    picture = np.full((HEIGHT, WIDTH), 90.0)
    cv2.rectangle(picture, (30, 30), (170, 90), 170.0, -1)
    return np.clip(picture + generator.normal(0, 4, picture.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Return a recipe of two tiles and three zones as a station reads it."""
    folder = tmp_path_factory.mktemp("tiles")
    (folder / "good").mkdir()
    generator = np.random.default_rng(0)
    for number in range(24):
        cv2.imwrite(str(folder / "good" / f"{number}.png"), part(generator))
    (folder / "zones.json").write_text(json.dumps(ZONES), encoding="utf-8")
    request = FitRequest(
        folder / "part.recipe",
        detector="patch_memory",
        height=96,
        width=96,
        registration="off",
        zones=folder / "zones.json",
        tiles="2x1",
        mm_per_px=0.5,
        options=Options(memory_entries=60),
    )
    result = fit(read_dataset(folder / "good"), request, silent)
    write_recipe(request.recipe, result.recipe)
    return read_recipe(request.recipe)


def judged(recipe: Recipe, pixels: np.ndarray):
    pipeline = Pipeline(recipe, open_engine(recipe, EngineSettings("onnxruntime")))
    return pipeline.inspect(Frame(pixels, frame_id=1, trigger_id=1, exposed_ns=0, received_ns=0))


def test_the_recipe_tells_its_tiles_zones_and_scale(recipe: Recipe) -> None:
    assert (recipe.view.height, recipe.view.width) == (96, 160)
    assert recipe.zones.names == ("elsewhere", "thread")
    assert recipe.zones.cells.shape == (12, 20)
    assert recipe.mm_per_px == 0.5
    assert recipe.training["zones"] == {"thread": 0.7, "clamp": "ignored"}
    assert "judged in 2x1 tiles of 96x96 px" in recipe.training["decided"]


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_every_engine_passes_the_gate(recipe: Recipe, engine: str) -> None:
    assert prove(open_engine(recipe, EngineSettings(engine)), recipe, 1e-3) <= 1e-3


@pytest.mark.parametrize(("x", "zone"), [(30, "thread"), (120, "elsewhere")])
def test_a_reject_names_the_zone_of_its_fault(recipe: Recipe, x: int, zone: str) -> None:
    pixels = part(np.random.default_rng(7))
    assert judged(recipe, pixels).outcome is Outcome.PASS
    pixels[55:67, x : x + 12] = 0
    verdict = judged(recipe, pixels)
    assert verdict.outcome is Outcome.REJECT
    assert verdict.rejected_by[0] == zone
    assert verdict.regions[0].zone == zone
    assert verdict.detail.startswith(zone)
    assert "mm)" in verdict.detail


def test_a_fault_in_an_ignored_zone_moves_nothing(recipe: Recipe) -> None:
    pixels = part(np.random.default_rng(7))
    before = judged(recipe, pixels)
    pixels[55:67, 180:192] = 0
    after = judged(recipe, pixels)
    assert (after.outcome, after.score) == (Outcome.PASS, pytest.approx(before.score, rel=1e-5))
