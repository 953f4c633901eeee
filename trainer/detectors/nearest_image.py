"""nearest_image: how far is the part, pixel by pixel, from the most similar good image?

Source: paper 002, sec. 4.4, "NN" (Vaikundam et al. 2016): l2 distance between the image and the most similar one of the
good images. Reading: all good images must fit into the recipe, so they are compared in small: averaged over blocks
until the shorter side has at most 64 px.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.learning import Learned, Material, Options, Progress, at_map_size, in_chunks
from trainer.training import enough

SHORTEST_PX = 64


def fit(material: Material, options: Options, progress: Progress) -> Learned:  # noqa: ARG001 nothing to choose
    """Return a detector whose thresholds rest on k-fold held-out scores."""
    enough(material.batch, "detector")
    smaller = Smaller(*material.keep.shape)
    images = smaller(material.batch)
    keep = at_map_size(material.keep, *images.shape[2:])
    scores = torch.empty(len(images))
    maps = torch.empty(len(images), 1, *images.shape[2:])
    folds = int(material.fold.max()) + 1
    for k in range(folds):
        own, others = (torch.from_numpy(chosen) for chosen in (material.fold == k, material.fold != k))
        nearest = Nearest(images[others], keep)
        maps[own], scores[own] = in_chunks(nearest, images[own], progress, "held-out scores", size=1)
    return Learned(
        module=nn.Sequential(smaller, Nearest(images, keep)).eval(),
        held_out=np.arange(len(images)),
        good_scores=scores.double().numpy(),
        good_peaks=maps.flatten(1).amax(1).double().numpy(),
        good_maps=maps[:, 0].numpy(),
    )


class Smaller(nn.Module):
    """image (N, C, h, w) -> (N, C, h / factor, w / factor), averaged over blocks."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.factor = 1
        while min(height, width) // self.factor > SHORTEST_PX and not (height | width) % (2 * self.factor):
            self.factor *= 2

    def forward(self, image: Tensor) -> Tensor:
        """Return the smaller image."""
        return F.avg_pool2d(image, self.factor) if self.factor > 1 else image


class Nearest(nn.Module):
    """Small image (N, C, h', w') -> anomaly_map (N, 1, h', w'), the absolute difference, and score (N,), the distance.

    The distance is the root mean square over the kept pixels.
    """

    def __init__(self, images: Tensor, keep: Tensor) -> None:
        super().__init__()
        self.register_buffer("images", images)  # (n, C, h', w')
        self.register_buffer("keep", keep)  # (1, 1, h', w')

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return (anomaly_map, score)."""
        squared = ((image[:, None] - self.images) * self.keep).square().flatten(2).sum(2)  # (N, n)
        found = torch.index_select(self.images, 0, squared.argmin(1))
        difference = (image - found).abs().mean(1, keepdim=True) * self.keep
        return difference, (squared.amin(1) / (self.keep.sum() * image.shape[1])).sqrt()
