"""Generator against discriminator: the networks of `dcgan` and their training. Source and readings: see there."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.errors import TrainingError
from trainer.learning import Material, Options, Progress
from trainer.reconstructors.layers import filters
from trainer.training import Stage, batches, falling, gaussian, seeded, train

LEARNING_RATE, BETAS = 2e-4, (0.5, 0.999)
WASSERSTEIN_RATE, WASSERSTEIN_BETAS = 1e-4, (0.0, 0.9)
REAL = 0.8  # label smoothing
NOISE = 0.1  # deviation at the first epoch, of images in -1..1
CRITIC_STEPS, PENALTY = 5, 10.0
SETTLED = 500  # steps of the generator before it is judged
LOST = 8.0  # mean of -log D(G(z)): the discriminator is sure of every picture
FEWEST = 0.01  # variety of the generated pictures as a share of the real ones': one picture for every z
FEWEST_BATCHES = 8  # an epoch of a small set goes through it again
PATIENCE = 10  # epochs in a row that are lost or without variety
READS = ("latent", "wasserstein", "resize", "flip")


class Adversaries(nn.Module):
    """generator: z (N, d) -> picture (N, C, h, w) in -1..1; discriminator: picture -> features (N, e) -> logit (N, 1).

    Without `wasserstein` the logit is that of "real"; with it, the critic's value.
    """

    def __init__(self, size: torch.Size, options: Options) -> None:
        super().__init__()
        self.generator = up(size, options)
        judge = down(size, 1, normalise=not options.wasserstein)
        self.features, self.verdict = judge[:-1], judge[-1]
        self.apply(_initial)

    def discriminate(self, picture: Tensor) -> Tensor:
        """Return logits (N,)."""
        logits: Tensor = self.verdict(self.features(picture))
        return logits[:, 0]

    def learn(self, images: Tensor, material: Material, options: Options, progress: Progress) -> None:
        """Train both on images (n, C, h, w) in -1..1. Raises TrainingError if one of them wins for good."""
        rate, betas = (WASSERSTEIN_RATE, WASSERSTEIN_BETAS) if options.wasserstein else (LEARNING_RATE, BETAS)
        judge = [*self.features.parameters(), *self.verdict.parameters()]
        optimisers = (
            torch.optim.Adam(self.generator.parameters(), lr=rate, betas=betas),
            torch.optim.Adam(judge, lr=rate, betas=betas),
        )
        game = _Game(self, optimisers, images, options)
        stage = Stage("generator", self, optimisers, game.train_epoch, loss=None, reads=READS)
        train(stage, material, options, progress)


class _Game:
    """The epochs of one training, and whether it still is a game between two."""

    def __init__(
        self,
        adversaries: Adversaries,
        optimisers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
        images: Tensor,
        options: Options,
    ) -> None:
        self.adversaries = adversaries
        self.generator_optimiser, self.judge_optimiser = optimisers
        self.images = images
        self.options = options
        self.variety = float(images.std(0).mean())
        self.in_vain = 0  # epochs

    def train_epoch(self, epoch: int) -> None:
        generator = seeded(self.options, epoch)
        deviation = NOISE * falling(epoch, self.options)
        losses, varieties = [], []
        for count, image in enumerate(batches(self.images, generator, FEWEST_BATCHES)):
            real = self._augmented(image, deviation, generator)
            z = gaussian(torch.empty(len(image), self.options.latent, device=image.device), generator)
            picture = self.adversaries.generator(z)
            self._judge_step(real, picture.detach(), deviation, generator)
            if self.options.wasserstein and count % CRITIC_STEPS:
                continue
            losses.append(self._generator_step(picture, deviation, generator))
            varieties.append(float(picture.detach().std(0).mean()))
        steps = (epoch + 1) * len(losses)
        self._judged(epoch, steps, sum(losses) / len(losses), sum(varieties) / len(varieties))

    def _augmented(self, image: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
        """Return the batch, mirrored at random, its first half with noise (Alg. 3)."""
        half = len(image) // 2
        real = image.clone()
        if self.options.flip:
            mirrored = (torch.rand(len(image), generator=generator) < 0.5).to(image.device)
            real[mirrored] = real[mirrored].flip(3)
        real[:half] += deviation * gaussian(real[:half], generator)
        return real

    def _judge_step(self, real: Tensor, picture: Tensor, deviation: float, generator: torch.Generator) -> None:
        real = real + deviation * gaussian(real, generator)
        picture = picture + deviation * gaussian(picture, generator)
        of_real, of_picture = self.adversaries.discriminate(real), self.adversaries.discriminate(picture)
        if self.options.wasserstein:
            loss = of_picture.mean() - of_real.mean() + PENALTY * self._penalty(real, picture, generator)
        else:
            smooth, zero = torch.full_like(of_real, REAL), torch.zeros_like(of_picture)
            loss = F.binary_cross_entropy_with_logits(of_real, smooth)
            loss = loss + F.binary_cross_entropy_with_logits(of_picture, zero)
        self.judge_optimiser.zero_grad()
        loss.backward()
        self.judge_optimiser.step()

    def _penalty(self, real: Tensor, picture: Tensor, generator: torch.Generator) -> Tensor:
        share = torch.rand((len(real), 1, 1, 1), generator=generator).to(real.device)
        between = (share * real + (1.0 - share) * picture).requires_grad_(True)
        slope = torch.autograd.grad(self.adversaries.discriminate(between).sum(), between, create_graph=True)[0]
        return (slope.flatten(1).norm(dim=1) - 1.0).square().mean()

    def _generator_step(self, picture: Tensor, deviation: float, generator: torch.Generator) -> float:
        logits = self.adversaries.discriminate(picture + deviation * gaussian(picture, generator))
        loss = -logits.mean() if self.options.wasserstein else F.softplus(-logits).mean()
        self.generator_optimiser.zero_grad()
        loss.backward()
        self.generator_optimiser.step()
        return float(loss.detach())

    def _judged(self, epoch: int, steps: int, loss: float, variety: float) -> None:
        """Raise TrainingError if there is no game any more: nothing of this training is worth an export."""
        if not (math.isfinite(loss) and math.isfinite(variety)):
            raise TrainingError(f"dcgan: the loss became {loss} in epoch {epoch + 1}: {ADVICE}")
        lost = not self.options.wasserstein and loss > LOST
        same = variety < FEWEST * self.variety
        self.in_vain = self.in_vain + 1 if steps > SETTLED and (lost or same) else 0
        if self.in_vain >= PATIENCE:
            what = (
                f"the discriminator wins (the generator's loss is {loss:.1f})"
                if lost
                else f"the generator shows one picture only (variety {variety / self.variety:.1%} of the good images')"
            )
            raise TrainingError(f"dcgan: diverged in epoch {epoch + 1}: {what} for {PATIENCE} epochs: {ADVICE}")


def _initial(layer: nn.Module) -> None:
    """Set weights as Radford et al. 2016, sec. 4, do: small, so that the first pictures are gray."""
    if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        nn.init.normal_(layer.weight, 0.0, 0.02)
        nn.init.zeros_(layer.bias)
    elif isinstance(layer, nn.BatchNorm2d):
        nn.init.normal_(layer.weight, 1.0, 0.02)


ADVICE = "nothing was exported; try another seed, the Wasserstein loss, more good images or a smaller size"


def up(size: torch.Size, options: Options) -> nn.Sequential:
    """Return z (N, latent) -> picture (N, C, h, w) in -1..1."""
    channels, height, width = size
    found = filters(height, width, "dcgan", thin=True)
    low = (found[-1], height >> len(found), width >> len(found))
    layers: list[nn.Module] = [nn.Linear(options.latent, math.prod(low)), nn.Unflatten(1, low)]
    layers += [nn.BatchNorm2d(low[0]), nn.ReLU()]
    inputs = low[0]
    for count in [*reversed(found[:-1])]:
        layers += [*_enlarged(inputs, count, options.resize), nn.BatchNorm2d(count), nn.ReLU()]
        inputs = count
    return nn.Sequential(*layers, *_enlarged(inputs, channels, options.resize), nn.Tanh())


def _enlarged(inputs: int, outputs: int, resize: bool) -> list[nn.Module]:
    if resize:
        return [nn.UpsamplingNearest2d(scale_factor=2), nn.Conv2d(inputs, outputs, 3, padding=1)]
    return [nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1)]


def down(size: torch.Size, outputs: int, *, normalise: bool) -> nn.Sequential:
    """Return image (N, C, h, w) -> (N, outputs): strided convolutions and a dense layer at the end."""
    channels, height, width = size
    layers: list[nn.Module] = []
    found = filters(height, width, "dcgan", thin=True)
    for index, count in enumerate(found):
        layers.append(nn.Conv2d(channels, count, 4, stride=2, padding=1))
        if normalise and index > 0:
            layers.append(nn.BatchNorm2d(count))
        layers.append(nn.LeakyReLU(0.2))
        channels = count
    low = (height >> len(found)) * (width >> len(found))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * low, outputs))
