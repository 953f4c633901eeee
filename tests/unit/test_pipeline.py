from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from recipes import LEVEL, SIDE, bracket, tiny_answer, tiny_recipe, tiny_reference

from agent.engine import Engine, EngineSettings, open_engine
from agent.pipeline import STAGES, Pipeline, regions
from agent.verdict import Outcome, Reason, Verdict
from calibration.frame import Frame
from calibration.photometric import Photometric, ReferencePatch
from calibration.preprocess import Rectangle, View
from calibration.recipe import Recipe


class Answering:
    """An engine that answers what it is told."""

    label = "answering f32, 1 threads"

    def __init__(self, anomaly_map: np.ndarray, score: float) -> None:
        self.answer = (anomaly_map.astype(np.float32), score)

    def infer(self, batch: np.ndarray) -> tuple[np.ndarray, float]:
        return self.answer


def frame(pixels: np.ndarray, **facts: object) -> Frame:
    return Frame(pixels, frame_id=5, trigger_id=9, exposed_ns=0, received_ns=0, facts=facts)


def gray_frame(level: int = round(LEVEL * 255)) -> Frame:
    return frame(np.full((SIDE, SIDE), level, np.uint8))


def inspect(recipe: Recipe, pixels: np.ndarray, engine: Engine | None = None, **facts: object) -> Verdict:
    return Pipeline(recipe, engine or open_engine(recipe, EngineSettings("onnxruntime"))).inspect(
        frame(pixels, **facts)
    )


def test_a_good_part_passes_and_a_bad_one_is_rejected_by_its_score() -> None:
    recipe = tiny_recipe()
    pixels = np.full((SIDE, SIDE), round(LEVEL * 255), np.uint8)
    assert inspect(recipe, pixels).outcome is Outcome.PASS
    pixels[:] = 220
    verdict = inspect(recipe, pixels)
    expected = tiny_answer(np.full((1, 1, SIDE, SIDE), 220 / 255, np.float32))[1]
    assert verdict.outcome is Outcome.REJECT
    assert verdict.score == pytest.approx(expected, rel=1e-5)
    assert verdict.trigger_id == 9


def test_a_score_equal_to_the_threshold_passes() -> None:
    recipe = tiny_recipe()
    quiet = np.zeros((4, 4))
    at_threshold = Answering(quiet, recipe.thresholds.score)
    above = Answering(quiet, np.nextafter(recipe.thresholds.score, 1.0))
    assert inspect(recipe, gray_frame().pixels, at_threshold).outcome is Outcome.PASS
    assert inspect(recipe, gray_frame().pixels, above).outcome is Outcome.REJECT


@pytest.mark.parametrize("answer", [(np.zeros((4, 4)), np.nan), (np.full((4, 4), np.inf), 0.0)])
def test_an_answer_that_is_no_number_is_no_verdict(answer: tuple[np.ndarray, float]) -> None:
    verdict = inspect(tiny_recipe(), gray_frame().pixels, Answering(*answer))
    assert (verdict.outcome, verdict.reason) == (Outcome.NO_VERDICT, Reason.FAULT)


@pytest.mark.parametrize("shape", [(SIDE, SIDE + 1), (SIDE // 2, SIDE)])
def test_a_frame_of_another_size_is_no_verdict(shape: tuple[int, int]) -> None:
    verdict = inspect(tiny_recipe(), np.zeros(shape, np.uint8))
    assert (verdict.outcome, verdict.reason) == (Outcome.NO_VERDICT, Reason.BAD_FRAME)
    assert f"{SIDE}x{SIDE}" in verdict.detail


def test_a_gray_frame_is_no_verdict_for_a_colour_recipe() -> None:
    verdict = inspect(tiny_recipe(colour=True), np.zeros((SIDE, SIDE), np.uint8))
    assert verdict.reason is Reason.BAD_FRAME


def test_a_lamp_out_of_range_is_no_verdict() -> None:
    recipe = tiny_recipe()
    lamp = Photometric(patch=ReferencePatch(0, 0, 4, 4, level=0.9))
    pipeline = Pipeline(recipe, open_engine(recipe, EngineSettings("onnxruntime")), lamp)
    verdict = pipeline.inspect(gray_frame(30))
    assert verdict.reason is Reason.BAD_FRAME
    assert "lamp" in verdict.detail


def registered_recipe() -> Recipe:
    reference = tiny_reference()
    height, width = reference.image.shape
    return tiny_recipe(
        reference=reference, view=View(SIDE, SIDE, colour=False, reference_size=(height, width), fixed_size=True)
    )


def test_a_blank_field_is_not_registered_and_no_verdict() -> None:
    recipe = registered_recipe()
    verdict = inspect(recipe, np.full(recipe.view.reference_size, 40, np.uint8))
    assert (verdict.outcome, verdict.reason) == (Outcome.NO_VERDICT, Reason.NOT_REGISTERED)
    assert verdict.score is None


def test_a_registered_part_tells_where_it_lay() -> None:
    recipe = registered_recipe()
    shifted = np.roll(bracket(recipe.view.reference_size), (3, -5), axis=(0, 1))
    verdict = inspect(recipe, shifted, Answering(np.zeros((4, 4)), 0.0))
    assert verdict.outcome is Outcome.PASS, verdict.detail
    assert verdict.registration is not None
    assert verdict.registration.dx_px == pytest.approx(-5, abs=0.3)
    assert verdict.registration.dy_px == pytest.approx(3, abs=0.3)


def test_every_stage_is_timed_in_order() -> None:
    verdict = inspect(tiny_recipe(), gray_frame().pixels)
    assert tuple(verdict.stage_ms) == STAGES


def test_the_part_id_goes_from_frame_to_verdict() -> None:
    assert inspect(tiny_recipe(), gray_frame().pixels, part_id="P7").part_id == "P7"
    assert inspect(tiny_recipe(), np.zeros((3, 3), np.uint8), part_id="P8").part_id == "P8"


def test_regions_are_in_reference_pixels_with_the_highest_peak_first() -> None:
    anomaly_map = np.zeros((8, 8), np.float32)
    anomaly_map[1:3, 2] = 1.5
    anomaly_map[6, 6], anomaly_map[7, 7] = 3.0, 2.0  # touching at a corner: one region
    view = View(64, 64, colour=False, reference_size=(200, 400), region=Rectangle(100, 20, 160, 80))
    found = regions(anomaly_map, 1.0, view)
    assert [region.peak for region in found] == [3.0, 1.5]
    first, second = found
    assert (first.x_px, first.y_px, first.width_px, first.height_px) == (100 + 6 * 20, 20 + 6 * 10, 40, 20)
    assert (second.x_px, second.y_px, second.width_px, second.height_px) == (100 + 2 * 20, 20 + 10, 20, 20)
    assert second.area_px == 2 * 20 * 10


def test_a_place_exactly_at_the_map_threshold_is_no_region() -> None:
    view = View(32, 32, colour=False, reference_size=(32, 32))
    assert regions(np.full((4, 4), 1.0, np.float32), 1.0, view) == ()


def test_a_verdict_that_contradicts_itself_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="cannot have the reason"):
        Verdict(1, Outcome.NO_VERDICT, Reason.SCORE)
    with pytest.raises(ValueError, match="cannot have the reason"):
        Verdict(1, Outcome.PASS, Reason.LATE, score=0.0, threshold=1.0)
    with pytest.raises(ValueError, match="needs a score"):
        Verdict(1, Outcome.PASS, Reason.SCORE)
    passed = Verdict(1, Outcome.PASS, Reason.SCORE, score=0.0, threshold=1.0)
    with pytest.raises(ValueError, match="needs a score"):
        dataclasses.replace(passed, score=None)
