"""What deep_knn, gmm, ocsvm and lof share: one vector per picture for the score, features of each place for the map.

The vector is the global maximum of a pretrained network's last features (level 5), as in paper 002, sec. 4.4. A vector
says nothing of where, so the map is another reading of the same network: at each place of level 4 the root mean square
over the channels of (feature - mean of good parts there) / their deviation there.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.backbones import taps
from trainer.judges import Judging
from trainer.learning import Learned, Material, Options, Progress, at_map_size, in_chunks
from trainer.training import enough

LEVELS = (4, 5)
FLOOR = 0.2  # share of a channel's deviation over all places that is added to each place's own


def fit_embedded(material: Material, options: Options, progress: Progress, learn: Judging) -> Learned:
    """Return a detector whose thresholds rest on k-fold held-out scores: every good image is scored unseen once."""
    enough(material.batch, "detector")
    embedding = Embedding(options)
    vectors, places = in_chunks(embedding, material.batch, progress, "features")
    keep = at_map_size(material.keep, *places.shape[2:])
    scores = torch.empty(len(vectors))
    maps = torch.empty(len(places), 1, *places.shape[2:])
    folds = int(material.fold.max()) + 1
    with torch.inference_mode():
        for k in range(folds):
            own, others = (torch.from_numpy(chosen) for chosen in (material.fold == k, material.fold != k))
            scores[own] = learn(vectors[others], options)(vectors[own])
            maps[own] = Places.of(places[others])(places[own]) * keep
            progress("held-out scores", k + 1, folds)
    return Learned(
        module=Embedded(embedding, learn(vectors, options), Places.of(places), keep).eval(),
        held_out=np.arange(len(vectors)),
        good_scores=scores.double().numpy(),
        good_peaks=maps.flatten(1).amax(1).double().numpy(),
        good_maps=maps[:, 0].numpy(),
    )


class Embedded(nn.Module):
    """image (N, C, h, w) -> anomaly_map (N, 1, h/16, w/16) in deviations of good parts, score (N,) of the judge."""

    def __init__(self, embedding: nn.Module, judge: nn.Module, places: nn.Module, keep: Tensor) -> None:
        super().__init__()
        self.features = embedding
        self.judge = judge
        self.places = places
        self.register_buffer("keep", keep)  # (1, 1, h', w')

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return (anomaly_map, score)."""
        vector, places = self.features(image)
        return self.places(places) * self.keep, self.judge(vector)

    def embedded(self, image: Tensor) -> Tensor:
        """Return the vectors (N, D) that the score rests on."""
        vector: Tensor = self.features(image)[0]
        return vector


class Embedding(nn.Module):
    """(N, C, h, w) -> [(N, D) global maxima of level 5, (N, P, h/16, w/16) features of level 4]."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.backbone = taps(options.backbone, LEVELS, options.weights, options.weights_sha256)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return [vector, places]."""
        fine, coarse = self.backbone(image)
        return [coarse.flatten(2).amax(2), F.avg_pool2d(fine, 3, stride=1, padding=1, count_include_pad=False)]


class Places(nn.Module):
    """Features (N, P, h', w') -> (N, 1, h', w'): how far each place is from good parts, in their deviations."""

    def __init__(self, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)  # (1, P, h', w')
        self.register_buffer("scale", scale)  # (1, P, h', w') 1 / deviation

    @classmethod
    def of(cls, features: Tensor) -> Places:
        """Return what good features (n, P, h', w') teach."""
        mean = features.mean(0, keepdim=True)
        deviation = features.std(0, keepdim=True, correction=0)
        overall = features.std(dim=(0, 2, 3), keepdim=True, correction=0)
        return cls(mean, 1.0 / (deviation + FLOOR * overall + 1e-3))

    def forward(self, features: Tensor) -> Tensor:
        """Return one value per place."""
        return ((features - self.mean) * self.scale).square().mean(1, keepdim=True).sqrt()
