"""patch_ae: an autoencoder of overlapping patches, each told where it lies (CPCAE).

Source: paper 002, sec. 3.1, fig. 1, 2, eq. 2, 3: the image is made smaller, cut into overlapping patches, each with its
index divided by their number as a condition, concatenated in the encoder and in the decoder; strided convolutions, a
dense bottleneck, transposed convolutions; loss L2 + lambda * L1 of the activations; the reconstructed patches are put
together and enlarged, the map is the difference with the input.

Readings chosen: half the size, patches of 32 px that overlap by half; 4x4 convolutions of 32, 64, 128 filters with
stride 2, LeakyReLU 0.2, sigmoid output; the condition is one number beside the flattened features and beside the code;
the L1 norm is that of the code, both terms summed over a patch; patches that overlap are averaged.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.errors import TrainingError
from trainer.learning import Material, Options, Progress
from trainer.training import learnt, train

FILTERS = (32, 64, 128)


class PatchAutoencoder(nn.Module):
    """image (N, C, h, w) in 0..1 -> reconstruction of the same shape, codes of all patches (N, P * latent)."""

    def __init__(self, channels: int, height: int, width: int, options: Options) -> None:
        super().__init__()
        self.layout = Layout(height, width, options)
        low = (FILTERS[-1], options.patch // 8, options.patch // 8)
        numbers = FILTERS[-1] * low[1] * low[2]
        down: list[nn.Module] = []
        up: list[nn.Module] = []
        for inputs, count in zip((channels, *FILTERS), FILTERS, strict=False):
            down += [nn.Conv2d(inputs, count, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
            up = [nn.ConvTranspose2d(count, inputs, 4, stride=2, padding=1), nn.LeakyReLU(0.2), *up]
        self.encoder = nn.Sequential(*down, nn.Flatten())
        self.code = nn.Linear(numbers + 1, options.latent)
        self.widen = nn.Sequential(nn.Linear(options.latent + 1, numbers), nn.LeakyReLU(0.2), nn.Unflatten(1, low))
        self.decoder = nn.Sequential(*up[:-1], nn.Sigmoid())

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Return (reconstruction, codes)."""
        small = self.layout.smaller(image)
        patches = self.layout.cut(small)  # (N * P, C, p, p)
        codes = self.encode(patches)
        joined = self.layout.joined(self.decode(codes), len(image))
        full = F.interpolate(joined, image.shape[2:], mode="bilinear", align_corners=False)
        return full, codes.reshape(len(image), -1)

    def latents(self, image: Tensor) -> Tensor:
        """Return the code of every patch, (N, P, latent)."""
        codes = self.encode(self.layout.cut(self.layout.smaller(image)))
        return codes.reshape(len(image), self.layout.count, -1)

    def encode(self, patches: Tensor) -> Tensor:
        """Return the codes of all patches of some images, (N * P, latent)."""
        codes: Tensor = self.code(torch.cat([self.encoder(patches), self.layout.condition(patches)], 1))
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """Return the patches of codes, (N * P, C, p, p)."""
        patches: Tensor = self.decoder(self.widen(torch.cat([codes, self.layout.condition(codes)], 1)))
        return patches


class Layout(nn.Module):
    """Where the patches lie: a grid that overlaps by half, so that every patch is four blocks of half its side."""

    def __init__(self, height: int, width: int, options: Options) -> None:
        super().__init__()
        self.downsize, self.half = options.downsize, options.patch // 2
        found = f"patches of {options.patch} px of an image {width}x{height} made {options.downsize} times smaller"
        if options.patch < 16 or options.patch % 8 or options.downsize < 1:
            raise TrainingError(f"{found}: need a multiple of 8, at least 16, and at least once")
        step = options.downsize * self.half
        if height % step or width % step or min(height, width) < 2 * step:
            raise TrainingError(
                f"{found}: the sides must be multiples of {step} px, at least {2 * step}: change --size, the patch "
                "or the downsizing"
            )
        self.rows, self.columns = height // step - 1, width // step - 1
        self.count = self.rows * self.columns
        self.register_buffer("index", torch.arange(self.count, dtype=torch.float32) / self.count)
        ones = torch.ones(1, self.count, 4, 1, 1, 1)
        self.register_buffer("times", self._added(ones.expand(-1, -1, -1, 1, self.half, self.half)))

    def smaller(self, image: Tensor) -> Tensor:
        """Return the image at the patches' scale."""
        return F.avg_pool2d(image, self.downsize)

    def cut(self, small: Tensor) -> Tensor:
        """Return all patches, row by row, image after image, (N * P, C, p, p)."""
        side = self.half
        blocks = small.reshape(*small.shape[:2], self.rows + 1, side, self.columns + 1, side)
        left, right = blocks[:, :, :, :, :-1], blocks[:, :, :, :, 1:]
        wide = torch.cat([left, right], 5)  # (N, C, rows + 1, side, columns, 2 side)
        whole = torch.cat([wide[:, :, :-1], wide[:, :, 1:]], 3)  # (N, C, rows, 2 side, columns, 2 side)
        return whole.permute(0, 2, 4, 1, 3, 5).reshape(-1, small.shape[1], 2 * side, 2 * side)

    def joined(self, patches: Tensor, images: int) -> Tensor:
        """Return the patches put together, averaged where they overlap, (N, C, h, w) at their scale."""
        side, channels = self.half, patches.shape[1]
        quarters = patches.reshape(images, self.count, channels, 2, side, 2, side).permute(0, 1, 3, 5, 2, 4, 6)
        return self._added(quarters.reshape(images, self.count, 4, channels, side, side)) / self.times

    def condition(self, patches: Tensor) -> Tensor:
        """Return each patch's index / number of patches, (N * P, 1)."""
        return self.index.repeat(patches.shape[0] // self.count)[:, None]

    def _added(self, quarters: Tensor) -> Tensor:
        """Return the sum of the patches' quarters where they lie, (N, C, h, w)."""
        images, _, _, channels, side, _ = quarters.shape
        grid = quarters.reshape(images, self.rows, self.columns, 4, channels, side, side)
        total = sum(
            F.pad(grid[:, :, :, 2 * down + right], (0, 0, 0, 0, 0, 0, right, 1 - right, down, 1 - down))
            for down in (0, 1)
            for right in (0, 1)
        )
        assert isinstance(total, Tensor)  # (N, rows + 1, columns + 1, C, side, side)
        whole = total.permute(0, 3, 1, 4, 2, 5)
        return whole.reshape(images, channels, (self.rows + 1) * side, (self.columns + 1) * side)


def fit(material: Material, learn: Tensor, validate: Tensor, options: Options, progress: Progress) -> PatchAutoencoder:
    """Return the network of the epoch with the least validation loss; arguments as for every reconstructor.

    Raises TrainingError if the patches do not fit the image.
    """
    torch.manual_seed(options.seed)
    network = PatchAutoencoder(*material.batch.shape[1:], options).to(options.device)

    def loss(image: Tensor) -> Tensor:
        patches = network.layout.cut(network.layout.smaller(image))
        codes = network.encode(patches)
        squares = (network.decode(codes) - patches).square().sum()
        return (squares + options.sparsity * codes.abs().sum()) / len(patches)

    images = material.batch[learn].to(options.device), material.batch[validate].to(options.device)
    stage = learnt("patch_ae", network, loss, images, options, reads=("latent", "downsize", "patch", "sparsity"))
    train(stage, material, options, progress)
    return network
