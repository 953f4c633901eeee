"""anogan: pixels and the discriminator's features, apart from those of the reconstruction.

Source: paper 000, eq. 3-5 (AnoGAN, Schlegl et al. 2017): sum of |x - G(z)| + lambda * sum of |f(x) - f(G(z))|, f the
discriminator's last convolution, images in -1..1 as it sees them, lambda the option `feature_weight`. Map: the pixels.
"""

from __future__ import annotations

from torch import Tensor, nn

from trainer.learning import Material, Options, Progress
from trainer.scorers.residual import blurred


def fit(network: nn.Module, material: Material, learn: Tensor, options: Options, progress: Progress) -> nn.Module:
    """Return the scorer of a dcgan; there is nothing to learn."""
    del learn, progress
    return Anogan(network, material.keep, options.feature_weight)


class Anogan(nn.Module):
    """image, reconstruction (N, C, h, w), z -> anomaly_map (N, 1, h, w) in reflectance, score (N,)."""

    def __init__(self, network: nn.Module, keep: Tensor, weight: float) -> None:
        super().__init__()
        self.network = network
        self.weight = weight
        self.register_buffer("keep", keep[None, None])

    def forward(self, image: Tensor, reconstruction: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Return (anomaly_map, score)."""
        del latent
        places = (image - reconstruction).abs() * self.keep
        score = 2.0 * places.flatten(1).sum(1)
        if self.weight > 0.0:
            apart = self.network.features(image) - self.network.features(reconstruction)  # type: ignore[operator]
            score = score + self.weight * apart.abs().sum(1)
        return blurred(places.mean(1, keepdim=True)) * self.keep, score
