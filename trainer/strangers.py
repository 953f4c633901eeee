"""Good images that had better be none: learn, leave out what scores as no good part does, learn again without.

A detector that has learnt from many defects finds only the worst of them strange; without those it finds the rest. So
it is asked again. One gap a training: a stranger widens what passes in all folds but its own, beside which good images
of its fold stand out until it is gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibration.thresholds import MOST_STRANGERS, strangers
from trainer.learning import Learned

ROUNDS = 4  # trainings at most


@dataclass(frozen=True, slots=True)
class Stranger:
    """A good image that was left out."""

    index: int  # in the whole set
    score: float  # by a model that never saw it
    anomaly_map: NDArray[np.float32]  # (h', w')


def learn_without_strangers(
    count: int, learn: Callable[[NDArray[np.int64]], Learned], fewest: int, rounds: int = ROUNDS
) -> tuple[Learned, NDArray[np.int64], list[Stranger]]:
    """Return what was learnt last, the indices of the images that it was learnt from, and those left out.

    learn: trains on the images of these indices (m,) of 0..count-1. fewest: images that must remain. rounds: trainings
    at most; 1 leaves nothing out. Of count images 10 % at most are left out, the worst of a round first; where a round
    finds more than that, all that it found stays in.
    """
    kept = np.arange(count)
    left_out: list[Stranger] = []
    most = min(math.ceil(MOST_STRANGERS * count), count - fewest)
    learned = learn(kept)
    for _ in range(rounds - 1):
        found = strangers(learned.good_scores, looks=1)
        if len(found) == 0 or len(left_out) + len(found) > most:
            break
        places = learned.held_out[found]
        left_out += [
            Stranger(int(kept[place]), float(learned.good_scores[index]), learned.good_maps[index])
            for index, place in zip(found, places, strict=True)
        ]
        kept = np.delete(kept, places)
        learned = learn(kept)
    return learned, kept, left_out
