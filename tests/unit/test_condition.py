"""Light and focus of a frame: what is measured, what good parts leave room for, what is refused."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from agent.simulation.line import LineSettings, PartPlan, SimulatedLine
from calibration.condition import (
    BLACK,
    Condition,
    ConditionLimits,
    Glimpse,
    glimpse,
    learn_limits,
    measured,
    noticed,
)
from calibration.errors import CalibrationError
from calibration.preprocess import Rectangle, View

SIDE = 320
VIEW = View(128, 128, colour=False, reference_size=(SIDE, SIDE))
LIMITS = ConditionLimits(
    least_brightness=0.2,
    most_brightness=0.5,
    dark_level=0.05,
    bright_level=0.8,
    most_saturated_share=0.1,
    least_sharpness=1.5,
)
FINE = Condition(brightness=0.3, dark_level=0.1, bright_level=0.6, saturated_share=0.0, sharpness=2.0)


def seen(pixels: NDArray[np.generic], bit_depth: int = 8, view: View = VIEW, *, registered: bool = True) -> Condition:
    return measured(glimpse(pixels, bit_depth, view, registered=registered))


def as_plain(pixels: NDArray[np.uint8]) -> Glimpse:
    return Glimpse(pixels, pixels)


def step(sigma_px: float, side: int = 128) -> NDArray[np.uint8]:
    """Return a step edge under a Gaussian, in 8 bits."""
    edge = np.full((side, side), 40.0)
    edge[:, side // 2 :] = 200.0
    soft = cv2.GaussianBlur(edge, (0, 0), sigma_px) if sigma_px else edge
    return np.rint(soft).astype(np.uint8)


def noise(side: int = 128, seed: int = 0, sd: float = 20.0) -> NDArray[np.uint8]:
    return np.clip(np.random.default_rng(seed).normal(128, sd, (side, side)), 0, 255).astype(np.uint8)


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_levels_and_shares_are_those_of_the_pixels():
    pixels = np.zeros((100, 100), np.uint8)
    pixels[:, :15], pixels[:, 15:80], pixels[:, 80:] = 20, 100, 255
    found = measured(as_plain(pixels))
    assert found.brightness == pytest.approx((15 * 20 + 65 * 100 + 20 * 255) / 100 / 255)
    assert (found.dark_level, found.bright_level) == (pytest.approx(20 / 255), pytest.approx(1.0))
    assert found.saturated_share == pytest.approx(0.2)


@pytest.mark.parametrize("sigma_px", [0.0, 1.0, 2.5, 5.0])
def test_the_sharpness_of_a_step_is_that_of_the_closed_form(sigma_px):
    """The energy of a step's gradient after a Gaussian s is in proportion to 1 / s, and Gaussians add in squares."""
    wanted = np.sqrt((4 + sigma_px**2) / (1 + sigma_px**2))
    assert measured(as_plain(step(sigma_px))).sharpness == pytest.approx(wanted, rel=0.06)


def test_the_sharpness_of_white_noise_is_that_of_the_closed_form():
    """The energy of white noise's gradient after a Gaussian s is in proportion to 1 / s**4."""
    assert measured(as_plain(noise(256))).sharpness == pytest.approx(16.0, rel=0.15)


def test_sharpness_does_not_change_with_light_contrast_or_turn():
    picture = cv2.GaussianBlur(noise(256, sd=60), (0, 0), 2.0)
    sharpness = measured(as_plain(picture)).sharpness
    dim = np.rint(picture * 0.5).astype(np.uint8)
    assert measured(as_plain(dim)).sharpness == pytest.approx(sharpness, rel=0.02)
    assert measured(as_plain(np.ascontiguousarray(np.rot90(picture)))).sharpness == pytest.approx(sharpness, rel=0.02)


@pytest.mark.parametrize("level", [0, 128, 255])
def test_an_even_frame_shows_nothing_to_focus_on_and_is_not_blurred(level):
    even = seen(np.full((SIDE, SIDE), level, np.uint8))
    assert even.sharpness is None
    assert (
        dataclasses.replace(LIMITS, least_sharpness=99.0).complaint(dataclasses.replace(FINE, sharpness=None)) is None
    )


def test_all_ways_to_store_a_frame_give_the_same():
    pixels = cv2.GaussianBlur(noise(SIDE, sd=60), (0, 0), 3.0)
    wanted = dataclasses.astuple(seen(pixels))
    rgb = np.repeat(pixels[:, :, None], 3, axis=2)
    for other, depth in (
        (pixels.astype(np.uint16) * 16, 12),
        ((pixels / np.float32(255)).astype(np.float32), 8),
        (rgb, 8),
    ):
        assert dataclasses.astuple(seen(other, depth)) == pytest.approx(wanted, rel=0.02, abs=1e-3)


def test_one_saturated_channel_counts():
    pixels = np.full((SIDE, SIDE, 3), 100, np.uint8)
    pixels[: SIDE // 4, :, 2] = 255
    assert seen(pixels).saturated_share == pytest.approx(0.25)


def test_saturation_is_that_of_the_sensor_and_brightness_that_after_correction():
    sensor = np.full((SIDE, SIDE), 255, np.uint8)
    corrected = np.full((SIDE, SIDE), 0.6, np.float32)
    found = measured(glimpse(corrected, 8, VIEW, registered=True, sensor_pixels=sensor))
    assert found.saturated_share == 1.0
    assert found.brightness == pytest.approx(0.6, abs=0.003)


@pytest.mark.parametrize(
    ("size", "view_side", "wanted"),
    [((1000, 1000), 256, (250, 250)), ((1000, 1000), 512, (250, 250)), ((640, 640), 512, (320, 320)),
     ((300, 300), 256, (300, 300)), ((460, 1130), 256, (115, 282)), ((5, 3000), 256, (1, 600))],
)  # fmt: skip
def test_a_frame_is_shrunk_by_a_whole_factor_to_the_detectors_scale_at_most_320_px(size, view_side, wanted):
    view = View(view_side, view_side, colour=False, reference_size=size)
    assert glimpse(np.zeros(size, np.uint8), 8, view, registered=True).gray.shape == wanted


def test_only_the_region_counts_where_the_product_is_not_registered():
    view = dataclasses.replace(VIEW, region=Rectangle(40, 80, 100, 60))
    pixels = np.full((SIDE, SIDE), 10, np.uint8)
    pixels[80:140, 40:140] = 200
    assert seen(pixels, view=view, registered=False).brightness == pytest.approx(200 / 255)
    assert seen(pixels, view=view, registered=True).brightness < 0.15
    small = pixels[:100, :100]  # a frame that the region does not fit into is refused elsewhere
    assert seen(small, view=view, registered=False).brightness < 0.3


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({}, None),
        ({"brightness": 0.1, "dark_level": 0.02}, "too_dark"),
        ({"brightness": 0.1}, None),  # the ground is as bright as ever: no part, or a dark one
        ({"dark_level": 0.02}, None),
        ({"brightness": 0.6, "bright_level": 0.9}, "saturated"),
        ({"brightness": 0.6}, None),
        ({"saturated_share": 0.2, "bright_level": 1.0}, "saturated"),
        ({"saturated_share": 0.2}, None),
        ({"sharpness": 1.4}, "blurred"),
        ({"brightness": 0.1, "dark_level": 0.02, "sharpness": 1.0}, "too_dark"),
    ],
)
def test_a_frame_is_refused_for_its_cause_the_lamp_before_the_focus(change, cause):
    complaint = LIMITS.complaint(dataclasses.replace(FINE, **change))
    assert (None if complaint is None else complaint.cause) == cause


def test_a_refusal_says_what_was_measured_what_was_wanted_and_what_to_do():
    dark = LIMITS.complaint(dataclasses.replace(FINE, brightness=0.012, dark_level=0.012))
    assert dark.detail == "brightness 0.012, need 0.200: check the lamp and the exposure"
    soft = LIMITS.complaint(dataclasses.replace(FINE, sharpness=1.234))
    assert soft.detail.startswith("sharpness 1.23, need 1.50: check focus")


# ---- what good parts leave room for ----------------------------------------------------------------------------------


def drawn(count: int) -> list[Glimpse]:
    """Return pictures of rectangles with edges as lenses draw them, and a little noise."""
    parts = []
    for number in range(count):
        generator = np.random.default_rng(number)
        picture = np.full((128, 128), 60.0)
        for x, y, width, height in generator.integers(8, 60, (12, 4)):
            picture[y : y + height, x : x + width] = generator.uniform(40, 160)
        picture = cv2.GaussianBlur(picture, (0, 0), 0.7) + generator.normal(0, 1.0, picture.shape)
        parts.append(as_plain(np.clip(np.rint(picture), 0, 255).astype(np.uint8)))
    return parts


def textured(count: int, light: tuple[float, ...] = (1.0,)) -> list[Glimpse]:
    """Return pictures of one texture that come under these lights in turn."""
    pictures = [cv2.GaussianBlur(noise(128, seed=number, sd=60), (0, 0), 1.5) for number in range(count)]
    return [
        as_plain(np.clip(np.rint(picture * light[number % len(light)]), 0, 255).astype(np.uint8))
        for number, picture in enumerate(pictures)
    ]


def under(good: list[Glimpse], gain: float) -> list[Glimpse]:
    return [as_plain(np.clip(np.rint(part.gray * gain), 0, 255).astype(np.uint8)) for part in good]


def causes(good: list[Glimpse], limits: ConditionLimits) -> set[str | None]:
    found = (limits.complaint(measured(part)) for part in good)
    return {None if complaint is None else complaint.cause for complaint in found}


def test_a_fifth_more_or_less_light_is_let_through_and_half_or_twice_is_not():
    good = textured(12)
    limits = learn_limits(good)
    for gain in (0.8, 1.0, 1.2):
        assert causes(under(good, gain), limits) == {None}
    assert causes(under(good, 0.5), limits) == {"too_dark"}
    assert causes(under(good, 2.0), limits) == {"saturated"}


@pytest.mark.parametrize("sigma_px", [2.0, 2.5, 4.0])
def test_lost_focus_is_told_also_under_noise(sigma_px):
    good = drawn(12)
    limits = learn_limits(good)
    for number, part in enumerate(good):
        soft = cv2.GaussianBlur(part.gray, (0, 0), sigma_px) + np.random.default_rng(number).normal(0, 1, (128, 128))
        assert causes([as_plain(np.clip(np.rint(soft), 0, 255).astype(np.uint8))], limits) == {"blurred"}


@pytest.mark.parametrize("soft_px", [0.3, 0.8, 1.5])
def test_a_hole_in_a_fine_texture_is_not_taken_for_lost_focus(soft_px):
    good = [as_plain(cv2.GaussianBlur(noise(seed=number, sd=60), (0, 0), soft_px)) for number in range(12)]
    limits = learn_limits(good)
    holed = []
    for part in good:
        pixels = part.gray.copy()
        pixels[20:80, 20:80] = 30
        holed.append(as_plain(cv2.GaussianBlur(pixels, (0, 0), 0.7)))
    assert causes(holed, limits) == {None}


def test_parts_that_differ_get_more_room_and_few_of_them_still_more():
    even, varied = learn_limits(textured(12)), learn_limits(textured(12, light=(0.7, 0.85, 1.0, 1.15)))
    assert varied.least_brightness < 0.65 * even.least_brightness
    few = learn_limits(textured(4, light=(0.7, 0.85, 1.0, 1.15)))
    assert few.least_brightness < 0.8 * varied.least_brightness


def test_no_limit_of_darkness_lies_below_black():
    assert learn_limits([as_plain(np.full((64, 64), 2, np.uint8))] * 3).dark_level == BLACK


def test_parts_without_any_edge_are_never_blurred():
    limits = learn_limits([as_plain(np.full((64, 64), 100, np.uint8))] * 5)
    assert limits.least_sharpness == 0.0


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_good_frames_are_refused(count):
    with pytest.raises(CalibrationError, match=f"{count} good frames found, need 2"):
        learn_limits(textured(count))


def test_what_the_limits_notice_is_told_and_what_varies_on_good_parts_is_not_noticed():
    good = textured(12)
    told = noticed(good, learn_limits(good))
    assert (told["half the light"], told["twice the light"]) == (1.0, 1.0)
    assert noticed(drawn(12), learn_limits(drawn(12)))["a blur of 2.5 px"] == 1.0
    varied = textured(24, light=(0.35, 0.6, 1.0))
    assert noticed(varied, learn_limits(varied))["half the light"] < 0.5
    fine = [as_plain(noise(seed=number)) for number in range(8)]
    assert noticed(fine, learn_limits(fine))["a blur of 2.5 px"] == 0.0


# ---- the simulated line ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def line() -> SimulatedLine:
    return SimulatedLine(LineSettings(seed=7, width_px=SIDE, height_px=SIDE, shift_px=10.0, defect_share=0.3))


@pytest.fixture(scope="module")
def limits(line) -> ConditionLimits:
    learnt = SimulatedLine(dataclasses.replace(line.settings, lot=1, defect_share=0.0))
    return learn_limits([frame_of(learnt, learnt.plan(number)) for number in range(1, 21)])


def frame_of(line: SimulatedLine, plan: PartPlan) -> Glimpse:
    return glimpse(line.render(plan)[0], 8, VIEW, registered=True)


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("dark", "too_dark"),
        ("saturated", "saturated"),
        ("blurred", "blurred"),
        ("wrong_part", None),
        ("half_out", None),
    ],
)
def test_each_fault_of_the_line_has_its_cause(line, limits, kind, cause):
    plans = [dataclasses.replace(line.plan(number), kind=kind, defect=None) for number in range(1, 9)]
    assert causes([frame_of(line, plan) for plan in plans], limits) == {cause}


def test_no_part_of_the_line_good_or_defective_is_refused(line, limits):
    plans = [line.plan(number) for number in range(1, 61)]
    assert {plan.kind for plan in plans} == {"good", "defective"}
    assert causes([frame_of(line, plan) for plan in plans], limits) == {None}


def test_an_empty_belt_is_neither_dark_nor_blurred(line, limits):
    empty = [dataclasses.replace(line.plan(number), shift_px=(5.0 * SIDE, 0.0)) for number in range(1, 9)]
    assert causes([frame_of(line, plan) for plan in empty], limits) == {None}
