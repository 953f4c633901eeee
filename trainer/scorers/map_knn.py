"""map_knn: how unlike those of good parts is the whole residual map, as a pretrained network sees it?

Source: paper 002, sec. 3.2, fig. 3, eq. 4: the anomaly map goes through a pretrained network up to its global pooling,
a cascade of poolings gives three times as many features as one global maximum, mean removed and variance scaled, mean
Euclidean distance to the k nearest maps of good parts. The paper took Xception and says that the network is to be
"selected experimentally"; here `--backbone` says.

Readings chosen where the paper is silent: the map is "the difference of the input and reconstructed image" with its
sign, in every channel, brought to 0..1 so that no difference is mid gray (on bottle, 256 px, the AUROC of lite0 is
0.996 to 0.998 for k = 15 to 1, that of absolute differences 0.996 to 0.997); the three poolings are the global maximum,
the global mean, and in cascade the maximum of 3x3 means; k = 15, as the paper says of its baseline. Good maps come from
the images that the reconstructor learnt from, as in the paper. The anomaly map shown is the absolute difference
averaged over 5x5 px.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.backbones import taps
from trainer.judges import Neighbours
from trainer.learning import Material, Options, Progress, in_chunks
from trainer.scorers.residual import blurred

LEVEL = 5  # the end of the network, before its global pooling


def fit(network: nn.Module, material: Material, learn: Tensor, options: Options, progress: Progress) -> nn.Module:
    """Return the scorer. Raises TrainingError if there are fewer good maps than neighbours."""
    embedding = MapEmbedding(options)

    def embedded(image: Tensor) -> list[Tensor]:
        return [embedding(image, network(image)[0], material.keep)]

    vectors = in_chunks(embedded, material.batch[learn], progress, "maps of good parts", size=1)[0]
    return MapNeighbours(embedding, Neighbours.of(vectors.clone(), options), material.keep)


class MapEmbedding(nn.Module):
    """image, reconstruction (N, C, h, w), keep (h, w) -> vectors (N, 3 D)."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.backbone = taps(options.backbone, (LEVEL,), options.weights, options.weights_sha256)

    def forward(self, image: Tensor, reconstruction: Tensor, keep: Tensor) -> Tensor:
        """Return the residual's features after the cascade of poolings."""
        return cascade(self.backbone(0.5 + 0.5 * (image - reconstruction) * keep)[0])


class MapNeighbours(nn.Module):
    """image, reconstruction (N, C, h, w), latent -> anomaly_map (N, 1, h, w) in reflectance, score (N,) a distance."""

    def __init__(self, embedding: MapEmbedding, neighbours: Neighbours, keep: Tensor) -> None:
        super().__init__()
        self.embedding = embedding
        self.neighbours = neighbours
        self.register_buffer("keep", keep)

    def forward(self, image: Tensor, reconstruction: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Return (anomaly_map, score)."""
        del latent
        difference = (image - reconstruction).abs().mean(1, keepdim=True) * self.keep
        return blurred(difference) * self.keep, self.neighbours(self.embedded(image, reconstruction))

    def embedded(self, image: Tensor, reconstruction: Tensor) -> Tensor:
        """Return the vectors (N, 3 D) that the score rests on."""
        vectors: Tensor = self.embedding(image, reconstruction, self.keep)
        return vectors


def cascade(features: Tensor) -> Tensor:
    """Return (N, 3 D) of (N, D, h, w): global maximum, global mean, maximum of 3x3 means."""
    means = F.avg_pool2d(features, 3, stride=1, padding=1, count_include_pad=False)
    return torch.cat([features.flatten(2).amax(2), features.flatten(2).mean(2), means.flatten(2).amax(2)], dim=1)
