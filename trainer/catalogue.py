"""Every method by its name. To add one: one file, one line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from trainer.detectors import patch_gaussian, patch_layout, patch_memory
from trainer.errors import TrainingError
from trainer.learning import Learned, Material, Method, Options, Progress, in_chunks
from trainer.reconstructors import vae
from trainer.scorers.residual import Residual

RECONSTRUCTORS: dict[str, Callable[[Material, Tensor, Tensor, Options, Progress], nn.Module]] = {
    "vae": vae.fit,
}
SCORERS: dict[str, Callable[[Tensor], nn.Module]] = {
    "residual": Residual,
}
DETECTORS: dict[str, Method] = {
    "patch_layout": patch_layout.fit,
    "patch_memory": patch_memory.fit,
    "patch_gaussian": patch_gaussian.fit,
}
DEFAULT_SCORER = "residual"


def detector_names() -> list[str]:
    """Return every name that `method` understands."""
    return [*DETECTORS, *(f"{reconstructor}+{scorer}" for reconstructor in RECONSTRUCTORS for scorer in SCORERS)]


def method(name: str) -> Method:
    """Return the training of a detector, or of reconstructor+scorer. Raises TrainingError with the names there are."""
    train = _trained_by(name)

    def fit(material: Material, options: Options, progress: Progress) -> Learned:
        if bool(material.keep.all()):
            return train(material, options, progress)
        blind = Ignoring(material.keep, material.batch.mean(0))
        learned = train(replace(material, batch=blind(material.batch)), options, progress)
        return replace(learned, module=nn.Sequential(blind, learned.module).eval())

    return fit


class Ignoring(nn.Module):
    """image -> image with the ignored places as good parts show them on average.

    Zeroing the map is not enough: a feature sees far around its place, so what happens under the mask would still move
    the score beside it.
    """

    def __init__(self, keep: Tensor, usual: Tensor) -> None:
        super().__init__()
        self.register_buffer("keep", keep)  # (h, w)
        self.register_buffer("usual", usual * (1.0 - keep))  # (C, h, w)

    def forward(self, image: Tensor) -> Tensor:
        """(N, C, h, w) -> the same shape."""
        return image * self.keep + self.usual


def _trained_by(name: str) -> Method:
    if name in DETECTORS:
        return DETECTORS[name]
    reconstructor, _, scorer = name.partition("+")
    scorer = scorer or DEFAULT_SCORER
    if reconstructor not in RECONSTRUCTORS or scorer not in SCORERS:
        raise TrainingError(f"detector {name!r}: unknown; there are {', '.join(detector_names())}")

    def fit(material: Material, options: Options, progress: Progress) -> Learned:
        return _fit_pair(reconstructor, scorer, material, options, progress)

    return fit


class Reconstruction(nn.Module):
    """A reconstructor and a scorer as one detector: image (N, C, h, w) -> anomaly_map (N, 1, h, w), score (N,)."""

    def __init__(self, reconstructor: nn.Module, scorer: nn.Module) -> None:
        super().__init__()
        self.reconstructor = reconstructor
        self.scorer = scorer

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return (anomaly_map, score)."""
        anomaly_map, score = self.scorer(image, self.reconstructor(image))
        return anomaly_map, score


def _fit_pair(reconstructor: str, scorer: str, material: Material, options: Options, progress: Progress) -> Learned:
    """Train on all folds but two: one decides when to stop, one is scored unseen for the thresholds."""
    if int(material.fold.max()) + 1 < 3:
        raise TrainingError(f"{len(material)} good images found: a reconstructor needs 3 folds, so at least 3 parts")
    learn, validate, held_out = (
        torch.from_numpy(np.flatnonzero(chosen))
        for chosen in (material.fold >= 2, material.fold == 0, material.fold == 1)
    )
    network = RECONSTRUCTORS[reconstructor](material, learn, validate, options, progress)
    module = Reconstruction(network, SCORERS[scorer](material.keep)).eval()
    maps, scores = in_chunks(module, material.batch[held_out], progress, "held-out scores", size=1)
    return Learned(
        module=module,
        held_out=held_out.numpy(),
        good_scores=scores.double().numpy(),
        good_peaks=maps.flatten(1).amax(1).double().numpy(),
        good_maps=maps[:, 0].numpy(),
    )
