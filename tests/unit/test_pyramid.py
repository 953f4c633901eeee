"""Levels are block means, smoothed once, in gray levels 0..255 whatever the sensor counts."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from calibration.pyramid import fine_level, gradient, reduced, sample, slopes


def counts(shape: tuple[int, ...], bit_depth: int = 8, seed: int = 3) -> np.ndarray:
    dtype = np.uint8 if bit_depth == 8 else np.uint16
    return np.random.default_rng(seed).integers(0, 2**bit_depth, shape, dtype=dtype)


def test_block_means_of_block_means_are_block_means():
    level = counts((61, 74)).astype(np.float32)
    np.testing.assert_allclose(reduced(reduced(level, 2), 3), reduced(level, 6), atol=1e-3)
    np.testing.assert_allclose(reduced(level, 2), level[:60].reshape(30, 2, 37, 2).mean(axis=(1, 3)), atol=1e-3)


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize(("bit_depth", "rounding"), [(8, 0.51), (12, 0.04), (16, 0.01)])
def test_a_fine_level_is_the_smoothed_block_means_in_gray_levels(factor, bit_depth, rounding):
    pixels = counts((60, 72), bit_depth)
    scaled = pixels.astype(np.float32) * np.float32(255 / (2**bit_depth - 1))
    wanted = cv2.GaussianBlur(reduced(scaled, factor), (5, 5), 1.0, borderType=cv2.BORDER_REPLICATE)
    found = fine_level(pixels, bit_depth, factor)
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() < rounding  # block means of counts are whole counts
    np.testing.assert_allclose(fine_level(scaled / np.float32(255), 8, factor), wanted, atol=1e-3)


def test_strong_is_the_99th_percentile_of_the_gradient():
    level = counts((50, 60)).astype(np.float32)
    strength = np.hypot(*gradient(level))
    found = slopes(level)
    np.testing.assert_array_equal(found.strength, strength)
    assert found.strong == pytest.approx(np.quantile(strength, 0.99), rel=0.01)


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (0,)])
def test_a_plane_is_sampled_in_any_shape_of_points(shape):
    generator = np.random.default_rng(1)
    rows, columns = np.mgrid[:40, :50]
    plane = (2.0 * columns - 3.0 * rows + 100).astype(np.float32)
    points = generator.uniform(1, 38, shape) + 1j * generator.uniform(1, 38, shape)
    found = sample(plane, points)
    assert found.shape == shape
    np.testing.assert_allclose(found, 2.0 * points.real - 3.0 * points.imag + 100, atol=0.1)  # 1/32 px
