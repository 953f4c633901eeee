"""latent_frechet: the Frechet distance between the normal of good codes and that of this image's codes.

Source: paper 001, sec. III-D, tables I, II; Dowson & Landau 1982: |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). The
paper takes it between sets of images: `frechet_distance`. One image has several codes too: of its patches (patch_ae,
kde_ae), or found from several starts (dcgan). Readings chosen: a code counts as its difference from the usual code of
its place or start, since what is usual in one place need not be in another; an image has fewer codes than they have
dimensions, too few for a covariance: the score adds the distances along the principal axes of the good codes, which is
the distance itself where both normals have the same axes. Each axis counts in deviations of good codes: the paper's
codes are standard normal (its good ones are 0.03 from that), ours, of an encoder, spread up to 800 times as far along
one axis as along another, and the widest would be all that counts. Map: the residual.

Of sets of images the whole covariances are compared where each set has at least two images for every dimension, else
the deviations along each dimension alone: a few dozen images do not determine a covariance of 64 dimensions, and the
distance of two sets of good images would then be that of their chance.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.learning import Material, Options, Progress
from trainer.scorers.residual import Residual

ENOUGH = 2  # codes for every dimension, from which on a covariance is worth fitting
FLOOR = 1e-3  # share of the mean variance that is added to each axis's own: some axes hardly vary


def fit(network: nn.Module, material: Material, learn: Tensor, options: Options, progress: Progress) -> nn.Module:
    """Return the scorer with the moments of the codes of material.batch[learn]."""
    del options
    codes = []
    with torch.inference_mode():
        for done, index in enumerate(learn.tolist(), 1):
            codes.append(network.latents(material.batch[index][None])[0])  # type: ignore[operator]
            progress("codes", done, len(learn))
    return LatentFrechet(network, torch.stack(codes).clone(), material.keep)


class LatentFrechet(nn.Module):
    """image, reconstruction (N, C, h, w), latent -> anomaly_map (N, 1, h, w), score (N,) in squared deviations."""

    def __init__(self, network: nn.Module, codes: Tensor, keep: Tensor) -> None:
        super().__init__()
        self.network = network
        self.residual = Residual(keep)
        usual = codes.mean(0)  # codes (n, m, d): of n images
        levels, axes = torch.linalg.eigh(moments((codes - usual).flatten(0, 1))[1])
        self.register_buffer("usual", usual)  # (m, d)
        levels = levels.clamp_min(0.0)
        unit = (levels + FLOOR * levels.mean()).sqrt().clamp_min(1e-12)
        self.register_buffer("axes", (axes / unit).float())  # (d, d)
        self.register_buffer("deviations", (levels.sqrt() / unit).float())  # (d,), 1 but for axes that hardly vary

    def forward(self, image: Tensor, reconstruction: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Return (anomaly_map, score)."""
        anomaly_map, _ = self.residual(image, reconstruction, latent)
        return anomaly_map, self.distance(self.network.latents(image))  # type: ignore[operator]

    def distance(self, codes: Tensor) -> Tensor:
        """Return (N,) of codes (N, m, d)."""
        along = (codes - self.usual) @ self.axes
        mean = along.mean(1)
        variances = (along - mean[:, None]).square().sum(1) / max(1, codes.shape[1] - 1)
        return (mean.square() + (torch.sqrt(variances) - self.deviations).square()).sum(1)


def whole_covariances(*sets: Tensor) -> bool:
    """Return whether each set of codes (n, d) is large enough for a covariance."""
    return all(len(codes) >= ENOUGH * codes.shape[1] for codes in sets)


def diagonal_distance(first: Tensor, second: Tensor) -> float:
    """Return the squared Frechet distance as if the dimensions of both sets (n, d), (m, d) were independent."""
    one, other = first.double(), second.double()
    return float((one.mean(0) - other.mean(0)).square().sum() + (one.std(0) - other.std(0)).square().sum())


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Return the squared Frechet distance between the normals fitted to two sets of codes (n, d), (m, d)."""
    (mean, covariance), (other_mean, other_covariance) = moments(first), moments(second)
    levels, axes = torch.linalg.eigh(covariance)
    root = (axes * levels.clamp_min(0.0).sqrt()) @ axes.T
    shared = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp_min(0.0).sqrt().sum()
    spread = covariance.trace() + other_covariance.trace() - 2.0 * shared
    return float((mean - other_mean).square().sum() + spread)


def moments(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (d,) and covariance (d, d) of codes (n, d), in float64."""
    values = codes.double()
    return values.mean(0), torch.cov(values.T).reshape(codes.shape[1], codes.shape[1])
