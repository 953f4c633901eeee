"""elbo: how improbable the image is for the vae: its reconstruction loss and its divergence in latent space.

Source: paper 000, eq. 9-11, algorithm 1: cross-entropy of the Bernoulli likelihood, summed over the pixels, plus
KL(q(z|x) || N(0, 1)); with `samples` the mean cross-entropy of all of them.

Reading chosen: of a gray pixel x even the best reconstruction has the cross-entropy H(x), most at x = 0.5. That share
is left out, of the map and of the score: a black hole in a gray part would lower the sum otherwise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.learning import Material, Options, Progress
from trainer.scorers.residual import blurred

SMALLEST = 1e-6  # a probability; the cross-entropy of a pixel stays below 14


def fit(network: nn.Module, material: Material, learn: Tensor, options: Options, progress: Progress) -> nn.Module:
    """Return the scorer of a vae; there is nothing to learn."""
    del learn, options, progress
    return Elbo(network, material.keep)


class Elbo(nn.Module):
    """image, reconstruction (N, C, h, w), mu -> anomaly_map (N, 1, h, w) in nats per pixel, score (N,) in nats."""

    def __init__(self, network: nn.Module, keep: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("keep", keep[None, None])

    def forward(self, image: Tensor, reconstruction: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Return (anomaly_map, score)."""
        mean, log_variance = self.network.encode(image)  # type: ignore[operator]
        divergence = 0.5 * (log_variance.exp() + latent**2 - 1.0 - log_variance).sum(1)
        places = surplus(image, reconstruction).sum(1, keepdim=True) * self.keep
        loss = places.flatten(1).sum(1)
        if len(self.network.noise) > 0:  # type: ignore[arg-type]
            samples = torch.sigmoid(self.network.decode(self.network.sampled(mean, log_variance)))  # type: ignore[operator]
            several = (surplus(image.expand_as(samples), samples) * self.keep).sum((1, 2, 3))
            loss = several.mean()[None]
        return blurred(places) * self.keep, loss + divergence


def surplus(image: Tensor, reconstruction: Tensor) -> Tensor:
    """Return the cross-entropy of each pixel above the least there can be, in nats."""
    inside = reconstruction.clamp(SMALLEST, 1.0 - SMALLEST)
    itself = image.clamp(SMALLEST, 1.0 - SMALLEST)
    return F.relu(image * torch.log(itself / inside) + (1.0 - image) * torch.log((1.0 - itself) / (1.0 - inside)))
