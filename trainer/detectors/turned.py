"""Turned copies of good parts, for parts that lie at any angle and are not registered.

A detector that has seen a part at few angles takes the others for defects. Whether parts lie at any angle is decided
from good images alone: if they do, the patches of a good part find their nearest among other parts turned at random as
often as among those parts as they are.
Measured in docs/detectors.md.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.learning import Material, Options, Progress, in_chunks

ANY_ANGLE = 0.1  # see `nearer_turned`: above it parts lie at any angle (docs/detectors.md)
LOOKED_AT = 60  # good images that decide
MOST_COPIES = 4  # of one image
WANTED = 600  # copies of all images; each has at least one


def turned_copies(
    features: nn.Module, material: Material, options: Options, progress: Progress, *, patches: int = 0
) -> list[Tensor]:
    """Return what the features show of turned copies, if parts lie at any angle or the user says so; else none (0, ..).

    features: images -> list of tensors, of which number `patches` is (N, D, h', w'). All images are turned equally
    often, in their order: the copies' folds are those of the images, repeated. With an ignore mask parts are taken to
    lie still: it hides a place of the view.
    """
    none = [seen[:0] for seen in in_chunks(features, material.batch[:1], progress, "angles")]
    if options.turned == "off" or (options.turned == "auto" and not bool(material.keep.all())):
        return none
    generator = torch.Generator().manual_seed(options.seed)
    decided = options.turned == "auto"
    if decided and nearer_turned_of(features, material, generator, progress, patches=patches) < ANY_ANGLE:
        return none
    each = min(MOST_COPIES, max(1, WANTED // len(material)))
    found = [
        in_chunks(features, turned(material.batch, material.aspect, generator), progress, "turned copies")
        for _ in range(each)
    ]
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def turned(batch: Tensor, aspect: float, generator: torch.Generator) -> Tensor:
    """Return images (n, C, h, w), each turned about its centre by a random angle of its own, edge pixels repeated.

    aspect: width over height of what an image shows, so that a circle stays one where the view is stretched.
    """
    angles = torch.rand(len(batch), generator=generator) * 2.0 * math.pi
    cosine, sine, zero = angles.cos(), angles.sin(), torch.zeros(len(batch))
    rows = [torch.stack([cosine, -sine / aspect, zero], 1), torch.stack([sine * aspect, cosine, zero], 1)]
    copies = torch.empty_like(batch)
    for start in range(0, len(batch), 32):  # a grid of all images at once would take as much memory as they do
        part = slice(start, start + 32)
        theta = torch.stack([row[part] for row in rows], 1)  # (n, 2, 3): copy to image, both in -1..1
        grid = F.affine_grid(theta, list(batch[part].shape), align_corners=False)
        copies[part] = F.grid_sample(batch[part], grid, padding_mode="border", align_corners=False)
    return copies


def nearer_turned_of(
    features: nn.Module, material: Material, generator: torch.Generator, progress: Progress, *, patches: int
) -> float:
    """Return `nearer_turned` of at most 60 of the good images; see `turned_copies`."""
    looked_at = np.unique(np.linspace(0, len(material) - 1, LOOKED_AT).round().astype(int))
    batch = material.batch[torch.from_numpy(looked_at)]
    plain, copies = (
        in_chunks(features, images, progress, "angles")[patches]
        for images in (batch, turned(batch, material.aspect, generator))
    )
    return nearer_turned(plain, copies, material.fold[looked_at])


def nearer_turned(plain: Tensor, copies: Tensor, fold: NDArray[np.int64]) -> float:
    """Return how many good patches are nearer to a turned other part than to any other part as it is: a share of votes.

    plain, copies: (n, D, h', w') features of the images and of their copies. A patch votes with the difference of its
    two distances, so that a plain background, which no turning changes, has no say. About a half for parts at any
    angle, nearly 0 for parts that lie still. Corners do not count: turning leaves repeated edge pixels there.
    """
    mean, scale = plain.mean((0, 2, 3), keepdim=True), 1.0 / (plain.std((0, 2, 3), keepdim=True) + 1e-3)
    coarse = [F.avg_pool2d((seen - mean) * scale, 2) for seen in (plain, copies)]
    inner = _disc(*coarse[0].shape[2:])
    places = [seen.permute(0, 2, 3, 1)[:, inner] for seen in coarse]  # (n, places, D)
    half = torch.from_numpy(fold % 2)
    votes, cast = 0.0, 1e-12
    for k in (0, 1):
        banks = [seen[half != k].flatten(0, 1) for seen in places]
        for some in places[0][half == k].flatten(0, 1).split(1024):
            as_they_are, when_turned = (torch.cdist(some, bank).amin(1) for bank in banks)
            votes += float((as_they_are - when_turned).clamp(min=0.0).sum())
            cast += float((as_they_are - when_turned).abs().sum())
    return votes / cast


def _disc(height: int, width: int) -> Tensor:
    """Return (height, width), True within three quarters of the way from the centre to the edges."""
    y, x = (torch.linspace(-1.0 + 1.0 / side, 1.0 - 1.0 / side, side) for side in (height, width))
    return torch.hypot(y[:, None], x[None, :]) < 0.75
