"""Drift of the scores of parts that pass: what must be told, and what must not. Seeded throughout."""

import math

import numpy as np
import pytest

from agent.health.drift import LIMIT, WEIGHT, Drift

MEDIAN, DEVIATION, THRESHOLD = 2.0, 0.5, 3.5  # the threshold lies 3 deviations above the median


def watched(scores, threshold=THRESHOLD):
    """Let a station see these scores; return (drift, part at which it was found, or None)."""
    drift, found = Drift(MEDIAN, DEVIATION), None
    for number, score in enumerate(scores, start=1):
        if score <= threshold:
            drift.note(score, threshold)
        if found is None and drift.direction != "none":
            found = number
    return drift, found


def good(n, seed=1, shift=0.0):
    """n scores of good parts, moved by so many deviations."""
    return MEDIAN + DEVIATION * (np.random.default_rng(seed).standard_normal(n) + shift)


@pytest.mark.parametrize("seed", range(5))
def test_good_parts_as_at_calibration_are_no_drift(seed):
    drift, found = watched(good(20_000, seed))
    assert found is None
    assert abs(drift.state().level) < 5 * math.sqrt(WEIGHT / (2 - WEIGHT))  # five standard errors of the average


def test_good_parts_with_a_long_tail_are_no_drift():
    scores = np.random.default_rng(2).lognormal(0.0, 0.5, 100_000)
    median = float(np.median(scores))
    drift = Drift(median, float(1.4826 * np.median(np.abs(scores - median))))
    threshold = float(np.quantile(scores, 0.99))
    for score in scores[scores <= threshold][:20_000]:
        drift.note(score, threshold)
        assert drift.direction == "none"


def test_a_wave_of_defects_is_no_drift():
    generator = np.random.default_rng(3)
    scores = good(5000, 3)
    defective = generator.random(5000) < 0.7
    scores[defective] += DEVIATION * generator.uniform(3.0, 20.0, int(defective.sum()))
    drift, found = watched(scores)
    assert (scores > THRESHOLD).mean() > 0.6
    assert found is None
    assert drift.state().parts == (scores <= THRESHOLD).sum()


def test_defects_that_escape_below_a_high_threshold_are_no_drift_until_they_are_every_third_part():
    high = MEDIAN + 20 * DEVIATION
    scores = good(5000, 4)
    scores[np.random.default_rng(4).random(5000) < 0.2] = high - 0.1
    assert watched(scores, high)[1] is None
    scores[np.random.default_rng(5).random(5000) < 0.6] = high - 0.1
    assert watched(scores, high)[1] is not None


def test_a_slow_creep_towards_the_threshold_is_found_before_a_tenth_of_the_parts_is_rejected():
    n = 20_000
    scores = good(n, 5) + DEVIATION * np.linspace(0.0, 3.0, n)
    drift, found = watched(scores)
    assert drift.state().direction == "up"
    assert (scores[found - 500 : found] > THRESHOLD).mean() < 0.1
    assert (scores[-500:] > THRESHOLD).mean() > 0.4  # where it would have ended


@pytest.mark.parametrize(("shift", "direction"), [(2.0, "up"), (-2.0, "down")])
def test_a_step_of_two_deviations_is_found_within_200_parts_either_way(shift, direction):
    drift, found = watched(good(1000, 6, shift))
    assert drift.direction == direction
    assert LIMIT / 3 < found < 200
    assert drift.state().level == pytest.approx(shift, abs=0.4)


def test_a_near_threshold_does_not_hide_that_half_of_the_good_parts_are_rejected():
    near = MEDIAN + 1.64 * DEVIATION  # 5 % of the good parts above
    drift, found = watched(good(3000, 7, shift=1.64), near)
    assert drift.direction == "up"
    assert found < 1000


@pytest.mark.parametrize("shift", [2.0, -2.0])
def test_drift_is_over_once_the_sum_is_back_at_zero_and_soon(shift):
    drift, _ = watched(good(5000, 8, shift))
    assert drift.direction != "none"
    parts = 0
    for score in good(1000, 9):
        drift.note(min(score, THRESHOLD), THRESHOLD)
        parts += 1
        if drift.direction == "none":
            break
    assert LIMIT / 2 < parts < 100
    assert (drift.state().rising if shift > 0 else drift.state().falling) == 0.0


def test_one_part_counts_three_deviations_at_most():
    drift = Drift(MEDIAN, DEVIATION)
    drift.note(-1e9, THRESHOLD)
    assert drift.state().falling == pytest.approx(2.0)  # clipped to 3, 1 allowed
    assert drift.state().level == pytest.approx(-3.0)


@pytest.mark.parametrize(("median", "deviation"), [(None, 0.5), (2.0, None), (2.0, 0.0)])
def test_a_recipe_without_good_scores_is_not_watched(median, deviation):
    drift = Drift(median, deviation)
    for _ in range(1000):
        drift.note(100.0, 200.0)
    state = drift.state()
    assert (state.watched, state.parts, state.level, state.direction) == (False, 0, None, "none")


def test_a_score_that_is_no_number_is_passed_over():
    drift = Drift(MEDIAN, DEVIATION)
    drift.note(math.nan, THRESHOLD)
    assert drift.state().parts == 0
