"""Judges: each learns from vectors (n, D) of good parts which are usual, and gives a vector a score of 0 or more.

Neighbours is paper 002's (eq. 4). The others are the one-class methods that paper 001 compares with (table III), which
does not say what it gave them. Reading: vectors standardised and reduced to their strongest principal components, at
most 16 and at most a third as many as images, so that a covariance can be estimated. scikit-learn learns; what it
learnt is written out as tensors, so that the graph computes the same. Their scores keep scikit-learn's order:

gmm    nats below the highest density that the mixture can reach
ocsvm  sum of the dual coefficients minus the decision's kernel sum
lof    the local outlier factor itself, about 1 for a usual part
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import LocalOutlierFactor
from sklearn.svm import OneClassSVM
from torch import Tensor, nn

from trainer.errors import TrainingError
from trainer.learning import Options

MOST_COMPONENTS = 16
MOST_MIXED = 3  # Gaussians; how many is chosen by BIC
RIDGE = 1e-2  # added to the covariances' diagonals; the components have variance 1
NU = 0.1  # ocsvm: share of the good images that may lie outside
Judging = Callable[[Tensor, Options], nn.Module]
"""Learns from vectors (n, D) what is usual: -> module (N, D) -> score (N,)."""


class Standard(nn.Module):
    """Vectors (N, D) with every dimension brought to mean 0 and deviation 1 over the good ones (paper 002, sec. 3.2).

    A dimension that is the same in all good images counts with the mean deviation of the others.
    """

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        deviation = vectors.std(0, correction=0)
        usual = deviation.mean().clamp(min=1e-6)
        self.register_buffer("mean", vectors.mean(0))
        self.register_buffer("scale", 1.0 / torch.where(deviation > 1e-3 * usual, deviation, usual))

    def forward(self, vectors: Tensor) -> Tensor:
        """Return vectors of the same shape."""
        return (vectors - self.mean) * self.scale


class Neighbours(nn.Module):
    """Vectors (N, D) -> mean distance to the k nearest good vectors, (N,), after standardising."""

    def __init__(self, vectors: Tensor, k: int) -> None:
        super().__init__()
        self.standard = Standard(vectors)
        self.register_buffer("memory", self.standard(vectors))  # (n, D)
        self.k = k

    @classmethod
    def of(cls, vectors: Tensor, options: Options) -> Neighbours:
        """Return what good vectors (n, D) teach."""
        enough_neighbours(len(vectors), options)
        return cls(vectors, options.neighbours)

    def forward(self, vectors: Tensor) -> Tensor:
        """Return one distance per vector; differences are taken directly, so that a known vector is at exactly 0."""
        distances = (self.standard(vectors)[:, None] - self.memory).square().sum(2).sqrt()  # (N, n)
        return torch.topk(distances, self.k, dim=1, largest=False).values.mean(1)


class Reduced(nn.Module):
    """Vectors (N, D) -> (N, d): standardised, then whitened principal components."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.standard = Standard(vectors)
        scaled = self.standard(vectors).numpy()
        count = max(1, min(MOST_COMPONENTS, len(scaled) // 3, scaled.shape[1]))
        found = PCA(count, whiten=True, svd_solver="full").fit(scaled)
        self.register_buffer("mean", as_tensor(found.mean_))
        axes = found.components_ / np.sqrt(np.maximum(found.explained_variance_, 1e-12))[:, None]
        self.register_buffer("axes", as_tensor(axes.T).contiguous())  # (D, d)

    def forward(self, vectors: Tensor) -> Tensor:
        """Return the reduced vectors."""
        reduced: Tensor = (self.standard(vectors) - self.mean) @ self.axes
        return reduced


class Mixture(nn.Module):
    """Vectors (N, D) -> nats below the mixture's bound, (N,)."""

    def __init__(self, reduced: Reduced, mixture: GaussianMixture) -> None:
        super().__init__()
        self.reduced = reduced
        roots = mixture.precisions_cholesky_  # (m, d, d)
        d = roots.shape[1]
        heights = (
            np.log(mixture.weights_)
            + np.log(np.diagonal(roots, axis1=1, axis2=2)).sum(1)
            - 0.5 * d * math.log(2 * math.pi)
        )  # log density of each Gaussian at its own centre
        self.register_buffer("centres", as_tensor(np.einsum("md,mde->me", mixture.means_, roots)))  # (m, d)
        self.register_buffer("roots", as_tensor(roots))
        self.register_buffer("below", as_tensor(heights - np.logaddexp.reduce(heights)))  # (m,)
        self.bound = float(np.logaddexp.reduce(heights))

    @classmethod
    def of(cls, vectors: Tensor, options: Options) -> Mixture:
        """Return what good vectors (n, D) teach."""
        reduced = Reduced(vectors)
        points = reduced(vectors).double().numpy()
        tried = [
            GaussianMixture(count, reg_covar=RIDGE, random_state=options.seed).fit(points)
            for count in range(1, MOST_MIXED + 1)
            if len(points) >= 10 * count or count == 1
        ]
        return cls(reduced, min(tried, key=lambda mixture: float(mixture.bic(points))))

    def forward(self, vectors: Tensor) -> Tensor:
        """Return one score per vector."""
        points = self.reduced(vectors)
        white = torch.matmul(points[None], self.roots) - self.centres[:, None]  # (m, N, d)
        exponents = self.below[:, None] - 0.5 * white.square().sum(2)  # (m, N)
        highest = exponents.amax(0)
        return -(highest + (exponents - highest).exp().sum(0).log())


class OneClass(nn.Module):
    """Vectors (N, D) -> how much of the support is out of reach, (N,)."""

    def __init__(self, reduced: Reduced, machine: OneClassSVM) -> None:
        super().__init__()
        self.reduced = reduced
        self.register_buffer("support", as_tensor(machine.support_vectors_))  # (s, d)
        self.register_buffer("duals", as_tensor(machine.dual_coef_[0]))  # (s,)
        self.gamma = float(machine._gamma)
        self.boundary = float(machine.dual_coef_.sum() + machine.intercept_[0])  # our score where the decision is 0

    @classmethod
    def of(cls, vectors: Tensor, options: Options) -> OneClass:  # noqa: ARG003 all judges are called alike
        """Return what good vectors (n, D) teach."""
        reduced = Reduced(vectors)
        return cls(reduced, OneClassSVM(nu=NU, gamma="scale").fit(reduced(vectors).double().numpy()))

    def forward(self, vectors: Tensor) -> Tensor:
        """Return one score per vector."""
        squared = (self.reduced(vectors)[:, None] - self.support).square().sum(2)  # (N, s)
        return ((1.0 - (-self.gamma * squared).exp()) * self.duals).sum(1)


class OutlierFactor(nn.Module):
    """Vectors (N, D) -> local outlier factors, (N,)."""

    def __init__(self, reduced: Reduced, points: Tensor, k: int) -> None:
        super().__init__()
        self.reduced = reduced
        found = LocalOutlierFactor(n_neighbors=k, novelty=True).fit(points.double().numpy())
        self.register_buffer("points", points)  # (n, d)
        self.register_buffer("reach", as_tensor(found._distances_fit_X_[:, k - 1]))  # (n,) to their k-th neighbour
        self.register_buffer("density", as_tensor(found._lrd))  # (n,) local reachability density
        self.k = k

    @classmethod
    def of(cls, vectors: Tensor, options: Options) -> OutlierFactor:
        """Return what good vectors (n, D) teach."""
        enough_neighbours(len(vectors) - 1, options)  # each is compared with the others
        reduced = Reduced(vectors)
        return cls(reduced, reduced(vectors), options.neighbours)

    def forward(self, vectors: Tensor) -> Tensor:
        """Return one factor per vector. Source: Breunig et al. 2000, definitions 5-7."""
        distances = (self.reduced(vectors)[:, None] - self.points).square().sum(2).sqrt()  # (N, n)
        nearest, which = torch.topk(distances, self.k, dim=1, largest=False)
        flat = which.flatten()
        reach = torch.index_select(self.reach, 0, flat).reshape(which.shape)
        density = torch.index_select(self.density, 0, flat).reshape(which.shape)
        return density.mean(1) * torch.maximum(nearest, reach).mean(1)


def as_tensor(values: NDArray[np.float64]) -> Tensor:
    """Return scikit-learn's numbers as float32."""
    return torch.from_numpy(np.asarray(values, dtype=np.float32).copy())


def enough_neighbours(found: int, options: Options) -> None:
    """Raise TrainingError if fewer good images are left to compare with than neighbours are wanted."""
    if found < options.neighbours:
        raise TrainingError(
            f"{found} good images left to compare with, {options.neighbours} neighbours wanted: capture more good "
            f"parts, or give --neighbours {max(1, found // 3)}"
        )
