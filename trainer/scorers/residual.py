"""residual: the absolute difference between image and reconstruction.

Source: paper 002, baseline AE(L2); paper 000, eq. 3 (L1, summed over the image). The score here is the mean over the
kept pixels, which orders images as the sum does and does not depend on the image size.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

BLUR = 5  # px, box filter against single-pixel noise in the map


class Residual(nn.Module):
    """image, reconstruction (N, C, h, w) -> anomaly_map (N, 1, h, w) in reflectance, score (N,)."""

    def __init__(self, keep: Tensor) -> None:
        super().__init__()
        self.register_buffer("keep", keep[None, None])

    def forward(self, image: Tensor, reconstruction: Tensor) -> tuple[Tensor, Tensor]:
        """Return (anomaly_map, score)."""
        difference = (image - reconstruction).abs().mean(1, keepdim=True) * self.keep
        score = difference.flatten(1).sum(1) / self.keep.sum()
        padded = F.pad(difference, (BLUR // 2,) * 4, mode="replicate")
        return F.avg_pool2d(padded, BLUR, stride=1) * self.keep, score
