"""Thresholds rest on good parts: a part counts once, and one that was left out counts against them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from calibration.thresholds import rate_upper_bound
from trainer.errors import TrainingError
from trainer.learning import Learned
from trainer.limits import fitted_thresholds, good_parts


def learned(scores: np.ndarray) -> Learned:
    maps = np.zeros((len(scores), 1, 1), np.float32)
    return Learned(torch.nn.Identity(), np.arange(len(scores)), scores, 2.0 * scores, maps)


def test_images_of_one_part_count_as_one_part_with_its_highest_score() -> None:
    scores = np.arange(1.0, 201.0)  # 20 parts, 10 images of each
    good = good_parts(learned(scores), [f"part {index // 10}" for index in range(200)])
    assert good.scores.tolist() == [10.0 * number for number in range(1, 21)]
    thresholds, notes = fitted_thresholds(good, 0.01)
    assert thresholds.n_good == 20
    assert (thresholds.score, thresholds.map) == (200.0, 400.0)
    assert thresholds.false_reject_rate == pytest.approx(1 / 21)
    assert thresholds.rate_upper_bound == rate_upper_bound(20, 1 / 21)
    assert "20 good parts were scored unseen; a false reject rate of 0.01 needs 79 more" in notes[0]


def test_the_stated_bound_holds_where_images_of_a_part_are_alike() -> None:
    generator = np.random.default_rng(0)
    beyond = 0
    for _ in range(400):
        parts = np.repeat(generator.normal(10.0, 1.0, 40), 5)
        names = [f"{index // 5}" for index in range(200)]
        thresholds, _ = fitted_thresholds(good_parts(learned(parts), names), 0.05)
        truly = float((generator.normal(10.0, 1.0, 4000) > thresholds.score).mean())
        beyond += truly > thresholds.rate_upper_bound
    assert beyond / 400 < 0.08  # 5 % promised


def test_a_part_with_an_image_that_was_left_out_counts_as_one_left_out() -> None:
    scores = np.arange(1.0, 61.0)
    names = [f"part {index // 2}" for index in range(60)]
    good = good_parts(learned(scores), names, ["part 29", "part 29", "part 30"])
    assert len(good.scores) == 29
    assert good.left_out == 2
    thresholds, _ = fitted_thresholds(good, 0.05)
    assert thresholds.rate_upper_bound == rate_upper_bound(29, 0.05, left_out=2)
    with pytest.raises(TrainingError, match="--keep-suspects"):
        good_parts(learned(scores[:2]), ["a", "a"], ["a"])
