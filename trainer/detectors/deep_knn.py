"""deep_knn: how far is the picture as a whole from the k most similar good ones, as a pretrained network sees it?

Source: paper 002, sec. 4.4, "deep feature" (Perera and Patel 2019): pretrained features of the image, global max
pooling, mean removed and variance scaled, mean Euclidean distance to the k = 15 nearest good images (eq. 4).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.detectors.embedding import Standard, fit_embedded
from trainer.errors import TrainingError
from trainer.learning import Learned, Material, Options, Progress


def fit(material: Material, options: Options, progress: Progress) -> Learned:
    """Return the detector. Raises TrainingError if there are fewer good images than neighbours."""
    return fit_embedded(material, options, progress, Neighbours.of)


class Neighbours(nn.Module):
    """Vectors (N, D) -> mean distance to the k nearest good vectors, (N,), after standardising."""

    def __init__(self, vectors: Tensor, k: int) -> None:
        super().__init__()
        self.standard = Standard(vectors)
        self.register_buffer("memory", self.standard(vectors))  # (n, D)
        self.k = k

    @classmethod
    def of(cls, vectors: Tensor, options: Options) -> Neighbours:
        """Return what good vectors (n, D) teach."""
        enough_neighbours(len(vectors), options)
        return cls(vectors, options.neighbours)

    def forward(self, vectors: Tensor) -> Tensor:
        """Return one distance per vector; differences are taken directly, so that a known vector is at exactly 0."""
        distances = (self.standard(vectors)[:, None] - self.memory).square().sum(2).sqrt()  # (N, n)
        return torch.topk(distances, self.k, dim=1, largest=False).values.mean(1)


def enough_neighbours(found: int, options: Options) -> None:
    """Raise TrainingError if fewer good images are left to compare with than neighbours are wanted."""
    if found < options.neighbours:
        raise TrainingError(
            f"{found} good images left to compare with, {options.neighbours} neighbours wanted: capture more good "
            f"parts, or give --neighbours {max(1, found // 3)}"
        )
