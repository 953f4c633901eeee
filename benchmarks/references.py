"""PatchCore, PaDiM and DFM as published, on the same backbone: what accuracy.py sets beside our own detectors.

Settings are those of anomalib 2.7, which peers.py runs itself: features of EfficientNet-Lite0 at strides 8 and 16
(PatchCore), 4, 8 and 16 (PaDiM, 100 channels drawn at random) or 16 (DFM); nothing is chosen per product. Trained by
`fit` and exported as our own are; thresholds come from one fold, scored by a model that learnt from the others.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.backbones import lite0
from trainer.detectors.patch_memory import coreset
from trainer.learning import Learned, Material, Method, Options, Progress, held_out_judged, in_chunks

SIGMA = 4  # px, of the blur of the map at the image's size
RATIO, NEIGHBOURS = 0.1, 9  # PatchCore
CHANNELS, RIDGE = 100, 0.01  # PaDiM
POOLING, VARIANCE = 4, 0.97  # DFM


class PatchCore(nn.Module):
    """Roth et al. 2022 (arXiv:2106.08265): distance to the nearest of 10 % of all good patches, weighed as in eq. 7."""

    stages = (2, 4)

    def __init__(self, backbone: nn.Module, seed: int) -> None:
        super().__init__()
        self.backbone, self.seed = backbone, seed

    def features(self, image: Tensor) -> list[Tensor]:
        """(N, C, h, w) -> [(N, 152, h/8, w/8)]."""
        fine, coarse = (F.avg_pool2d(level, 3, stride=1, padding=1) for level in self.backbone(image))
        return [torch.cat([fine, F.interpolate(coarse, size=fine.shape[2:], mode="bilinear")], dim=1)]

    def learn(self, embedded: Tensor) -> None:
        """embedded: (n, 152, h', w')."""
        found = _rows(embedded)
        entries = max(NEIGHBOURS, round(RATIO * len(found)))
        memory = coreset(found, entries, self.seed, lambda *_: None, candidates=len(found))
        self.register_buffer("memory", memory)
        self.register_buffer("squared", (memory * memory).sum(1))
        self.register_buffer("nearest", 0.01 * self.squared.mean())

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return (anomaly_map (N, 1, h, w), score (N,))."""
        embedded = self.features(image)[0]
        count, _, height, width = embedded.shape
        found = _rows(embedded)
        nearest, place = self._squared(found).min(1)
        nearest = torch.maximum(nearest, self.nearest)  # below it rounding rules: a tenth of a patch's length
        distance = nearest.sqrt().reshape(count, height * width)
        score, worst = distance.max(1)
        worst = worst + height * width * torch.arange(count)
        neighbours = self.memory[self._squared(self.memory[place[worst]]).topk(NEIGHBOURS, 1, largest=False).indices]
        apart = (found[worst][:, None] - neighbours).square().sum(2).sqrt()
        weight = 1.0 - torch.softmax(apart, 1)[:, 0]
        shown = F.interpolate(distance.reshape(count, 1, height, width), size=image.shape[2:], mode="nearest")
        return _blurred(shown), weight * score

    def _squared(self, found: Tensor) -> Tensor:
        return (found * found).sum(1, keepdim=True) + self.squared - 2.0 * (found @ self.memory.T)


class PaDiM(nn.Module):
    """Defard et al. 2020 (arXiv:2011.08785): one Gaussian per place, its Mahalanobis distance; score: the maximum."""

    stages = (1, 2, 4)

    def __init__(self, backbone: nn.Module, seed: int) -> None:
        super().__init__()
        self.backbone = backbone
        drawn = torch.randperm(24 + 40 + 112, generator=torch.Generator().manual_seed(seed))[:CHANNELS]
        self.register_buffer("drawn", drawn)

    def features(self, image: Tensor) -> list[Tensor]:
        """(N, C, h, w) -> [(N, 100, h/4, w/4)]."""
        first, *others = self.backbone(image)
        grown = [F.interpolate(level, size=first.shape[2:], mode="nearest") for level in others]
        return [torch.cat([first, *grown], dim=1)[:, self.drawn]]

    def learn(self, embedded: Tensor) -> None:
        """embedded: (n, 100, h', w')."""
        places = embedded.flatten(2).permute(2, 0, 1)  # (h'w', n, 100)
        centre = places.mean(1, keepdim=True)
        roots = []
        for chunk, middle in zip(places.split(256), centre.split(256), strict=True):
            apart = chunk - middle
            covariance = apart.transpose(1, 2) @ apart / (len(embedded) - 1) + RIDGE * torch.eye(CHANNELS)
            lower = torch.linalg.cholesky(covariance)
            roots.append(torch.linalg.solve_triangular(lower, torch.eye(CHANNELS).expand_as(lower), upper=False))
        self.register_buffer("centre", centre.transpose(1, 2))  # (h'w', 100, 1)
        self.register_buffer("root", torch.cat(roots))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return (anomaly_map (N, 1, h, w), score (N,))."""
        embedded = self.features(image)[0]
        white = self.root @ (embedded.flatten(2).permute(2, 1, 0) - self.centre)  # (h'w', 100, N)
        distance = white.square().sum(1).sqrt().T.reshape(len(embedded), 1, *embedded.shape[2:])
        anomaly_map = _blurred(F.interpolate(distance, size=image.shape[2:], mode="bilinear"))
        return anomaly_map, anomaly_map.flatten(1).amax(1)


class Dfm(nn.Module):
    """Ahuja et al. 2019 (arXiv:1909.11786): what 97 % of the good features' variance cannot rebuild, squared."""

    stages = (4,)

    def __init__(self, backbone: nn.Module, seed: int) -> None:
        super().__init__()
        del seed
        self.backbone = backbone

    def features(self, image: Tensor) -> list[Tensor]:
        """(N, C, h, w) -> [(N, 112, h/64, w/64)]."""
        return [F.avg_pool2d(self.backbone(image)[0], POOLING)]

    def learn(self, embedded: Tensor) -> None:
        """embedded: (n, 112, h', w')."""
        vectors = embedded.flatten(1)
        mean = vectors.mean(0)
        _, lengths, directions = torch.linalg.svd((vectors - mean).double(), full_matrices=False)
        kept = int((lengths.square().cumsum(0) / lengths.square().sum() < VARIANCE).sum()) + 1
        self.register_buffer("mean", mean)
        self.register_buffer("components", directions[:kept].T.float())

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return (anomaly_map (N, 1, h, w), score (N,))."""
        embedded = self.features(image)[0]
        vectors = embedded.flatten(1) - self.mean
        rest = (vectors - (vectors @ self.components) @ self.components.T).square()
        places = rest.reshape(embedded.shape).sum(1, keepdim=True)
        return F.interpolate(places, size=image.shape[2:], mode="bilinear"), rest.sum(1)


def reference(kind: Callable[[nn.Module, int], nn.Module], stages: tuple[int, ...]) -> Method:
    """Return the training of one of them for `fit`."""

    def fitted(material: Material, options: Options, progress: Progress) -> Learned:
        network = kind(lite0(stages, options.weights, options.weights_sha256), options.seed).eval()
        with torch.inference_mode():
            (embedded,) = in_chunks(network.features, material.batch, progress, "features")
        held_out = torch.from_numpy(np.flatnonzero(material.fold == 0))
        network.learn(embedded[torch.from_numpy(np.flatnonzero(material.fold != 0))].clone())
        judged = held_out_judged(network, material.batch, held_out, progress)
        network.learn(embedded.clone())  # the same network, now from all
        return judged

    return fitted


REFERENCES: dict[str, Method] = {
    "patchcore": reference(PatchCore, PatchCore.stages),
    "padim": reference(PaDiM, PaDiM.stages),
    "dfm": reference(Dfm, Dfm.stages),
}


def _rows(embedded: Tensor) -> Tensor:
    return embedded.permute(0, 2, 3, 1).reshape(-1, embedded.shape[1])


def _blurred(maps: Tensor) -> Tensor:
    """Return maps (N, 1, h, w) under a Gaussian of 4 px."""
    reach = int(4.0 * SIGMA + 0.5)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / SIGMA) ** 2)
    kernel = kernel / kernel.sum()
    padded = F.pad(maps, (reach,) * 4, mode="reflect")
    rows = F.conv2d(padded, kernel.reshape(1, 1, 1, -1))
    return F.conv2d(rows, kernel.reshape(1, 1, -1, 1))
