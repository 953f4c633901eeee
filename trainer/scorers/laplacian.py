"""laplacian: L1 over a Laplacian pyramid of the difference between image and reconstruction.

Source: paper 001, fig. 4 and sec. III-C, which names the loss and gives no formula. Reading chosen: the pyramid of Burt
and Adelson with the binomial kernel (1 4 6 4 1)/16, each level weighted with the number of pixels that one of its own
stands for (4^level, as Bojanowski et al. 2018, arXiv:1707.05776, do); halved until the shorter side has 8 px or less.
The pyramid is linear: that of the difference is the difference of the pyramids. The score is divided by the kept
pixels. Map: the levels' absolute values, enlarged and added.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.learning import Material, Options, Progress
from trainer.rounded import length, slope

SMALLEST = 8  # px, shorter side of the last level
BINOMIAL = (1.0, 4.0, 6.0, 4.0, 1.0)


def fit(network: nn.Module, material: Material, learn: Tensor, options: Options, progress: Progress) -> nn.Module:
    """Return the scorer; there is nothing to learn."""
    del network, learn, options, progress
    return Laplacian(material.keep, material.batch.shape[1])


class Pyramid(nn.Module):
    """difference (N, C, h, w) -> its levels, finest first, each half as wide as the one before.

    At the border the kernel's weights inside the image are scaled up to a sum of 1.
    """

    def __init__(self, channels: int, height: int, width: int, flat: float = 0.0) -> None:
        """flat: absolute values below it are rounded off, in loss and gradient."""
        super().__init__()
        self.flat = flat
        self.channels = channels
        self.depth = max(1, math.ceil(math.log2(min(height, width) / SMALLEST)))
        line = torch.tensor(BINOMIAL) / sum(BINOMIAL)
        self.register_buffer("kernel", (line[:, None] * line).expand(channels, 1, 5, 5).contiguous())
        fine = torch.ones(1, channels, height, width)
        for level in range(self.depth):
            coarse = self._narrowed(fine)
            self.register_buffer(f"shrinks_{level}", 1.0 / coarse)
            self.register_buffer(f"widens_{level}", 1.0 / self._spread(torch.ones_like(coarse), fine))
            fine = torch.ones_like(coarse)

    def forward(self, difference: Tensor) -> list[Tensor]:
        """Return depth + 1 levels; the last is what is left of the image itself."""
        levels, coarse = [], difference
        for level in range(self.depth):
            fine, coarse = coarse, self._narrowed(coarse) * self._scale("shrinks", level)
            levels.append(fine - self.widened(coarse, fine, level))
        return [*levels, coarse]

    def widened(self, coarse: Tensor, fine: Tensor, level: int) -> Tensor:
        """Return a level's coarse remainder at the size of `fine`."""
        return self._spread(coarse, fine) * self._scale("widens", level)

    def loss(self, levels: list[Tensor]) -> Tensor:
        """Return (N,): the levels' absolute values, each times the pixels that it stands for."""
        sums = [4.0**level * length(values, self.flat).flatten(1).sum(1) for level, values in enumerate(levels)]
        return torch.stack(sums).sum(0)

    def gradient(self, levels: list[Tensor]) -> Tensor:
        """Return the gradient of `loss` by the difference."""
        gradient = 4.0**self.depth * slope(levels[-1], self.flat)
        for level in reversed(range(self.depth)):
            fine = 4.0**level * slope(levels[level], self.flat)
            coarse = gradient - self._narrowed(fine * self._scale("widens", level))
            gradient = fine + self._spread(coarse * self._scale("shrinks", level), fine)
        return gradient

    def _scale(self, what: str, level: int) -> Tensor:
        return self.get_buffer(f"{what}_{level}")

    def _narrowed(self, fine: Tensor) -> Tensor:
        return F.conv2d(fine, self.kernel, None, stride=2, padding=2, groups=self.channels)

    def _spread(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """Return the transpose of `_narrowed`, of the shape of `fine`."""
        rest = [fine.shape[axis] - 2 * coarse.shape[axis] + 1 for axis in (2, 3)]
        return F.conv_transpose2d(coarse, self.kernel, None, 2, 2, rest, self.channels)


class Laplacian(nn.Module):
    """image, reconstruction (N, C, h, w), latent -> anomaly_map (N, 1, h, w) in reflectance, score (N,)."""

    def __init__(self, keep: Tensor, channels: int) -> None:
        super().__init__()
        self.register_buffer("keep", keep[None, None])
        self.bands = Pyramid(channels, *keep.shape)  # no name with ".py": the graph is searched for files

    def forward(self, image: Tensor, reconstruction: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Return (anomaly_map, score)."""
        del latent
        levels = self.bands((image - reconstruction) * self.keep)
        places = [level.abs().mean(1, keepdim=True) for level in levels]
        full = [F.interpolate(place, image.shape[2:], mode="bilinear", align_corners=False) for place in places[1:]]
        anomaly_map = (places[0] + torch.stack(full).sum(0)) * self.keep
        return anomaly_map, self.bands.loss(levels) / (image.shape[1] * self.keep.sum())
