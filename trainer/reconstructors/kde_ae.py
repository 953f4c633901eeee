"""kde_ae: a convolutional autoencoder with a wide code, made for `latent_kde` (KD-CAE).

Source: paper 003, sec. 3.5.1: 6 layers in the encoder, 6 in the decoder, 32 to 128 filters, 128x128 to 8x8, a code of
8192 numbers; ReLU (sec. 3.3.2). Readings chosen: 3x3 convolutions, four of the six with stride 2; mirrored in the
decoder, 4x4 transposed where the encoder strides; sigmoid output, mean squared error. At another size the code has
128 numbers for each 16x16 px.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.learning import Material, Options, Progress
from trainer.training import learnt, train

LAYERS = ((32, 2), (32, 1), (64, 2), (64, 1), (128, 2), (128, 2))  # filters, stride


class KdeAutoencoder(nn.Module):
    """image (N, C, h, w) in 0..1 -> reconstruction of the same shape, code (N, 128 h w / 256)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        down: list[nn.Module] = []
        up: list[nn.Module] = []
        inputs = channels
        for count, stride in LAYERS:
            down += [nn.Conv2d(inputs, count, 3, stride=stride, padding=1), nn.ReLU()]
            kernel = 4 if stride == 2 else 3
            up = [nn.ConvTranspose2d(count, inputs, kernel, stride=stride, padding=1), nn.ReLU(), *up]
            inputs = count
        self.encoder = nn.Sequential(*down)
        self.decoder = nn.Sequential(*up[:-1], nn.Sigmoid())

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return (reconstruction, code)."""
        code = self.encoder(image)
        return self.decoder(code), code.flatten(1)

    def latents(self, image: Tensor) -> Tensor:
        """Return the code of every 16x16 px, (N, h w / 256, 128)."""
        places: Tensor = self.encoder(image).flatten(2).transpose(1, 2)
        return places


def fit(material: Material, learn: Tensor, validate: Tensor, options: Options, progress: Progress) -> KdeAutoencoder:
    """Return the network of the epoch with the least validation loss; arguments as for every reconstructor."""
    torch.manual_seed(options.seed)
    network = KdeAutoencoder(material.batch.shape[1]).to(options.device)

    def loss(image: Tensor) -> Tensor:
        return F.mse_loss(network(image)[0], image)

    images = material.batch[learn].to(options.device), material.batch[validate].to(options.device)
    train(learnt("kde_ae", network, loss, images, options), material, options, progress)
    return network
