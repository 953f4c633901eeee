"""noise_ae: a small gray autoencoder, learnt while some of the good images carry noise (NI-CAE).

Source: paper 003, sec. 3.5.2: Gaussian noise (mean 0, variance 0.001) on a random 10 % of the images, grayscale, five
3x3 convolutions of [128, 64, 16, 8, 4] filters each with 2x2 max-pooling, a dense layer of 512, the same mirrored as
decoder, a 1x1 convolution at the end; stops after 5 epochs without a better validation loss.

Readings chosen: the images with noise are drawn once and are input and target alike ("injected into the images": the
set itself is noisy); ReLU, sigmoid output, mean squared error; nearest enlargement mirrors the pooling. Of a colour
image the gray is reconstructed and its own chroma put back, so that what differs is gray.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.errors import TrainingError
from trainer.learning import Material, Options, Progress
from trainer.training import learnt, train

FILTERS = (128, 64, 16, 8, 4)
DENSE = 512
NOISE_VARIANCE = 0.001
PATIENCE = 5
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601


class NoiseAutoencoder(nn.Module):
    """image (N, C, h, w) in 0..1 -> reconstruction of the same shape, code (N, 512); h, w multiples of 32."""

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        if height % 32 or width % 32:
            raise TrainingError(f"noise_ae halves its input 5 times, {width}x{height} found: use multiples of 32")
        shares = torch.tensor(LUMINANCE) if channels == 3 else torch.full((channels,), 1.0 / channels)
        self.register_buffer("shares", shares[None, :, None, None])
        low = (FILTERS[-1], height // 32, width // 32)
        down: list[nn.Module] = []
        up: list[nn.Module] = []
        for inputs, count in zip((1, *FILTERS), FILTERS, strict=False):
            down += [nn.Conv2d(inputs, count, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        for inputs, count in zip((FILTERS[-1], *reversed(FILTERS)), reversed(FILTERS), strict=False):
            up += [nn.Conv2d(inputs, count, 3, padding=1), nn.ReLU(), nn.UpsamplingNearest2d(scale_factor=2)]
        self.encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(math.prod(low), DENSE), nn.ReLU())
        start = [nn.Linear(DENSE, math.prod(low)), nn.ReLU(), nn.Unflatten(1, low)]
        self.decoder = nn.Sequential(*start, *up, nn.Conv2d(FILTERS[0], 1, 1), nn.Sigmoid())

    def gray(self, image: Tensor) -> Tensor:
        """Return (N, 1, h, w)."""
        return (image * self.shares).sum(1, keepdim=True)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return (reconstruction, code)."""
        gray = self.gray(image)
        code = self.encoder(gray)
        return image - gray + self.decoder(code), code


def fit(material: Material, learn: Tensor, validate: Tensor, options: Options, progress: Progress) -> NoiseAutoencoder:
    """Return the network of the epoch with the least validation loss; arguments as for every reconstructor."""
    if not 0.0 <= options.noise_share <= 1.0:
        raise TrainingError(f"noise share {options.noise_share:g} found, need 0..1 of the good images")
    torch.manual_seed(options.seed)
    network = NoiseAutoencoder(*material.batch.shape[1:]).to(options.device)

    def loss(image: Tensor) -> Tensor:
        return F.mse_loss(network.decoder(network.encoder(image)), image)

    gray = network.gray(material.batch.to(options.device))
    images = with_noise(gray[learn], options), gray[validate]
    stage = learnt("noise_ae", network, loss, images, options, patience=PATIENCE, reads=("noise_share",))
    train(stage, material, options, progress)
    return network


def with_noise(images: Tensor, options: Options) -> Tensor:
    """Return the images, a random share of them with noise."""
    generator = torch.Generator().manual_seed(options.seed)
    chosen = torch.randperm(len(images), generator=generator)[: round(options.noise_share * len(images))]
    noise = math.sqrt(NOISE_VARIANCE) * torch.randn((len(chosen), *images.shape[1:]), generator=generator)
    noisy = images.clone()
    noisy[chosen.to(images.device)] += noise.to(images.device)
    return noisy.clamp(0.0, 1.0)
