"""The colours of an anomaly map: fixed scale, calm below the threshold, order kept for every eye."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.heatmap import COLOURS, OPACITY, levels, overlay, scale_bar

THRESHOLD = 0.7


def flat(value: float) -> np.ndarray:
    return np.full((4, 6), value, np.float32)


@pytest.mark.parametrize(
    ("times_threshold", "level"), [(-1.0, 0), (0.0, 0), (0.5, 63), (1.0, 127), (2.0, 255), (90.0, 255)]
)
def test_levels_are_fixed_by_the_threshold_alone(times_threshold, level):
    assert (levels(flat(times_threshold * THRESHOLD), THRESHOLD) == level).all()


def test_a_map_below_half_the_threshold_leaves_the_part_as_it_is():
    gray_part = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
    shown = overlay(gray_part, flat(0.49 * THRESHOLD), THRESHOLD)
    np.testing.assert_array_equal(shown, np.repeat(gray_part[:, :, None], 3, axis=2))


def test_nothing_up_to_the_threshold_is_red_however_red_the_part():
    red_part = np.zeros((4, 6, 3), np.uint8)
    red_part[:, :, 0] = 255
    for times_threshold in np.linspace(0.0, 1.0, 21):
        red, green, _ = overlay(red_part, flat(times_threshold * THRESHOLD), THRESHOLD)[0, 0].astype(int)
        assert red - green < 40  # gray or yellow


def test_twice_the_threshold_is_red_on_a_dark_and_on_a_bright_part():
    for lightness in (0.0, 0.5, 1.0):
        red, green, blue = overlay(flat(lightness), flat(2 * THRESHOLD), THRESHOLD)[0, 0].astype(int)
        assert red > 100
        assert green < 60
        assert red > 1.9 * blue


def test_lightness_falls_steadily_above_the_threshold():
    shown = COLOURS * OPACITY[:, None] + 150 * (1 - OPACITY[:, None])
    lightness = shown @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(lightness[128:]) <= 0.01).all()
    assert lightness[128] - lightness[255] > 80


def test_overlay_has_the_size_of_the_part_and_takes_the_map_at_any_size():
    shown = overlay(np.zeros((40, 30, 3), np.float32), np.zeros((5, 4), np.float32), THRESHOLD)
    assert (shown.shape, shown.dtype) == ((40, 30, 3), np.uint8)


def test_the_same_reflectance_looks_the_same_in_every_pixel_type():
    eight = np.array([[0, 51, 255]], np.uint8)
    none = np.zeros((1, 3), np.float32)
    wanted = overlay(eight, none, THRESHOLD)
    np.testing.assert_array_equal(overlay(eight.astype(np.uint16) * 257, none, THRESHOLD), wanted)
    np.testing.assert_array_equal(overlay(eight.astype(np.float32) / 255, none, THRESHOLD), wanted)


def test_the_scale_bar_shows_the_colours_of_the_overlay():
    bar = scale_bar(256, 3)
    assert bar.shape == (3, 256, 3)
    ground = np.full((4, 6), 150, np.uint8)
    for level in (0, 127, 200, 255):
        times_threshold = 2 * (level + 0.5) / 255
        np.testing.assert_array_equal(bar[1, level], overlay(ground, flat(times_threshold), 1.0)[0, 0])
