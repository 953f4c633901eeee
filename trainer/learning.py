"""What every method is given and what it hands back: the contract between `fit` and the catalogue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.errors import TrainingError

FEWEST_IN_TILES = 7  # good images, for methods that score one fold of five unseen

Progress = Callable[[str, int, int], None]
"""Called as progress(what, done, total); total may be an upper bound."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a user may choose; every method reads what concerns it."""

    seed: int = 0
    weights: Path | None = None  # backbone file, for plants without PyPI
    memory_entries: int = 4000  # patch_memory, patch_layout: size of the memory
    turned: str = "auto"  # patch_layout: learn from turned copies of the good images too, auto | on | off
    layout_weight: float | None = None  # patch_layout: of the layout, each patch part has 1; None = from good images
    epochs: int = 200  # reconstructors: at most
    patience: int = 0  # reconstructors: epochs without a better validation loss before they stop, 0 = the method's own
    latent: int = 64  # reconstructors: size of z
    samples: int = 0  # vae: fixed noise vectors at test time, 0 = the mean alone
    device: str = "cpu"  # reconstructors: where they are trained, cpu | cuda
    wasserstein: bool = False  # dcgan: Wasserstein loss with gradient penalty instead of cross-entropy
    resize: bool = False  # dcgan: enlargement and convolution instead of transposed convolutions
    flip: bool = True  # dcgan: a mirrored good part is a good part
    inversion_steps: int = 4  # dcgan: steps of Adam on z in the graph, 0 = the encoder's answer
    inversion_rate: float = 0.05  # dcgan: length of a step, in deviations of z
    inversion_loss: str = "anogan"  # dcgan: what the steps lower, anogan (pixels and features) | laplacian
    feature_weight: float = 0.1  # dcgan, anogan: weight of the discriminator's features beside the pixels
    masked_share: float = 0.0  # dcgan: share of the view that is left out of the inversion, 0..0.5, where it fits worst
    downsize: int = 2  # patch_ae: by how much the image is made smaller
    patch: int = 32  # patch_ae: side of a patch, pixels of the smaller image, even
    sparsity: float = 1e-3  # patch_ae: weight of the L1 norm of the code
    noise_share: float = 0.1  # noise_ae: share of the good images that get noise
    norm: int = 1  # residual: 1 = absolute, 2 = squared difference
    backbone: str = "lite0"  # lite0 | vgg16 | xception | timm:NAME | torchvision:NAME; patch_* always take lite0
    weights_sha256: str | None = None  # of the weights file, where it is not one of those known here
    neighbours: int = 15  # deep_knn, map_knn, lof: k
    defect_share: float = 0.5  # cnn, vgg16, siamese: share of defective images in what they learn from, 0..0.5


@dataclass(frozen=True, slots=True)
class Defects:
    """Prepared defective images that a user has put beside the good ones, with what is wrong with them."""

    batch: Tensor  # (m, C, h, w) reflectance 0..1
    labels: tuple[str, ...]  # (m,) the folder's name; several types in one part are joined by "+"
    parts: tuple[str, ...]  # (m,) which part each shows
    fold: NDArray[np.int64]  # (m,) 0..k-1 like the good ones', all images of a part in one: 1 is never learnt from

    def __len__(self) -> int:
        return len(self.batch)


@dataclass(frozen=True, slots=True)
class Material:
    """Prepared good images."""

    batch: Tensor  # (n, C, h, w) reflectance 0..1
    keep: Tensor  # (h, w) float, 0 where the user wants nothing looked at, else 1
    fold: NDArray[np.int64]  # (n,) 0..k-1: images of one part share a fold
    checkpoint: Path  # where a long training leaves its state, to be resumed
    resume: bool = False
    aspect: float = 1.0  # width over height of what an image shows, before it was brought to (h, w)
    engine_ms: float | None = None  # what this machine's engine may take for an image: how long dcgan searches
    defects: Defects | None = None  # only methods that say so learn from them
    tiles: int = 1  # images that the view of one good image is cut into

    def __len__(self) -> int:
        return len(self.batch)


@dataclass(frozen=True, slots=True)
class Learned:
    """A trained detector with the evidence for its thresholds."""

    module: nn.Module  # image (N, C, h, w) -> anomaly_map (N, 1, h', w'), score (N,)
    held_out: NDArray[np.int64]  # (m,) indices of good images that were scored by a model which never saw them
    good_scores: NDArray[np.float64]  # (m,) their scores
    good_peaks: NDArray[np.float64]  # (m,) the highest value of their anomaly maps
    good_maps: NDArray[np.float32]  # (m, h', w')
    decided: tuple[str, ...] = ()  # what the method chose from the good images, for people
    learnt_defects: str = ""  # labels | synthetic: the defects that were learnt from; empty: none


class Method(Protocol):
    """One entry of the catalogue."""

    def __call__(self, material: Material, options: Options, progress: Progress) -> Learned:
        """Train on good images only. Raises TrainingError with what to change."""


def split(material: Material, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the indices of good images to learn from, to decide with when to stop, and to score unseen (one fold).

    Raises TrainingError where there are fewer than three folds, so fewer than three parts; in tiles also where a single
    image is left to score unseen: its places have no other to be compared with.
    """
    if int(material.fold.max()) + 1 < 3:
        raise TrainingError(f"{len(material)} good images found: {method} needs 3 folds, so at least 3 parts")
    fold = torch.from_numpy(material.fold)
    learn, decide, unseen = (torch.nonzero(chosen)[:, 0] for chosen in (fold >= 2, fold == 0, fold == 1))
    if 1 < material.tiles == len(unseen):
        raise TrainingError(
            f"{len(material) // material.tiles} good images found: in tiles {method} needs at least {FEWEST_IN_TILES}, "
            "so that 2 can be scored unseen: capture more, or leave --tiles out"
        )
    return learn, decide, unseen


def at_map_size(keep: Tensor, height: int, width: int) -> Tensor:
    """Return keep (h, w) at a map's size, 1 where at least half of the cell is kept. Result (1, 1, height, width)."""
    shares = F.adaptive_avg_pool2d(keep[None, None], (height, width))
    cells = (shares >= 0.5).to(keep.dtype)
    if not bool(cells.any()):
        raise TrainingError("the ignore mask and the region leave nothing to look at: keep a part of the view")
    return cells


def held_out_judged(
    module: nn.Module, batch: Tensor, held_out: Tensor, progress: Progress, *, size: int = 8, learnt_defects: str = ""
) -> Learned:
    """Return the trained module with its answers on the images held_out (m,) of a batch, which it never saw."""
    maps, scores = in_chunks(module, batch[held_out], progress, "held-out scores", size=size)
    return Learned(
        module=module.eval(),
        held_out=held_out.numpy(),
        good_scores=scores.double().numpy(),
        good_peaks=maps.flatten(1).amax(1).double().numpy(),
        good_maps=maps[:, 0].numpy(),
        learnt_defects=learnt_defects,
    )


def in_chunks(module: nn.Module, batch: Tensor, progress: Progress, what: str, size: int = 8) -> list[Tensor]:
    """Return module's outputs for a long batch, each concatenated over its chunks; no gradients."""
    outputs: list[list[Tensor]] = []
    with torch.inference_mode():
        for start in range(0, len(batch), size):
            result = module(batch[start : start + size])
            outputs.append(list(result))
            progress(what, min(start + size, len(batch)), len(batch))
    return [torch.cat(parts) for parts in zip(*outputs, strict=True)]
