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

Progress = Callable[[str, int, int], None]
"""Called as progress(what, done, total); total may be an upper bound."""


@dataclass(frozen=True, slots=True)
class Options:
    """What a user may choose; every method reads what concerns it."""

    seed: int = 0
    weights: Path | None = None  # backbone file, for plants without PyPI
    memory_entries: int = 4000  # patch_memory, patch_layout: size of the memory
    epochs: int = 200  # reconstructors: at most
    patience: int = 20  # reconstructors: epochs without a better validation loss before they stop
    latent: int = 64  # reconstructors: size of z
    samples: int = 0  # vae: fixed noise vectors at test time, 0 = the mean alone


@dataclass(frozen=True, slots=True)
class Material:
    """Prepared good images."""

    batch: Tensor  # (n, C, h, w) reflectance 0..1
    keep: Tensor  # (h, w) float, 0 where the user wants nothing looked at, else 1
    fold: NDArray[np.int64]  # (n,) 0..k-1: images of one part share a fold
    checkpoint: Path  # where a long training leaves its state, to be resumed
    resume: bool = False

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


class Method(Protocol):
    """One entry of the catalogue."""

    def __call__(self, material: Material, options: Options, progress: Progress) -> Learned:
        """Train on good images only. Raises TrainingError with what to change."""


def at_map_size(keep: Tensor, height: int, width: int) -> Tensor:
    """Return keep (h, w) at a map's size, 1 where at least half of the cell is kept. Result (1, 1, height, width)."""
    shares = F.adaptive_avg_pool2d(keep[None, None], (height, width))
    cells = (shares >= 0.5).to(keep.dtype)
    if not bool(cells.any()):
        raise TrainingError("the ignore mask and the region leave nothing to look at: keep a part of the view")
    return cells


def in_chunks(module: nn.Module, batch: Tensor, progress: Progress, what: str, size: int = 8) -> list[Tensor]:
    """Return module's outputs for a long batch, each concatenated over its chunks; no gradients."""
    outputs: list[list[Tensor]] = []
    with torch.inference_mode():
        for start in range(0, len(batch), size):
            result = module(batch[start : start + size])
            outputs.append(list(result))
            progress(what, min(start + size, len(batch)), len(batch))
    return [torch.cat(parts) for parts in zip(*outputs, strict=True)]
