"""The z whose picture comes nearest to an image: steps of Adam with the gradient written out.

Source: paper 000, eq. 3-5, 12, 14, algorithm 2; paper 001, sec. III-C (loss "laplacian"). Adam: Kingma & Ba 2015,
algorithm 1, with its usual constants but for epsilon (see `Inversion.settle`).

Images are in -1..1 here, as generator and discriminator know them. Of all steps the picture with the least loss is
kept, so that more steps are never worse; z is where the search ended, since which of two losses is less may be
rounding. `Step` alone, exported, is a graph that a host can loop for as long as its takt allows.

Readings chosen: L1 is rounded off below one gray level and rectifiers open gradually (`trainer.rounded`), so that every
engine goes the same way; lambda
("feature_weight", 0.1 as in AnoGAN, Schlegl et al. 2017) weighs sums, as eq. 3-5 write them. Masked inversion without a
box (000 sec. 5.5 draws one by hand): invert, leave out the worst share of 8x8 px cells, invert again from the same
start, twice. The features of a part with a defect see the defect from afar, so the steps behind a mask go by pixels
alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.chain import Chain
from trainer.errors import TrainingError
from trainer.learning import Options
from trainer.rounded import length, slope
from trainer.scorers.laplacian import Pyramid

MOMENTUM, SPREAD = 0.9, 0.999
FLAT = 0.05  # share of the usual slope
GRAY_LEVEL = 2.0 / 255.0  # of images in -1..1
CELL = 8  # px, side of what is masked or not as a whole
MASKED_ROUNDS = 2
LOSSES = ("anogan", "laplacian")


def check_options(options: Options) -> None:
    """Raise TrainingError for options that no inversion can follow, before anything is trained."""
    if options.inversion_loss not in LOSSES:
        raise TrainingError(f"inversion loss {options.inversion_loss!r} found, there are {', '.join(LOSSES)}")
    if not 0.0 <= options.masked_share <= 0.5:
        raise TrainingError(f"masked share {options.masked_share:g} found, need 0 (nothing is masked) to 0.5")
    if options.inversion_steps < 0 or not options.inversion_rate > 0.0 or not options.feature_weight >= 0.0:
        raise TrainingError(
            f"{options.inversion_steps} inversion steps of {options.inversion_rate:g}, feature weight "
            f"{options.feature_weight:g} found: need at least 0 steps of more than 0, a weight of at least 0"
        )


class Distance(nn.Module):
    """How far the picture of z is from an image, and which way to go.

    generator: z (N, d) -> picture (N, C, h, w); features: picture -> the discriminator's last convolution (N, e).
    """

    def __init__(self, generator: nn.Sequential, features: nn.Sequential, size: torch.Size, options: Options) -> None:
        super().__init__()
        self.generator = Chain(generator)
        self.features = Chain(features)
        self.weight = options.feature_weight
        self.bands = Pyramid(*size, flat=GRAY_LEVEL) if options.inversion_loss == "laplacian" else None

    def goal(self, image: Tensor) -> Tensor:
        """Return what `loss` needs to know of the image beside its pixels, the same at every step."""
        features: Tensor = self.features(image)[-1]
        return features

    def loss(self, z: Tensor, image: Tensor, goal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (loss (N,), its gradient by z (N, d), picture)."""
        values = self.generator(z)
        picture = values[-1]
        difference = picture - image
        if self.bands is not None:
            levels = self.bands(difference)
            return self.bands.loss(levels), self.generator.gradient(values, self.bands.gradient(levels)), picture
        loss, by_picture = length(difference, GRAY_LEVEL).flatten(1).sum(1), slope(difference, GRAY_LEVEL)
        if self.weight > 0.0:
            seen = self.features(picture)
            apart = seen[-1] - goal
            loss = loss + self.weight * length(apart, GRAY_LEVEL).sum(1)
            by_picture = by_picture + self.features.gradient(seen, self.weight * slope(apart, GRAY_LEVEL))
        return loss, self.generator.gradient(values, by_picture), picture

    def masked_loss(self, z: Tensor, image: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same by the pixels alone where counted (N, 1, h, w) is 1 (000 eq. 14)."""
        values = self.generator(z)
        difference = (values[-1] - image) * counted
        gradient = self.generator.gradient(values, slope(difference, GRAY_LEVEL))
        return length(difference, GRAY_LEVEL).flatten(1).sum(1), gradient, values[-1]


class Adam(nn.Module):
    """z, momentum, spread, gradient (N, d) and the two corrections (1,) -> the next z, momentum, spread."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("epsilon", torch.tensor([1e-8]))  # as a number the exporter drops it, and 0/0 follows

    def forward(
        self, z: Tensor, moments: tuple[Tensor, Tensor], gradient: Tensor, corrections: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (z, momentum, spread). corrections: 1 - 0.9^t and 1 - 0.999^t at step t = 1, 2, .."""
        momentum = MOMENTUM * moments[0] + (1.0 - MOMENTUM) * gradient
        spread = SPREAD * moments[1] + (1.0 - SPREAD) * gradient * gradient
        length = torch.sqrt(spread / corrections[1]) + self.epsilon
        return z - self.rate * (momentum / corrections[0]) / length, momentum, spread


class Inversion(nn.Module):
    """image (N, C, h, w) in -1..1, start (N, d) -> nearest picture of the same shape, last z (N, d)."""

    def __init__(self, distance: Distance, options: Options) -> None:
        super().__init__()
        self.distance = distance
        self.adam = Adam(options.inversion_rate)
        self.share = options.masked_share
        self.take(options.inversion_steps)

    def take(self, steps: int) -> None:
        """Let the search have that many steps from now on."""
        self.steps = steps
        powers = torch.arange(1, steps + 1, dtype=torch.float64)[:, None]
        self.register_buffer("first", (1.0 - MOMENTUM**powers).float())  # (K, 1)
        self.register_buffer("second", (1.0 - SPREAD**powers).float())

    def forward(self, image: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Return (picture, z)."""
        picture, z = self._descended(image, start, None)
        for _ in range(MASKED_ROUNDS if self.share > 0.0 else 0):
            picture, z = self._descended(image, start, counted(image, picture, self.share))
        return picture, z

    def settle(self, image: Tensor, start: Tensor) -> None:
        """Take Adam's epsilon from images: a coordinate with a twentieth of the usual slope is flat, and hardly moves.

        With the usual 1e-8 it would go a whole step to the side that rounding, another one in every engine, tells.
        """
        slopes = self.distance.loss(start, image, self.distance.goal(image))[1]
        self.adam.epsilon.copy_(FLAT * slopes.square().mean().sqrt() + 1e-8)

    def course(self, image: Tensor, start: Tensor) -> Tensor:
        """Return the least loss of each image before the first step and after every one, (K + 1, N); nothing masked."""
        return torch.stack([lowest for lowest, _, _ in self._descent(image, start, None)])

    def _descended(self, image: Tensor, start: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.steps == 0:
            return self.distance.generator(start)[-1], start
        *_, (_, nearest, z) = self._descent(image, start, mask)
        return nearest, z

    def _descent(self, image: Tensor, start: Tensor, mask: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (least loss so far (N,), its picture, z) before the first step and after every one."""
        goal = self.distance.goal(image)
        z, m, v = start, torch.zeros_like(start), torch.zeros_like(start)
        lowest, gradient, nearest = self._at(z, image, goal, mask)
        yield lowest, nearest, z
        for step in range(self.steps):
            z, m, v = self.adam(z, (m, v), gradient, (self.first[step], self.second[step]))
            loss, gradient, picture = self._at(z, image, goal, mask)
            better = loss < lowest
            lowest = torch.where(better, loss, lowest)
            nearest = torch.where(better[:, None, None, None], picture, nearest)
            yield lowest, nearest, z

    def _at(self, z: Tensor, image: Tensor, goal: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if mask is None:
            return self.distance.loss(z, image, goal)
        return self.distance.masked_loss(z, image, mask)


class Step(nn.Module):
    """One step as a graph of its own, for a host that loops it: (z, m, v, c1, c2, x) -> (z', m', v').

    z, m, v: (N, d), m and v 0 at the start; c1, c2: (1,), 1 - 0.9^t and 1 - 0.999^t; x: image (N, C, h, w) in -1..1.
    """

    def __init__(self, inversion: Inversion) -> None:
        super().__init__()
        self.distance, self.adam = inversion.distance, inversion.adam

    def forward(  # noqa: PLR0917 - the inputs of a graph have an order
        self, z: Tensor, m: Tensor, v: Tensor, c1: Tensor, c2: Tensor, x: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (z', m', v')."""
        _, gradient, _ = self.distance.loss(z, x, self.distance.goal(x))
        z, m, v = self.adam(z, (m, v), gradient, (c1, c2))
        return z, m, v


def counted(image: Tensor, picture: Tensor, share: float) -> Tensor:
    """Return (N, 1, h, w): 0 in the share of 8x8 px cells where image and picture differ most, else 1."""
    cells = F.avg_pool2d((image - picture).abs().mean(1, keepdim=True), CELL)
    flat = cells.flatten(1)
    worst = torch.topk(flat, max(1, round(share * flat.shape[1])), dim=1).values
    inside = (cells < worst[:, -1:, None, None]).to(image.dtype)
    return F.interpolate(inside, scale_factor=float(CELL), mode="nearest")
