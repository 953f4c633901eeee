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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.learning import Material, Options, Progress
from trainer.reconstructors.layers import filters
from trainer.training import Stage, batches, enough, falling, gaussian, mean_loss, seeded, train

DENSE = 256
LEARNING_RATE = 1e-3
NOISE = 0.1  # deviation at the first epoch, reflectance


class Vae(nn.Module):
    """image (N, C, h, w) in 0..1 -> reconstruction of the same shape, mu (N, latent); h and w multiples of 2**depth."""

    def __init__(self, channels: int, height: int, width: int, options: Options) -> None:
        super().__init__()
        found = filters(height, width, "vae")
        self.low = (found[-1], height >> len(found), width >> len(found))
        self.encoder = nn.Sequential(*_down(channels, found), nn.Flatten())
        self.dense = nn.Sequential(nn.Linear(math.prod(self.low), DENSE), nn.LeakyReLU(0.2))
        self.mean = nn.Linear(DENSE, options.latent)
        self.log_variance = nn.Linear(DENSE, options.latent)
        self.widen = nn.Sequential(
            nn.Linear(options.latent, DENSE), nn.LeakyReLU(0.2), nn.Linear(DENSE, math.prod(self.low))
        )
        self.decoder = nn.Sequential(*_up(channels, found))
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

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return (reconstruction, mu), from mu or from the fixed sample of z with the least loss (Alg. 1).

        With samples the image must come alone (N = 1), as it does beside the line.
        """
        mean, log_variance = self.encode(image)
        if len(self.noise) == 0:
            return torch.sigmoid(self.decode(mean)), mean
        logits = self.decode(self.sampled(mean, log_variance))
        losses = F.binary_cross_entropy_with_logits(logits, image.expand_as(logits), reduction="none")
        best = losses.flatten(1).sum(1).argmin(keepdim=True)
        return torch.sigmoid(torch.index_select(logits, 0, best)), mean

    def sampled(self, mean: Tensor, log_variance: Tensor) -> Tensor:
        """Return the fixed samples of one image's z, (L, latent)."""
        return mean + self.noise * torch.exp(0.5 * log_variance)


def fit(material: Material, learn: Tensor, validate: Tensor, options: Options, progress: Progress) -> Vae:
    """Return the network of the epoch with the least validation loss.

    learn, validate: (n,) indices into material.batch. Leaves a checkpoint after every epoch and resumes from it when
    material.resume is set. Raises TrainingError if the loss is not finite.
    """
    torch.manual_seed(options.seed)
    images, unseen = (material.batch[chosen].to(options.device) for chosen in (learn, validate))
    enough(images, "vae")
    network = Vae(*material.batch.shape[1:], options).to(options.device)
    optimiser = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    train(
        Stage(
            name="vae",
            network=network,
            optimisers=(optimiser,),
            train_epoch=lambda epoch: _train_epoch(network, optimiser, images, epoch, options),
            loss=lambda: mean_loss(lambda part: elbo_loss(network, part, part), network, unseen),
            reads=("latent", "samples"),
        ),
        material,
        options,
        progress,
    )
    return network


def elbo_loss(network: Vae, image: Tensor, target: Tensor) -> Tensor:
    """Return the batch mean of cross-entropy + KL, both summed over the image (eq. 9-11)."""
    mean, log_variance = network.encode(image)
    latent = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
    entropy = F.binary_cross_entropy_with_logits(network.decode(latent), target, reduction="sum")
    divergence = 0.5 * (log_variance.exp() + mean**2 - 1.0 - log_variance).sum()
    return (entropy + divergence) / len(image)


def _train_epoch(network: Vae, optimiser: torch.optim.Optimizer, images: Tensor, epoch: int, options: Options) -> None:
    generator = seeded(options, epoch)
    deviation = NOISE * falling(epoch, options)
    for clean in batches(images, generator):
        half = len(clean) // 2
        noisy = clean.clone()
        noisy[:half] += deviation * gaussian(noisy[:half], generator)
        loss = elbo_loss(network, noisy.clamp(0.0, 1.0), clean)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def _down(channels: int, counts: list[int]) -> Iterator[nn.Module]:
    inputs = channels
    for index, outputs in enumerate(counts):
        yield nn.Conv2d(inputs, outputs, 4, stride=2, padding=1)
        if index < len(counts) - 1:
            yield nn.BatchNorm2d(outputs)
        yield nn.LeakyReLU(0.2)
        inputs = outputs


def _up(channels: int, counts: list[int]) -> Iterator[nn.Module]:
    yield nn.LeakyReLU(0.2)
    steps = [*reversed(counts[:-1])]
    inputs = counts[-1]
    for outputs in steps:
        yield nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1)
        yield nn.BatchNorm2d(outputs)
        yield nn.LeakyReLU(0.2)
        inputs = outputs
    yield nn.ConvTranspose2d(inputs, channels, 4, stride=2, padding=1)
