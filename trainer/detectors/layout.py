"""Layout: is the picture as a whole a mixture of what good parts show?

Features at stride 16, averaged in an 8x8 grid, make one long vector per image. Principal components of the good images
rebuild it; what they cannot rebuild is the anomaly. It sees what no patch shows: light, a missing or wrong piece.
Source: DFM, Ahuja et al. 2019 (arXiv:1909.11786), the feature reconstruction error.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

GRID = 8
VARIANCE = 0.97  # share of the good images' variance that the components keep


class Layout(nn.Module):
    """Vectors (N, D) -> length of what the components cannot rebuild, (N,)."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        mean, deviation = vectors.mean(0), vectors.std(0)
        scale = 1.0 / (deviation + 1e-3 * deviation.mean() + 1e-6)
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.register_buffer("components", components((vectors - mean) * scale))  # (D, k), orthonormal

    def forward(self, vectors: Tensor) -> Tensor:
        """Return the residual's length."""
        scaled = self.scaled(vectors)
        rest = scaled - (scaled @ self.components) @ self.components.T
        return (rest * rest).sum(1).sqrt()

    def scaled(self, vectors: Tensor) -> Tensor:
        """Return how far each number is from its mean over good images, in deviations, (N, D)."""
        scaled: Tensor = (vectors - self.mean) * self.scale
        return scaled


class Grid(nn.Module):
    """Features (N, D, h', w') -> (N, 64 D): means over an 8x8 grid, as two products, static for every size."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.register_buffer("rows", F.adaptive_avg_pool1d(torch.eye(height), GRID).T.contiguous())  # (8, h')
        self.register_buffer("columns", F.adaptive_avg_pool1d(torch.eye(width), GRID).contiguous())  # (w', 8)

    def forward(self, features: Tensor) -> Tensor:
        """Return one vector per image."""
        return torch.matmul(torch.matmul(self.rows, features), self.columns).flatten(1)


def components(scaled: Tensor) -> Tensor:
    """Return (D, k): the fewest principal components of (n, D) that keep 97 % of the variance, at most n - 2."""
    gram = (scaled @ scaled.T).double()  # n x n: far fewer images than dimensions
    variances, vectors = torch.linalg.eigh(gram)
    variances, vectors = variances.flip(0).clamp(min=0.0), vectors.flip(1)
    needed = int((variances.cumsum(0) / variances.sum().clamp(min=1e-12) < VARIANCE).sum()) + 1
    k = max(1, min(needed, len(scaled) - 2))
    return (scaled.T.double() @ vectors[:, :k] / variances[:k].clamp(min=1e-12).sqrt()).float()


def held_out_residuals(vectors: Tensor, fold: NDArray[np.int64], copies: Tensor) -> tuple[Tensor, float]:
    """Return (residuals (n,), explained): what the components of the other folds, and of their turned copies, leave.

    explained: share of the squared distance from the other folds' mean that their components rebuild, below 1; 0 or
    less where they say nothing of a good image that they have not seen.
    """
    copies_fold = np.tile(fold, len(copies) // len(fold))
    residuals, lengths = torch.empty(len(vectors)), torch.empty(len(vectors))
    for k in range(int(fold.max()) + 1):
        layout = Layout(torch.cat([vectors[fold != k], copies[copies_fold != k]]))
        residuals[fold == k] = layout(vectors[fold == k])
        lengths[fold == k] = layout.scaled(vectors[fold == k]).square().sum(1).sqrt()
    return residuals, 1.0 - float(residuals.square().sum() / lengths.square().sum().clamp(min=1e-12))
