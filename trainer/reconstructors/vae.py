"""vae: a variational autoencoder; what it cannot reconstruct was not on the good parts.

Source: paper 000, sec. 2.3.2, 3.2.1, 4.4, fig. 14, algorithms 1 and 4. Strided convolutions, a dense layer of 256
units before mu and sigma, a mirrored decoder, sigmoid output with Bernoulli cross-entropy, KL to N(0, 1), annealed
Gaussian noise on half of each batch, no batch normalisation at the encoder's end and the decoder's start.

Readings chosen where the paper is silent: 4x4 kernels, LeakyReLU 0.2, 16 filters doubling to 128 (the paper says
"fewer filters" than DCGAN), strides until the map is 8 pixels or less on its shorter side; "N(0, mu_epoch)" is read as
a deviation that falls linearly from 0.1 to 0 over the first half of the epochs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.errors import TrainingError
from trainer.learning import Material, Options, Progress

DENSE = 256
FIRST_FILTERS, MOST_FILTERS = 16, 128
SMALLEST_MAP = 8
BATCH = 16
LEARNING_RATE = 1e-3
NOISE = 0.1  # deviation at the first epoch, reflectance


class Vae(nn.Module):
    """image (N, C, h, w) in 0..1 -> reconstruction of the same shape; h and w multiples of 2**depth."""

    def __init__(self, channels: int, height: int, width: int, options: Options) -> None:
        super().__init__()
        depth = max(2, math.ceil(math.log2(min(height, width) / SMALLEST_MAP)))
        if height % 2**depth or width % 2**depth:
            raise TrainingError(
                f"the vae halves its input {depth} times, {width}x{height} found: use multiples of {2**depth}"
            )
        filters = [min(FIRST_FILTERS * 2**i, MOST_FILTERS) for i in range(depth)]
        self.low = (filters[-1], height >> depth, width >> depth)
        self.encoder = nn.Sequential(*_down(channels, filters), nn.Flatten())
        self.dense = nn.Sequential(nn.Linear(math.prod(self.low), DENSE), nn.LeakyReLU(0.2))
        self.mean = nn.Linear(DENSE, options.latent)
        self.log_variance = nn.Linear(DENSE, options.latent)
        self.widen = nn.Sequential(
            nn.Linear(options.latent, DENSE), nn.LeakyReLU(0.2), nn.Linear(DENSE, math.prod(self.low))
        )
        self.decoder = nn.Sequential(*_up(channels, filters))
        fixed = torch.Generator().manual_seed(options.seed)
        self.register_buffer("noise", torch.randn(options.samples, options.latent, generator=fixed))

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return (mu, log sigma^2), each (N, latent)."""
        dense = self.dense(self.encoder(image))
        return self.mean(dense), self.log_variance(dense).clamp(-12.0, 12.0)

    def decode(self, latent: Tensor) -> Tensor:
        """Return logits (N, C, h, w); their sigmoid is the reconstruction."""
        logits: Tensor = self.decoder(self.widen(latent).reshape(-1, *self.low))
        return logits

    def forward(self, image: Tensor) -> Tensor:
        """Return the reconstruction from the mean of z, or of the fixed samples the one with the least loss (Alg. 1).

        With samples the image must come alone (N = 1), as it does beside the line.
        """
        mean, log_variance = self.encode(image)
        if len(self.noise) == 0:
            return torch.sigmoid(self.decode(mean))
        logits = self.decode(mean + self.noise * torch.exp(0.5 * log_variance))  # (L, C, h, w)
        losses = F.binary_cross_entropy_with_logits(logits, image.expand_as(logits), reduction="none")
        best = losses.flatten(1).sum(1).argmin(keepdim=True)
        return torch.sigmoid(torch.index_select(logits, 0, best))


@dataclass(slots=True)
class _State:
    """Where a training stands, so that it can stop early or go on after a crash."""

    epoch: int = 0
    best_loss: float = math.inf
    best_epoch: int = 0


def fit(material: Material, learn: Tensor, validate: Tensor, options: Options, progress: Progress) -> Vae:
    """Return the network of the epoch with the least validation loss.

    learn, validate: (n,) indices into material.batch. Leaves a checkpoint after every epoch and resumes from it when
    material.resume is set. Raises TrainingError if the loss is not finite.
    """
    torch.manual_seed(options.seed)
    network = Vae(*material.batch.shape[1:], options)
    optimiser = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    state, best = _State(), _copied(network)
    if material.resume and material.checkpoint.is_file():
        best = _resumed(material, network, optimiser, state)
    while state.epoch < options.epochs and state.epoch - state.best_epoch < options.patience:
        _train_epoch(network, optimiser, material.batch[learn], state.epoch, options)
        loss = _validation_loss(network, material.batch[validate])
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss became {loss} in epoch {state.epoch + 1}: check the images, nothing was exported"
            )
        state.epoch += 1
        if loss < state.best_loss:
            state.best_loss, state.best_epoch, best = loss, state.epoch, _copied(network)
        _save(material, network, optimiser, state, best)
        progress(f"vae, loss {state.best_loss:.0f}", state.epoch, options.epochs)
    progress(f"vae, loss {state.best_loss:.0f}", options.epochs, options.epochs)
    network.load_state_dict(best)
    return network.eval().requires_grad_(False)


def elbo_loss(network: Vae, image: Tensor, target: Tensor) -> Tensor:
    """Return the batch mean of cross-entropy + KL, both summed over the image (eq. 9-11)."""
    mean, log_variance = network.encode(image)
    latent = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
    entropy = F.binary_cross_entropy_with_logits(network.decode(latent), target, reduction="sum")
    divergence = 0.5 * (log_variance.exp() + mean**2 - 1.0 - log_variance).sum()
    return (entropy + divergence) / len(image)


def _train_epoch(network: Vae, optimiser: torch.optim.Optimizer, images: Tensor, epoch: int, options: Options) -> None:
    generator = torch.Generator().manual_seed(options.seed * 100_003 + epoch)
    torch.manual_seed(options.seed * 100_003 + epoch)  # the reparameterisation draws from the global generator
    deviation = NOISE * max(0.0, 1.0 - 2.0 * epoch / options.epochs)
    network.train()
    for chosen in torch.randperm(len(images), generator=generator).split(BATCH):
        if len(chosen) < 2 and len(images) > 1:
            continue  # batch normalisation needs two
        clean = images[chosen]
        noisy = clean.clone()
        half = len(chosen) // 2
        noisy[:half] += deviation * torch.randn(noisy[:half].shape, generator=generator)
        loss = elbo_loss(network, noisy.clamp(0.0, 1.0), clean)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def _validation_loss(network: Vae, images: Tensor) -> float:
    network.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        return sum(float(elbo_loss(network, part, part)) * len(part) for part in images.split(BATCH)) / len(images)


def _down(channels: int, filters: list[int]) -> Iterator[nn.Module]:
    inputs = channels
    for index, outputs in enumerate(filters):
        yield nn.Conv2d(inputs, outputs, 4, stride=2, padding=1)
        if index < len(filters) - 1:
            yield nn.BatchNorm2d(outputs)
        yield nn.LeakyReLU(0.2)
        inputs = outputs


def _up(channels: int, filters: list[int]) -> Iterator[nn.Module]:
    yield nn.LeakyReLU(0.2)
    steps = [*reversed(filters[:-1])]
    inputs = filters[-1]
    for outputs in steps:
        yield nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1)
        yield nn.BatchNorm2d(outputs)
        yield nn.LeakyReLU(0.2)
        inputs = outputs
    yield nn.ConvTranspose2d(inputs, channels, 4, stride=2, padding=1)


def _copied(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def _save(
    material: Material, network: Vae, optimiser: torch.optim.Optimizer, state: _State, best: dict[str, Tensor]
) -> None:
    """Write the checkpoint in one step, so that an interrupt leaves the last whole one."""
    temporary = material.checkpoint.with_suffix(".tmp")
    torch.save(
        {
            "network": network.state_dict(),
            "optimiser": optimiser.state_dict(),
            "best": best,
            "state": (state.epoch, state.best_loss, state.best_epoch),
        },
        temporary,
    )
    temporary.replace(material.checkpoint)


def _resumed(material: Material, network: Vae, optimiser: torch.optim.Optimizer, state: _State) -> dict[str, Tensor]:
    """Bring everything to where the checkpoint stands and return the best weights so far."""
    try:
        stored: dict[str, Any] = torch.load(material.checkpoint, weights_only=True)
        network.load_state_dict(stored["network"])
        optimiser.load_state_dict(stored["optimiser"])
    except (RuntimeError, KeyError, ValueError) as error:
        raise TrainingError(f"{material.checkpoint}: of another training ({error}): start without --resume") from error
    state.epoch, state.best_loss, state.best_epoch = stored["state"]
    best: dict[str, Tensor] = stored["best"]
    return best
