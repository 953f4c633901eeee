"""latent_kde: how rare the image's code is among those of good images, together with the reconstruction error.

Source: paper 003, sec. 2.2, 3.5.1, 4.2. It uses both as "indicators" and says neither how the code is reduced nor how
the two are joined. Readings chosen: the first 8 principal components of the good codes, each with variance 1; a
Gaussian kernel at every good image, bandwidth n^(-1/12) (Scott 1992); surprise = the logarithm of the density of n
codes at one point minus that found, so 0 at least; an image is as odd as the odder of its two indicators, each divided
by the mean + 3 deviations on the good images that decided when to stop. Map: the reconstruction error.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from trainer.errors import TrainingError
from trainer.learning import Material, Options, Progress, in_chunks
from trainer.scorers.residual import Residual

COMPONENTS = 8
LIMIT = 3.0  # deviations
FEWEST = 3  # good images: fewer have no density


def fit(network: nn.Module, material: Material, learn: Tensor, options: Options, progress: Progress) -> nn.Module:
    """Return the scorer with the codes of material.batch[learn]. Raises TrainingError if there are too few."""
    del options
    if len(learn) < FEWEST:
        raise TrainingError(f"{len(learn)} good images left for a density of their codes, need at least {FEWEST}")
    codes = in_chunks(network, material.batch[learn], progress, "codes")[1]
    scorer = LatentKde(codes, material.keep).eval()
    calibrate = material.batch[torch.from_numpy(material.fold == 0)]
    values = [torch.stack(scorer.indicators(image[None], *network(image[None])), 1) for image in calibrate]
    found = torch.cat(values).detach()
    scorer.limits = found.mean(0) + LIMIT * found.std(0, unbiased=False) + 1e-6
    return scorer


class LatentKde(nn.Module):
    """image, reconstruction (N, C, h, w), code (N, d) -> anomaly_map (N, 1, h, w), score (N,) as a share of a limit."""

    def __init__(self, codes: Tensor, keep: Tensor) -> None:
        super().__init__()
        self.residual = Residual(keep)
        mean, axes = principal(codes, COMPONENTS)
        self.register_buffer("mean", mean)  # (d,)
        self.register_buffer("axes", axes)  # (d, r)
        self.register_buffer("kernels", (codes - mean) @ axes)  # (n, r)
        self.bandwidth = len(codes) ** (-1.0 / (axes.shape[1] + 4))
        self.register_buffer("limits", torch.ones(2))

    def forward(self, image: Tensor, reconstruction: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Return (anomaly_map, score)."""
        anomaly_map, error = self.residual(image, reconstruction, latent)
        both = torch.stack([error, self.surprise(latent)], 1) / self.limits
        return anomaly_map, both.amax(1)

    def indicators(self, image: Tensor, reconstruction: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Return (reconstruction error, surprise), each (N,)."""
        return self.residual(image, reconstruction, latent)[1], self.surprise(latent)

    def surprise(self, latent: Tensor) -> Tensor:
        """Return (N,), in nats."""
        reduced = (latent - self.mean) @ self.axes
        squares = (reduced[:, None] - self.kernels).square().sum(2)  # (N, n)
        return math.log(len(self.kernels)) - torch.logsumexp(-0.5 * squares / self.bandwidth**2, 1)


def principal(codes: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the mean (d,) and axes (d, r) that give components of variance 1; r <= most, by the (n, n) products."""
    mean = codes.mean(0)
    centred = (codes - mean).double()
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    values, vectors = values.flip(0)[:most], vectors.flip(1)[:, :most]
    kept = values > 1e-9 * values[0].clamp_min(1e-30)
    axes = centred.T @ vectors[:, kept] / values[kept] * math.sqrt(len(codes))
    return mean, axes.float()
