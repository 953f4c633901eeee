"""Learning without the good images that are none: asked again until nothing is strange, never more than a tenth."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.learning import Learned
from trainer.limits import suspicious_notes
from trainer.strangers import Stranger, learn_without_strangers

FEWEST = 5


class Detector:
    """Scores good parts 0..1; the more defects it has learnt from, the fewer of them are strange to it."""

    def __init__(self, count: int, defects: list[int], seen_at_once: int) -> None:
        self.good = np.random.default_rng(3).exponential(0.2, count)
        self.defects, self.at_once = defects, seen_at_once
        self.learnt_from: list[int] = []  # images of each training

    def __call__(self, kept: NDArray[np.int64]) -> Learned:
        self.learnt_from.append(len(kept))
        scores = self.good[kept].copy()
        strange = [place for place, index in enumerate(kept) if index in self.defects]
        scores[strange[: self.at_once]] += 10.0 + np.arange(len(strange[: self.at_once]))
        held_out = np.arange(len(kept))[::-1]  # not in the order of the images
        maps = np.zeros((len(kept), 2, 2), np.float32) + kept[held_out][:, None, None]
        return Learned(torch.nn.Identity(), held_out, scores[held_out], scores[held_out], maps)


def told(left_out: list[Stranger]) -> list[int]:
    return [stranger.index for stranger in left_out]


def test_the_rest_is_found_once_the_worst_are_gone() -> None:
    detector = Detector(100, [7, 20, 33, 60, 90, 99], seen_at_once=4)
    learned, kept, left_out = learn_without_strangers(100, detector, FEWEST)
    assert told(left_out) == [60, 33, 20, 7, 99, 90]  # worst first, round by round
    assert detector.learnt_from == [100, 96, 94]
    assert list(kept) == [index for index in range(100) if index not in detector.defects]
    assert len(learned.good_scores) == 94
    assert [float(stranger.anomaly_map[0, 0]) for stranger in left_out] == told(left_out)
    assert min(stranger.score for stranger in left_out) > 10.0


def test_a_good_image_that_stands_out_only_beside_a_stranger_stays() -> None:
    """The stranger widens what passes in all folds but its own: image 5 is of its fold."""
    detector = Detector(100, [7], seen_at_once=1)

    def learn(kept: NDArray[np.int64]) -> Learned:
        learned = detector(kept)
        if 7 in kept:
            learned.good_scores[learned.held_out == 5] += 2.0
        return learned

    assert told(learn_without_strangers(100, learn, FEWEST)[2]) == [7]


def test_more_than_a_tenth_is_never_left_out() -> None:
    defects = list(range(0, 90, 6))  # 15 of 100
    detector = Detector(100, defects, seen_at_once=8)
    learned, kept, left_out = learn_without_strangers(100, detector, FEWEST)
    assert told(left_out) == defects[:8][::-1]
    assert len(kept) == len(learned.good_scores) == 92  # the other 7 would be 15


def test_as_many_remain_as_a_training_needs() -> None:
    detector = Detector(20, [3], seen_at_once=1)
    assert told(learn_without_strangers(20, detector, 19)[2]) == [3]
    assert told(learn_without_strangers(20, detector, 20)[2]) == []


def test_one_round_leaves_nothing_out() -> None:
    detector = Detector(100, [7], seen_at_once=1)
    _, kept, left_out = learn_without_strangers(100, detector, FEWEST, rounds=1)
    assert (len(kept), left_out, detector.learnt_from) == (100, [], [100])


def test_strangers_that_stay_in_are_named() -> None:
    good = 10.0 + np.random.default_rng(3).exponential(0.2, 92)
    scores = np.concatenate([good, np.linspace(13.0, 13.7, 8)])  # far apart, but not 1.5 times as high
    (note,) = suspicious_notes(scores, [f"{number}.png" for number in range(100)])
    assert "stand apart from the others (8): 99.png, 98.png, 97.png" in note
    assert suspicious_notes(good, [str(number) for number in range(92)]) == []
