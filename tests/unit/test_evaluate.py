"""A recipe is measured by what a station would say, and against the defects where they were drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from agent.engines.engine import EngineSettings, open_engine
from agent.line.pipeline import Pipeline
from agent.replay import replay, replay_items
from calibration.errors import InputError
from calibration.images import encode_png
from calibration.photometric import Photometric
from calibration.preprocess import Rectangle, View
from calibration.recipe import Recipe
from calibration.registration import Reference, RegistrationSettings
from tests.recipes import SIDE, bracket, tiny_recipe
from trainer.data import Item, Pictures, read_dataset
from trainer.evaluate import scored_images
from trainer.metrics import ScoredImage

SIZE = (120, 160)  # (height, width) of the bracket's picture


def silent(what: str, done: int, total: int) -> None:
    pass


def stored(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_png(pixels))
    return path


def measured(recipe: Recipe, *items: Item) -> list[ScoredImage]:
    return scored_images(recipe, items, Pictures(Photometric()), silent)


def views() -> dict[str, tuple[View, Reference | None]]:
    """Return every way from an image to what the detector sees, of pictures of 160x120 px."""
    region = Rectangle(40, 24, 96, 80)
    size = {"colour": False, "reference_size": SIZE}
    weight = np.full(SIZE, 255, np.uint8)
    reference = Reference(bracket(SIZE), weight, RegistrationSettings(), min_similarity=0.6, max_residual_px=2.0)
    return {
        "plain": (View(SIDE, SIDE, **size), None),
        "sizes that differ": (View(SIDE, SIDE, **size, fixed_size=False), None),
        "region": (View(SIDE, SIDE, **size, region=region), None),
        "registered": (View(SIDE, SIDE, **size), reference),
    }


@pytest.mark.parametrize("way", views())
def test_a_mask_of_another_size_than_its_image_is_refused_by_name(tmp_path: Path, way: str) -> None:
    view, reference = views()[way]
    recipe = tiny_recipe(view=view, reference=reference)
    image = stored(tmp_path / "test" / "crack" / "1.png", bracket(SIZE))
    drawn = np.zeros(SIZE, np.uint8)
    drawn[40:60, 60:90] = 255
    mask = stored(tmp_path / "ground_truth" / "crack" / "1_mask.png", drawn)
    item = Item(image, "test/crack/1.png", "crack", mask=mask)
    (found,) = measured(recipe, item)
    assert found.mask.any()
    stored(mask, drawn[::2, ::2])
    with pytest.raises(InputError, match=r"1_mask\.png: the mask is 80x60 px, its image 160x120: draw it on a picture"):
        measured(recipe, item)


def test_images_of_several_sizes_have_masks_of_their_own_sizes(tmp_path: Path) -> None:
    view, _ = views()["sizes that differ"]
    small = bracket(SIZE)[::2, ::2]
    mask = stored(tmp_path / "mask.png", np.where(np.arange(80) < 40, 255, np.zeros((60, 1))).astype(np.uint8))
    item = Item(stored(tmp_path / "1.png", small), "1.png", "crack", mask=mask)
    (found,) = measured(tiny_recipe(view=view), item)
    np.testing.assert_array_equal(found.mask, np.broadcast_to(np.arange(SIDE) < SIDE / 2, (SIDE, SIDE)))


def test_what_a_station_refuses_has_no_verdict_here_for_the_same_reason(tmp_path: Path) -> None:
    recipe = tiny_recipe(colour=True)
    test = tmp_path / "test"
    for label, level in (("good", 128), ("crack", 250)):
        stored(test / label / "colour.png", np.full((SIDE, SIDE, 3), level, np.uint8))
        stored(test / label / "gray.png", np.full((SIDE, SIDE), level, np.uint8))
        stored(test / label / "large.png", np.full((SIDE, SIDE + 1, 3), level, np.uint8))
    stored(tmp_path / "train" / "good" / "0.png", np.full((SIDE, SIDE, 3), 128, np.uint8))
    pipeline = Pipeline(recipe, open_engine(recipe, EngineSettings("onnxruntime")))
    items, _ = replay_items(test)
    said = {f"test/{item.name}": verdict for item, verdict in replay(items, pipeline, recipe.view, silent)}
    found = {image.name: image for image in measured(recipe, *read_dataset(tmp_path).test)}
    assert said.keys() == found.keys()
    for name, verdict in said.items():
        assert (found[name].score is None) == (verdict.score is None), name
        assert found[name].reason == (verdict.detail if verdict.score is None else ""), name
    assert found["test/good/gray.png"].reason.startswith("the frame is gray, the recipe was trained in colour")
    assert sum(image.score is None for image in found.values()) == 4


def test_a_gray_recipe_still_takes_colour(tmp_path: Path) -> None:
    item = Item(stored(tmp_path / "1.png", np.full((SIDE, SIDE, 3), 128, np.uint8)), "1.png", "good")
    (found,) = measured(tiny_recipe(), item)
    assert found.score == pytest.approx(0.002, abs=1e-3)
