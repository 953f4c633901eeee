"""residual: the difference between image and reconstruction.

Source: paper 002, baseline AE(L2); paper 000, eq. 3 (L1, summed over the image). The score here is the mean over the
kept pixels, which orders images as the sum does and does not depend on the image size. Option `norm`: 1, absolute
(default), or 2, squared differences; the map of the second is the root, so that both are in reflectance.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.errors import TrainingError
from trainer.learning import Material, Options, Progress

BLUR = 5  # px, box filter against single-pixel noise in the map


def fit(network: nn.Module, material: Material, learn: Tensor, options: Options, progress: Progress) -> nn.Module:
    """Return the scorer; there is nothing to learn. Raises TrainingError for a norm that is neither 1 nor 2."""
    del network, learn, progress
    if options.norm not in (1, 2):
        raise TrainingError(f"norm {options.norm} found, need 1 (absolute) or 2 (squared differences)")
    return Residual(material.keep, options.norm)


class Residual(nn.Module):
    """image, reconstruction (N, C, h, w), latent -> anomaly_map (N, 1, h, w) in reflectance, score (N,)."""

    def __init__(self, keep: Tensor, norm: int = 1) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("keep", keep[None, None])

    def forward(self, image: Tensor, reconstruction: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Return (anomaly_map, score)."""
        del latent
        difference = image - reconstruction
        places = (difference.abs() if self.norm == 1 else difference**2).mean(1, keepdim=True) * self.keep
        score = places.flatten(1).sum(1) / self.keep.sum()
        smooth = blurred(places) * self.keep
        return (smooth if self.norm == 1 else torch.sqrt(smooth)), score


def blurred(places: Tensor) -> Tensor:
    """Return (N, 1, h, w) averaged over 5x5 px."""
    return F.avg_pool2d(F.pad(places, (BLUR // 2,) * 4, mode="replicate"), BLUR, stride=1)
