"""ssim: one minus the structural similarity of image and reconstruction.

Source: paper 003, sec. 4.3 (fig. 5), AE(SSIM) in 002; Wang et al. 2004 (doi:10.1109/TIP.2003.819861), sec. III-B: 11x11
Gaussian of deviation 1.5, K1 0.01, K2 0.03, range 1, of the gray images (the mean of the channels); at the border they
go on as they end. Score: the mean over the kept pixels; map: averaged over 5x5 px, as the residual's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.learning import Material, Options, Progress
from trainer.scorers.residual import blurred

SIDE, DEVIATION = 11, 1.5  # px
C1, C2 = 0.01**2, 0.03**2


def fit(network: nn.Module, material: Material, learn: Tensor, options: Options, progress: Progress) -> nn.Module:
    """Return the scorer; there is nothing to learn."""
    del network, learn, options, progress
    return Ssim(material.keep)


class Ssim(nn.Module):
    """image, reconstruction (N, C, h, w), latent -> anomaly_map (N, 1, h, w) in 0..2, score (N,)."""

    def __init__(self, keep: Tensor) -> None:
        super().__init__()
        self.register_buffer("keep", keep[None, None])
        line = torch.exp(-0.5 * ((torch.arange(SIDE) - SIDE // 2) / DEVIATION) ** 2)
        line = line / line.sum()
        self.register_buffer("across", line[None, None, None, :])
        self.register_buffer("along", line[None, None, :, None])

    def forward(self, image: Tensor, reconstruction: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Return (anomaly_map, score)."""
        del latent
        x, y = (
            picture.mean(1, keepdim=True) - 0.5 for picture in (image, reconstruction)
        )  # small squares: a variance is the difference of two of them
        mean_x, mean_y = self._mean(x), self._mean(y)
        variance = self._mean(x * x) + self._mean(y * y) - mean_x**2 - mean_y**2
        covariance = self._mean(x * y) - mean_x * mean_y
        mean_x, mean_y = mean_x + 0.5, mean_y + 0.5
        same = (2.0 * mean_x * mean_y + C1) * (2.0 * covariance + C2)
        same = same / ((mean_x**2 + mean_y**2 + C1) * (variance + C2))
        places = (1.0 - same) * self.keep
        return blurred(places) * self.keep, places.flatten(1).sum(1) / self.keep.sum()

    def _mean(self, values: Tensor) -> Tensor:
        """Return the weighted mean round each pixel, of the same shape."""
        padded = F.pad(values, (SIDE // 2,) * 4, mode="replicate")
        return F.conv2d(F.conv2d(padded, self.across), self.along)
