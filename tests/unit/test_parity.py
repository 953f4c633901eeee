"""The gate lets an engine judge only if it judges the sealed set as the trainer did."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from recipes import tiny_answer, tiny_recipe

from agent.engines.parity import Parity, Wanted, difference, examined, require, sealed_set, thresholds_serve
from agent.errors import EngineError
from calibration.thresholds import Thresholds

LIMITS = Thresholds(score=1.0, map=2.0, false_reject_rate=0.01, rate_upper_bound=0.03, n_good=99, fitted_on="torch f32")


def compared(wanted_score: float, score: float, tolerance: float = 0.02, off: float = 0.0):
    """Return one part whose map is off at one place that is not its peak."""
    plane = np.array([[4.0, 1.0], [0.0, 0.0]], np.float32)
    found = plane.copy()
    found[1, 1] += off
    return difference(Wanted("part 1", wanted_score, 4.0, plane), found, score, thresholds=LIMITS, tolerance=tolerance)


def passes(part, tolerance: float = 0.02) -> bool:
    return Parity("engine", tolerance, (part,)).passed


def whole(recipe):
    """Return the recipe with whole maps, as since format 2."""
    maps = np.stack([tiny_answer(batch[None])[0][None] for batch in recipe.selftest.batches])
    return dataclasses.replace(recipe, selftest=dataclasses.replace(recipe.selftest, maps=maps))


@pytest.mark.parametrize(
    ("wanted", "found", "off"),
    [(0.5, 0.515, 0.015), (0.5, 0.485, 0.015), (4.0, 4.06, 0.015), (-0.3, -0.2, 0.1), (0.0, 0.0, 0.0)],
)
def test_a_score_counts_relative_to_the_threshold_or_to_itself(wanted, found, off):
    assert compared(wanted, found).of_score == pytest.approx(off)


def test_a_map_counts_at_every_place():
    assert compared(0.5, 0.5, off=0.2).of_map == pytest.approx(0.05)
    assert not passes(compared(0.5, 0.5, off=0.2))
    assert passes(compared(0.5, 0.5, off=0.07))


@pytest.mark.parametrize(
    ("wanted", "found", "flips", "in_band", "good"),
    [
        (0.5, 0.51, False, False, True),
        (0.99, 1.005, True, True, True),  # the precision itself decides here
        (1.01, 1.0, True, True, True),
        (0.97, 1.005, True, False, False),
        (1.03, 1.0, True, False, False),
        (1.0, 1.0, False, True, True),
    ],
)
def test_a_verdict_may_be_another_in_the_grey_band_alone(wanted, found, flips, in_band, good):
    part = compared(wanted, found)
    assert (part.flips, part.in_band, passes(part)) == (flips, in_band, good)


def test_a_flip_outside_the_band_fails_whatever_the_tolerance_of_the_score():
    part = dataclasses.replace(compared(0.97, 1.005), of_score=0.0)
    assert not passes(part)
    with pytest.raises(EngineError, match="another verdict"):
        require(Parity("engine", 0.02, (part,)))


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_what_is_no_number_does_not_pass(score):
    part = compared(0.5, score)
    assert not passes(part)
    with pytest.raises(EngineError, match=rf"self-test: score {score} for 0\.5 on part 1"):
        require(Parity("engine", 0.02, (compared(0.5, 0.9), part)))


def test_a_map_of_another_size_does_not_pass():
    plane = np.zeros((2, 2), np.float32)
    part = difference(Wanted("x", 0.5, 0.0, plane), np.zeros((4, 4), np.float32), 0.5, thresholds=LIMITS, tolerance=1)
    assert part.of_map == float("inf")


def test_the_error_names_the_answer_that_is_furthest_off():
    near, far = compared(0.5, 0.55), compared(0.5, 0.5, off=0.8)
    with pytest.raises(EngineError, match=r"^gpu differs .* by 2\.0e-01 .*self-test: map 4 for 4 on part 1\), at most"):
        require(Parity("gpu", 0.02, (near, far)))


@pytest.mark.parametrize(
    ("fitted_on", "label", "serve"),
    [
        ("torch f32, held-out good images", "openvino f32, 2 threads", True),
        ("torch f32, held-out good images", "tensorrt f16, NVIDIA L4", True),
        ("torch f32, held-out good images", "onnxruntime f32, 2 threads, in place of tensorrt f16", True),
        ("torch f32", "openvino bf16, 2 threads", False),
        ("tensorrt f16, NVIDIA L4", "openvino f32, 2 threads", False),
        ("tensorrt f16, NVIDIA L4", "tensorrt f16, Orin", True),
    ],
)
def test_thresholds_serve_the_precision_they_were_fitted_on_and_f32_serves_f16(fitted_on, label, serve):
    assert thresholds_serve(fitted_on, label) == serve


def test_flips_are_counted_inside_the_band_and_outside():
    parity = Parity("engine", 0.02, (compared(0.99, 1.005), compared(0.5, 1.5), compared(2.0, 0.5), compared(0.5, 0.5)))
    assert (parity.flips, parity.band_flips) == (2, 1)
    assert parity.worst == pytest.approx(1.0)


def test_the_sealed_set_is_the_recipes_with_whole_maps_where_it_has_them():
    recipe = tiny_recipe()
    assert [wanted.anomaly_map for _, wanted in sealed_set(recipe)] == [None, None]
    for batch, wanted in sealed_set(whole(recipe)):
        assert batch.shape == (1, 1, 32, 32)
        np.testing.assert_array_equal(wanted.anomaly_map, tiny_answer(batch)[0])


def test_whole_maps_catch_what_their_peaks_do_not():
    def wrong(batch):
        """Answer rightly but for the place with the least anomaly."""
        anomaly_map, score = tiny_answer(batch)
        anomaly_map[np.unravel_index(anomaly_map.argmin(), anomaly_map.shape)] += 0.01
        return anomaly_map, score

    recipe = tiny_recipe()
    assert examined(tiny_answer, "right", whole(recipe), 1e-3).passed
    assert examined(wrong, "wrong", recipe, 1e-3).passed
    assert not examined(wrong, "wrong", whole(recipe), 1e-3).passed
