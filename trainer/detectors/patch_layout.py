"""patch_layout: patch_memory, patch_gaussian and the layout of the whole picture on one backbone.

Each part sees what the others miss: the memory finds strange patches wherever they lie, the Gaussians usual patches at
an unusual place, the layout faults too large or too faint for any patch. Every part's score is brought to mean 0 and
deviation 1 over held-out good images; their weighted sum is the score. Two things are chosen per product, from its good
images: how much the layout counts (`layout_weight`), and whether all learn from turned copies too, where parts lie at
any angle (trainer/detectors/turned.py).

Features averaged over 3x3 neighbours rank parts better, those that are not show better where a fault ends. So the map
is the mean of the memory's and of a second set of Gaussians, the outline, which has no say in the score.
Measured in docs/detectors.md.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.backbones import lite0
from trainer.detectors import patch_gaussian, patch_memory
from trainer.detectors.layout import Grid, Layout, held_out_residuals
from trainer.detectors.turned import turned_copies
from trainer.learning import Learned, Material, Options, Progress, at_map_size, in_chunks

STAGES = (1, 2, 4)  # of Lite0: 24 channels at stride 4, 40 at stride 8, 112 at stride 16
MOST_LAYOUT = 2.0  # the layout counts no more than memory and Gaussians together


def fit(material: Material, options: Options, progress: Progress) -> Learned:
    """Return a detector whose thresholds rest on k-fold held-out scores: every good image is scored unseen once."""
    features = Features(options, *(side // 16 for side in material.batch.shape[2:]))
    sharp, fine, patches, vectors = in_chunks(features, material.batch, progress, "features")
    copies = turned_copies(features, material, options, progress, patches=2)
    keep = at_map_size(material.keep, *fine.shape[2:])
    (outline, outline_maps), (gaussian, gaussian_maps) = (
        patch_gaussian.learned_gaussians(seen, material.fold, keep, options.seed, progress, copies=turned)
        for seen, turned in zip((sharp, fine), copies[:2], strict=True)
    )
    memory, memory_maps = patch_memory.learned_memory(patches, material, keep, options, progress, copies=copies[2])
    count = patch_memory.top_count(keep)
    patch_scores = [patch_memory.top_mean(maps, count) for maps in (memory_maps, gaussian_maps)]
    residuals, explained = held_out_residuals(vectors, material.fold, copies[3])
    parts = torch.stack([*patch_scores, residuals], dim=1)  # (n, 3)
    weights = torch.tensor([1.0, 1.0, layout_weight(explained, options)])
    maps = (memory_maps + outline_maps) / 2.0
    learned = (memory, gaussian, outline, Layout(torch.cat([vectors, copies[3]])))
    return Learned(
        module=PatchLayout(features, learned, Weighing.of(parts, weights)).eval(),
        held_out=np.arange(len(maps)),
        good_scores=held_out_scores(parts, weights, material.fold).double().numpy(),
        good_peaks=maps.flatten(1).amax(1).double().numpy(),
        good_maps=maps[:, 0].numpy(),
        decided=(*_copies_told(len(copies[0]), options), _weight_told(weights, explained, options)),
    )


def layout_weight(explained: float, options: Options) -> float:
    """Return how much the layout counts where memory and Gaussians count 1 each, 0..2, to two decimals.

    As many times as its components explain more than they leave of a good image that they have not seen: a part with a
    fixed layout is rebuilt, a texture, a part at any angle, or one of a few images is not, and there the layout knows
    little. explained: as held_out_residuals gives it.
    """
    if options.layout_weight is not None:
        return options.layout_weight
    known = max(explained, 0.0)
    return round(min(known / max(1.0 - known, 1e-6), MOST_LAYOUT), 2)


def _copies_told(copies: int, options: Options) -> tuple[str, ...]:
    why = "as asked" if options.turned == "on" else "the parts lie at any angle"
    return (f"learnt from {copies} turned copies of the good images: {why}",) if copies else ()


def _weight_told(weights: Tensor, explained: float, options: Options) -> str:
    why = f"it explains {max(explained, 0.0):.0%} of how unseen good images differ"
    told = f"the layout counts {float(weights[2]):g}, each of the patch parts 1: "
    return told + (why if options.layout_weight is None else f"as asked ({why})")


class PatchLayout(nn.Module):
    """image (N, C, h, w) -> anomaly_map (N, 1, h/8, w/8) in deviations above a good part, score (N,)."""

    def __init__(
        self,
        features: nn.Module,
        parts: tuple[patch_memory.PatchMemory, patch_gaussian.PatchGaussian, patch_gaussian.PatchGaussian, Layout],
        weighing: Weighing,
    ) -> None:
        super().__init__()
        self.features = features
        self.memory, self.gaussian, self.outline, self.layout = parts
        self.weighing = weighing

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return (anomaly_map, score)."""
        scores, anomaly_map = self.part_scores(image)
        return anomaly_map, self.weighing(scores)

    def part_scores(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return the raw scores of memory, Gaussians and layout, (N, 3), and the anomaly map."""
        sharp, fine, patches, vectors = self.features(image)
        memory_map, memory_score = self.memory.judged(patches)
        scores = torch.stack([memory_score, self.gaussian.judged(fine)[1], self.layout(vectors)], dim=1)
        return scores, (memory_map + self.outline.judged(sharp)[0]) / 2.0


class Weighing(nn.Module):
    """Scores of the parts (N, 3) -> one score (N,), which has the memory's mean and deviation over good parts.

    So a score stays in deviations above a good part, and is positive, whatever the parts' units.
    """

    def __init__(self, moments: tuple[Tensor, Tensor], weights: Tensor, start: Tensor, step: Tensor) -> None:
        super().__init__()
        self.register_buffer("centre", moments[0])  # (3,)
        self.register_buffer("scale", moments[1])  # (3,)
        self.register_buffer("weights", weights)  # (3,), 0 or more
        self.register_buffer("start", start)
        self.register_buffer("step", step)

    @classmethod
    def of(cls, parts: Tensor, weights: Tensor) -> Weighing:
        """Return the weighing learnt from held-out good images' scores (n, 3)."""
        centre, scale = moments(parts)
        together = ((parts - centre) / scale) @ weights
        return cls((centre, scale), weights, centre[0], scale[0] / moments(together)[1])

    def forward(self, scores: Tensor) -> Tensor:
        """Return the weighted sum of the standardised scores, in the memory's unit."""
        return self.start + self.step * ((scores - self.centre) / self.scale * self.weights).sum(1)


class Features(nn.Module):
    """(N, C, h, w) -> [2 x (N, 64, h/8, w/8), (N, 152, h/8, w/8), (N, 7168)]; one backbone.

    What the outline needs, the Gaussians (the same, averaged over 3x3 neighbours), the memory, the layout.
    """

    def __init__(self, options: Options, height: int, width: int) -> None:
        super().__init__()
        self.backbone = lite0(STAGES, options.weights, options.weights_sha256)
        self.grid = Grid(height, width)  # of the features at stride 16

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return what each part needs."""
        stride_4, stride_8, stride_16 = self.backbone(image)
        sharp = patch_gaussian.joined(stride_4, stride_8)
        fine, coarse = patch_gaussian.averaged(sharp), patch_gaussian.averaged(stride_16)
        coarse = F.interpolate(coarse, size=fine.shape[2:], mode="bilinear", align_corners=False)
        return [sharp, fine, torch.cat([fine[:, -stride_8.shape[1] :], coarse], dim=1), self.grid(stride_16)]


def held_out_scores(parts: Tensor, weights: Tensor, fold: NDArray[np.int64]) -> Tensor:
    """Return (n,) good scores, each fold standardised by what the other folds show; the unit is that of all."""
    scores = torch.empty(len(parts))
    unit = Weighing.of(parts, weights)
    for k in range(int(fold.max()) + 1):
        others = Weighing(moments(parts[fold != k]), weights, unit.start, unit.step)
        scores[fold == k] = others(parts[fold == k])
    return scores


def moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return (mean, deviation) over the first dimension; a deviation is at least 1 % of the mean."""
    centre = values.mean(0)
    return centre, torch.maximum(values.std(0), 0.01 * centre.abs() + 1e-6)
