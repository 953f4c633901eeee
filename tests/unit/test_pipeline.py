from __future__ import annotations

import dataclasses
import time

import cv2
import numpy as np
import pytest
from recipes import LEVEL, SIDE, bracket, tiny_answer, tiny_recipe, tiny_reference

from agent.engines.engine import Engine, EngineSettings, open_engine
from agent.line.budget import FEWEST
from agent.line.pipeline import STAGES, Pipeline, regions
from agent.verdict import Outcome, Reason, Verdict
from calibration.condition import glimpse, learn_limits, measured
from calibration.frame import Frame
from calibration.photometric import Photometric, ReferencePatch
from calibration.preprocess import Rectangle, View
from calibration.recipe import Recipe
from calibration.zones import Zones


class Answering:
    """An engine that answers what it is told."""

    label = "answering f32, 1 threads"

    def __init__(self, anomaly_map: np.ndarray, score: float) -> None:
        self.answer = (anomaly_map.astype(np.float32), score)

    def infer(self, batch: np.ndarray) -> tuple[np.ndarray, float]:
        return self.answer


class Failing:
    """An engine that must not be asked."""

    label = "failing f32, 1 threads"

    def infer(self, batch: np.ndarray) -> tuple[np.ndarray, float]:
        raise AssertionError("the engine was asked")


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


# ---- light, focus, another product -----------------------------------------------------------------------------------


def limited_recipe() -> Recipe:
    """Return the registered recipe with the limits that its own good parts leave room for."""
    recipe = registered_recipe()
    good = [np.roll(bracket(recipe.view.reference_size), shift, axis=(0, 1)) for shift in range(-4, 5)]
    seen = [glimpse(pixels, 8, recipe.view, registered=True) for pixels in good]
    return dataclasses.replace(recipe, condition=learn_limits(seen))


def under_light(pixels: np.ndarray, gain: float) -> np.ndarray:
    return cv2.convertScaleAbs(pixels, alpha=gain)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda part: under_light(part, 0.05), Reason.TOO_DARK),
        (lambda part: under_light(part, 2.0), Reason.SATURATED),
        (lambda part: cv2.GaussianBlur(part, (0, 0), 10.0), Reason.BLURRED),
        (lambda part: under_light(part, 0.8), Reason.SCORE),
        (lambda part: np.full_like(part, 40), Reason.NOT_REGISTERED),
        (lambda part: disc(part.shape), Reason.OTHER_PRODUCT),
    ],
)
def test_a_frame_that_cannot_be_judged_says_why_and_what_was_measured(spoil, reason) -> None:
    recipe = limited_recipe()
    pixels = spoil(bracket(recipe.view.reference_size))
    verdict = inspect(recipe, pixels, Answering(np.zeros((4, 4)), 0.0), part_id="P1")
    assert verdict.reason is reason, verdict.detail
    assert verdict.condition == measured(glimpse(pixels, 8, recipe.view, registered=True))
    assert verdict.part_id == "P1"


def disc(size: tuple[int, ...]) -> np.ndarray:
    pixels = np.full(size, 40, np.uint8)
    cv2.circle(pixels, (size[1] // 2, size[0] // 2), size[0] // 3, 190, -1)
    return cv2.GaussianBlur(pixels, (3, 3), 0.8)


def test_a_blurred_part_that_would_not_register_either_is_blurred() -> None:
    recipe = limited_recipe()
    pixels = cv2.GaussianBlur(bracket(recipe.view.reference_size), (0, 0), 14.0)
    without_limits = dataclasses.replace(recipe, condition=None)
    assert inspect(without_limits, pixels).reason in (Reason.NOT_REGISTERED, Reason.OTHER_PRODUCT)
    assert inspect(recipe, pixels).reason is Reason.BLURRED


def test_a_recipe_without_limits_measures_and_refuses_nothing() -> None:
    verdict = inspect(tiny_recipe(), gray_frame(3).pixels)
    assert verdict.reason is Reason.SCORE
    assert verdict.condition is not None
    assert verdict.condition.brightness == pytest.approx(3 / 255)


def test_a_refused_frame_reaches_no_engine_and_times_what_was_done() -> None:
    recipe = limited_recipe()
    verdict = inspect(recipe, np.zeros(recipe.view.reference_size, np.uint8), Failing())
    assert verdict.reason is Reason.TOO_DARK
    assert "brightness 0.000" in verdict.detail
    assert tuple(verdict.stage_ms) == STAGES[:2]


def test_saturation_is_told_of_the_sensors_picture_though_the_correction_hides_it() -> None:
    recipe = limited_recipe()
    size = recipe.view.reference_size
    flat = Photometric(flat=np.tile(np.linspace(0.5, 1.0, size[1], dtype=np.float32), (size[0], 1)))
    pipeline = Pipeline(recipe, Answering(np.zeros((4, 4)), 0.0), flat)
    verdict = pipeline.inspect(frame(under_light(bracket(size), 2.0)))
    assert verdict.condition is not None
    assert verdict.condition.saturated_share > 0.1
    assert verdict.reason is Reason.SATURATED


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


CELLS = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [2, 2, 2, 2]], np.uint8)


def zoned_recipe(**overrides: object) -> Recipe:
    """Return a recipe whose zones' scores are a tenth of the map."""
    return tiny_recipe(zones=Zones(("elsewhere", "thread", "label"), CELLS, gain=0.1, offset=0.0), **overrides)


def test_a_reject_names_the_zones_that_are_above_the_threshold_and_the_zone_of_each_place() -> None:
    recipe = zoned_recipe()
    anomaly_map = np.zeros((4, 4), np.float32)
    anomaly_map[0, 0], anomaly_map[3, 1:3] = 1.5, (0.5, 3.0)
    verdict = inspect(recipe, gray_frame().pixels, Answering(anomaly_map, 0.3))
    assert recipe.thresholds.score == 0.1
    assert verdict.zones == pytest.approx({"elsewhere": 0.0, "thread": 0.15, "label": 0.3})
    assert verdict.rejected_by == ("label", "thread")
    assert [(region.zone, region.peak) for region in verdict.regions] == [("label", 3.0), ("thread", 1.5)]
    assert verdict.detail.startswith("label, thread: unlike good parts at x 16, y 28 px")


def test_a_part_that_passes_or_is_rejected_as_a_whole_names_no_zone() -> None:
    loud = np.full((4, 4), 1.5, np.float32)
    passed = inspect(zoned_recipe(), gray_frame().pixels, Answering(loud, 0.1))  # the graph's score decides, alone
    assert (passed.outcome, passed.rejected_by, passed.detail) == (Outcome.PASS, (), "")
    whole = inspect(zoned_recipe(), gray_frame().pixels, Answering(np.zeros((4, 4)), 0.3))
    assert (whole.outcome, whole.rejected_by) == (Outcome.REJECT, ())
    assert whole.detail == "score 0.3 is above 0.1, spread over the part"
    assert inspect(tiny_recipe(), gray_frame().pixels, Answering(loud, 0.3)).zones == {}


def test_a_commanded_threshold_moves_the_limits_of_all_zones() -> None:
    recipe = zoned_recipe()
    anomaly_map = np.full((4, 4), 1.5, np.float32)
    pipeline = Pipeline(recipe, Answering(anomaly_map, 0.3), score_threshold=0.2)
    assert pipeline.inspect(gray_frame()).rejected_by == ()
    pipeline = Pipeline(recipe, Answering(anomaly_map, 0.3), score_threshold=0.14)
    assert set(pipeline.inspect(gray_frame()).rejected_by) == {"elsewhere", "thread", "label"}


def test_a_place_is_told_in_mm_where_the_recipe_knows_its_scale() -> None:
    anomaly_map = np.zeros((4, 4), np.float32)
    anomaly_map[1, 1:3] = 2.0
    verdict = inspect(tiny_recipe(mm_per_px=0.25), gray_frame().pixels, Answering(anomaly_map, 0.3))
    assert verdict.mm_per_px == 0.25
    assert verdict.detail == "unlike good parts at x 16, y 12 px, 16 x 8 px (4 x 2 mm)"


class Hurried(Answering):
    """An engine that takes so long."""

    def __init__(self, *answer: object) -> None:
        super().__init__(*answer)
        self.takes_s = 0.02
        self.asked = 0

    def infer(self, batch: np.ndarray) -> tuple[np.ndarray, float]:
        self.asked += 1
        time.sleep(self.takes_s)
        return super().infer(batch)


def hurried_pipeline() -> tuple[Pipeline, Hurried]:
    """A pipeline that has seen enough parts to know what its stages take."""
    engine = Hurried(np.full((4, 4), 9.0), 1.0)
    pipeline = Pipeline(tiny_recipe(), engine)
    for _ in range(FEWEST):
        assert pipeline.inspect(gray_frame()).cut == ()
    return pipeline, engine


def test_a_part_that_cannot_be_judged_in_time_is_late_at_once_and_costs_the_next_part_nothing() -> None:
    pipeline, engine = hurried_pipeline()
    asked = engine.asked
    verdict = pipeline.inspect(gray_frame(), time.monotonic_ns() + 10_000_000)
    assert (verdict.outcome, verdict.reason, engine.asked) == (Outcome.NO_VERDICT, Reason.LATE, asked)
    assert pipeline.inspect(gray_frame(), time.monotonic_ns() + 10**10).outcome is Outcome.REJECT


def test_where_a_part_is_bad_is_left_out_to_be_in_time_and_the_verdict_says_so() -> None:
    pipeline, engine = hurried_pipeline()
    engine.takes_s = 0.05  # a slow part: nothing is left when the engine is done
    verdict = pipeline.inspect(gray_frame(), time.monotonic_ns() + 30_000_000)
    assert (verdict.outcome, verdict.regions, verdict.cut) == (Outcome.REJECT, (), ("regions",))
    assert "no time to say where" in verdict.detail
    in_time = pipeline.inspect(gray_frame(), time.monotonic_ns() + 10**10)
    assert (len(in_time.regions), in_time.cut) == (1, ())
