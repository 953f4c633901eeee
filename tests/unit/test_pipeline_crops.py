"""An engine that takes 8-bit pixels gets them as they are, and the verdict is the one of the batch."""

from __future__ import annotations

import numpy as np
from recipes import tiny_answer, tiny_recipe

from agent.line.pipeline import Pipeline
from calibration.frame import Frame
from calibration.photometric import Photometric
from calibration.preprocess import View, batch_of

PIXELS = np.random.default_rng(5).integers(0, 256, (32, 32), np.uint8)


class Crops:
    """An engine that takes batches, and crops unless told otherwise; counts both."""

    label = "crops f32"

    def __init__(self, view: View, *, takes: bool = True) -> None:
        self.view, self.batches, self.crops = view, 0, 0
        self.crop_shape = (1, 32, 32, 1) if takes else None

    def infer(self, batch):
        self.batches += 1
        return tiny_answer(batch)

    def infer_crop(self, crop):
        self.crops += 1
        assert crop.dtype == np.uint8
        return tiny_answer(batch_of(crop, 8, self.view))


def test_8_bit_pixels_go_to_the_engine_as_they_are_and_the_verdict_is_the_same():
    recipe, frame = tiny_recipe(), Frame(PIXELS, 1, 1, 0, 0)
    crops, batches = Crops(recipe.view), Crops(recipe.view, takes=False)
    one, other = Pipeline(recipe, crops).inspect(frame), Pipeline(recipe, batches).inspect(frame)
    assert (crops.crops, crops.batches, batches.crops, batches.batches) == (1, 0, 0, 1)
    assert (one.outcome, one.score, one.regions) == (other.outcome, other.score, other.regions)
    np.testing.assert_array_equal(one.anomaly_map, other.anomaly_map)
    np.testing.assert_array_equal(one.picture, other.picture)
    assert one.picture.dtype == np.float32


def test_pixels_that_a_station_corrects_go_as_a_batch():
    recipe = tiny_recipe()
    engine = Crops(recipe.view)
    dark = np.full((32, 32), 0.01, np.float32)
    verdict = Pipeline(recipe, engine, Photometric(dark=dark)).inspect(Frame(PIXELS, 1, 1, 0, 0))
    assert verdict.score is not None
    assert (engine.crops, engine.batches) == (0, 1)
