"""variation: by how many deviations does each pixel differ from what good parts show there?

Source: paper 002, sec. 4.4, "variation" (Steger et al. 2018): mean and standard deviation of every pixel's gray value
over the good images; map = |gray - mean| / deviation, score = sum of squares. For registered parts. The score here is
the mean of squares over the kept pixels, which orders images as the sum does and does not depend on the image size.

Reading: a deviation counts as 1/255 more than it is, the step of an 8-bit camera; some pixels never change.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from trainer.learning import Learned, Material, Options, Progress, in_chunks
from trainer.training import enough

LEAST_DEVIATION = 1.0 / 255.0  # reflectance, added to every pixel's own
LUMINANCE = (0.299, 0.587, 0.114)  # of red, green, blue (ITU-R BT.601)


def fit(material: Material, options: Options, progress: Progress) -> Learned:  # noqa: ARG001 nothing to choose
    """Return a detector whose thresholds rest on k-fold held-out scores."""
    enough(material.batch, "detector")
    scores = torch.empty(len(material))
    maps = torch.empty(len(material), 1, *material.keep.shape)
    folds = int(material.fold.max()) + 1
    for k in range(folds):
        own, others = (torch.from_numpy(chosen) for chosen in (material.fold == k, material.fold != k))
        module = Variation(material.batch[others], material.keep)
        maps[own], scores[own] = in_chunks(module, material.batch[own], progress, "held-out scores")
    return Learned(
        module=Variation(material.batch, material.keep).eval(),
        held_out=np.arange(len(material)),
        good_scores=scores.double().numpy(),
        good_peaks=maps.flatten(1).amax(1).double().numpy(),
        good_maps=maps[:, 0].numpy(),
    )


class Variation(nn.Module):
    """image (N, C, h, w) -> anomaly_map (N, 1, h, w) in deviations, score (N,) their mean square."""

    def __init__(self, images: Tensor, keep: Tensor) -> None:
        super().__init__()
        values = gray(images)
        self.register_buffer("mean", values.mean(0, keepdim=True))
        self.register_buffer("scale", 1.0 / (values.std(0, keepdim=True, correction=0) + LEAST_DEVIATION))
        self.register_buffer("keep", keep[None, None])

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return (anomaly_map, score)."""
        deviations = ((gray(image) - self.mean) * self.scale).abs() * self.keep
        return deviations, deviations.square().flatten(1).sum(1) / self.keep.sum()


def gray(image: Tensor) -> Tensor:
    """Return the gray value (N, 1, h, w) of (N, 1 or 3, h, w)."""
    if image.shape[1] == 1:
        return image
    weights = torch.tensor(LUMINANCE, dtype=image.dtype)[:, None, None]
    return (image * weights).sum(1, keepdim=True)
