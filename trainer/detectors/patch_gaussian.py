"""patch_gaussian: how unlikely is each patch of the part at its place?

One Gaussian per place over whitened features, as in PaDiM (Defard et al. 2020, arXiv:2011.08785), with differences:

* features at strides 4 and 8, reduced to 48 whitened components instead of randomly chosen channels;
* the moments of a place are averaged over its 3x3 neighbours, so that few parts suffice;
* each place of the map is standardised by what held-out good parts have there, as in patch_memory.

For parts that lie still, or registration.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.backbones import lite0
from trainer.detectors.patch_memory import moments, principal, standardised_folds, top_count, top_mean
from trainer.learning import Learned, Material, Options, Progress, at_map_size, in_chunks

STAGES = (1, 2)  # of Lite0: 24 channels at stride 4, 40 at stride 8
COMPONENTS = 48
RIDGE = 0.1  # added to every covariance; the components have variance 1
FLOOR = 1e-3  # of the largest variance, added to each before whitening


def fit(material: Material, options: Options, progress: Progress) -> Learned:
    """Return a detector whose thresholds rest on k-fold held-out maps, as patch_memory's do."""
    features = Features(options)
    embedded = in_chunks(features, material.batch, progress, "features")[0]
    keep = at_map_size(material.keep, *embedded.shape[2:])
    module, maps = learned_gaussians(embedded, material.fold, keep, options.seed, progress, copies=embedded[:0])
    module.features = features
    return Learned(
        module=module.eval(),
        held_out=np.arange(len(maps)),
        good_scores=top_mean(maps, top_count(keep)).double().numpy(),
        good_peaks=maps.flatten(1).amax(1).double().numpy(),
        good_maps=maps[:, 0].numpy(),
    )


def learned_gaussians(
    embedded: Tensor, fold: NDArray[np.int64], keep: Tensor, seed: int, progress: Progress, *, copies: Tensor
) -> tuple[PatchGaussian, Tensor]:
    """Return (detector without a backbone, held-out maps (n, 1, h', w')) of features (n, D, h', w').

    copies: features of turned copies to learn from too, (0, D, h', w') where parts lie still; with them all places are
    judged alike.
    """
    alike = len(copies) > 0
    mean, components = whitening(embedded, keep, seed)
    reduced, reduced_copies = (F.conv2d(seen - mean[:, None, None], components) for seen in (embedded, copies))
    copies_fold = np.tile(fold, len(copies) // len(fold))
    by_fold = [
        Sums.of(torch.cat([reduced[fold == k], reduced_copies[copies_fold == k]])) for k in range(int(fold.max()) + 1)
    ]
    every = sum(by_fold[1:], by_fold[0])
    distances = torch.empty(len(reduced), 1, *reduced.shape[2:])
    for k, own in enumerate(by_fold):
        distances[fold == k] = distance(reduced[fold == k], *gaussians(every - own))
        progress("held-out scores", k + 1, len(by_fold))
    module = PatchGaussian((mean, components), gaussians(every), moments(distances, alike=alike), keep)
    return module, standardised_folds(distances, fold, alike=alike) * keep


class PatchGaussian(nn.Module):
    """image (N, C, h, w) -> anomaly_map (N, 1, h/8, w/8) in deviations above a good part, score (N,)."""

    def __init__(
        self,
        projection: tuple[Tensor, Tensor],  # mean (D,), components (d, D, 1, 1)
        gaussians: tuple[Tensor, Tensor],  # centre (h'w', d, 1) and lower root (h'w', d, d), as `gaussians` gives them
        moments: tuple[Tensor, Tensor],  # usual and spread, each (1, 1, h', w')
        keep: Tensor,  # (1, 1, h', w')
    ) -> None:
        super().__init__()
        self.features: nn.Module = nn.Identity()
        self.register_buffer("mean", projection[0][:, None, None])
        self.register_buffer("components", projection[1])
        self.register_buffer("centre", gaussians[0])
        dimensions = gaussians[1].shape[1]
        rows, columns = torch.tril_indices(dimensions, dimensions)
        filled = torch.full((dimensions, dimensions), len(rows))  # above the diagonal: the zero behind the last number
        filled[rows, columns] = torch.arange(len(rows))
        self.register_buffer("filled", filled.flatten())
        self.register_buffer("lower", F.pad(gaussians[1][:, rows, columns], (0, 1)))  # half the bytes of the roots
        self.register_buffer("usual", moments[0])
        self.register_buffer("spread", moments[1])
        self.register_buffer("keep", keep)
        self.top_count = top_count(keep)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return (anomaly_map, score)."""
        return self.judged(self.features(image)[0])

    def judged(self, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """Return (anomaly_map, score) of features (N, D, h', w') as `features` gives them."""
        reduced = F.conv2d(embedded - self.mean, self.components)
        root = self.lower[:, self.filled].unflatten(1, self.centre.shape[1:2] * 2)
        unlikely = distance(reduced, self.centre, root)
        anomaly_map = (unlikely - self.usual) / self.spread * self.keep
        return anomaly_map, top_mean(anomaly_map, self.top_count)


class Features(nn.Module):
    """(N, C, h, w) -> [(N, 64, h/8, w/8)]: both strides, averaged over 3x3 neighbours, at the coarser grid."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.backbone = lite0(STAGES, options.weights, options.weights_sha256)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return a list of one tensor, as a backbone does."""
        return [averaged(joined(*self.backbone(image)))]


def joined(stride_4: Tensor, stride_8: Tensor) -> Tensor:
    """Return (N, 64, h/8, w/8)."""
    return torch.cat([F.avg_pool2d(stride_4, 2), stride_8], dim=1)


def averaged(seen: Tensor) -> Tensor:
    """Return features (N, D, h', w') averaged over 3x3 neighbours."""
    return F.avg_pool2d(seen, 3, stride=1, padding=1)


@dataclass(frozen=True, slots=True)
class Sums:
    """What a set of images adds to the moments of every place; sets can be added and taken away."""

    count: int
    first: Tensor  # (h', w', d)
    second: Tensor  # (h', w', d, d)

    @classmethod
    def of(cls, reduced: Tensor) -> Sums:
        """Return the sums of (n, d, h', w')."""
        n, d, height, width = reduced.shape
        places = reduced.permute(2, 3, 0, 1).reshape(height * width, n, d)
        second = torch.bmm(places.transpose(1, 2), places)
        return cls(n, places.sum(1).reshape(height, width, d), second.reshape(height, width, d, d))

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.count + other.count, self.first + other.first, self.second + other.second)

    def __sub__(self, other: Sums) -> Sums:
        return Sums(self.count - other.count, self.first - other.first, self.second - other.second)


def gaussians(sums: Sums) -> tuple[Tensor, Tensor]:
    """Return (centre (h'w', d, 1), root (h'w', d, d)): |root (x - centre)| is the Mahalanobis distance at a place."""
    d = sums.first.shape[2]
    centre = _shared(sums.first / sums.count).reshape(-1, d, 1)
    second = _shared(sums.second.flatten(2) / sums.count).reshape(-1, d, d)
    covariance = second - centre @ centre.transpose(1, 2) + RIDGE * torch.eye(d)
    lower = torch.linalg.cholesky(covariance)
    return centre, torch.linalg.solve_triangular(lower, torch.eye(d).expand_as(lower), upper=False).contiguous()


def distance(reduced: Tensor, centre: Tensor, root: Tensor) -> Tensor:
    """Return each place's Mahalanobis distance, (N, 1, h', w')."""
    places = reduced.flatten(2).permute(2, 1, 0)  # (h'w', d, N)
    white = torch.matmul(root, places - centre)
    return (white * white).sum(1).sqrt().T.reshape(reduced.shape[0], 1, *reduced.shape[2:])


def whitening(embedded: Tensor, keep: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return (mean (D,), components (d, D, 1, 1)): channels brought to deviation 1, then the d strongest components."""
    mean, directions, variances = principal(embedded, keep, seed, COMPONENTS)
    return mean, directions * (variances + FLOOR * variances[0]).rsqrt().float()[:, None, None, None]


def _shared(values: Tensor) -> Tensor:
    """Return (h', w', m) averaged over 3x3 neighbours, those outside not counted."""
    planes = values.permute(2, 0, 1)[None]
    return F.avg_pool2d(planes, 3, stride=1, padding=1, count_include_pad=False)[0].permute(1, 2, 0)
