"""A pretrained network in two pieces: the first frozen, the last block to be trained (paper 000, sec. 4.2).

The frozen piece is the same in every epoch, so it is computed once per image.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.backbones import Lite0, taps
from trainer.backbones_published import Vgg16
from trainer.learning import Options

SAMPLE = 64  # images that the channels' moments are taken from
LEVEL = 4  # stride 16: VGG16 without its last three convolutions, its last pool and its dense layers


class Trunk(nn.Module):
    """image (N, 1 or 3, h, w) -> frozen(image) -> last(..) -> (N, channels, h / 16, w / 16)."""

    def __init__(self, frozen: nn.Module, last: nn.Module, channels: int) -> None:
        super().__init__()
        self.frozen = frozen
        self.last = last
        self.channels = channels

    def forward(self, image: Tensor) -> Tensor:
        """Return the features of the whole trunk."""
        features: Tensor = self.last(self.frozen(image))
        return features

    def train(self, mode: bool = True) -> Trunk:
        """Keep batch normalisation at the published moments: a few dozen images would spoil them."""
        super().train(False)
        self.training = mode
        return self


class First(nn.Module):
    """A backbone's only tap as a tensor."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, image: Tensor) -> Tensor:
        """Return the tap."""
        found: Tensor = self.backbone(image)[0]
        return found


class Channels(nn.Module):
    """Features (N, D, h, w) with every channel brought to mean 0 and deviation 1 over good images.

    The last layer could do the same with its weights; it learns faster where all channels are of one size.
    """

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        deviation = features.std(dim=(0, 2, 3), keepdim=True)
        self.register_buffer("mean", features.mean(dim=(0, 2, 3), keepdim=True))
        self.register_buffer("scale", 1.0 / (deviation + 0.1 * deviation.mean() + 1e-6))

    def forward(self, features: Tensor) -> Tensor:
        """Return features of the same shape."""
        return (features - self.mean) * self.scale


def usual_channels(body: Trunk, cached: Tensor) -> Channels:
    """Return the moments of the trunk's features as they are before training; cached: (n, ..) of its frozen piece."""
    with torch.no_grad():
        return Channels(torch.cat([body.last(part) for part in cached[:SAMPLE].split(8)]))


def trunk(name: str, options: Options) -> Trunk:
    """Return the trunk of a backbone: block 4 of VGG16 or the last stage of Lite0 can be trained, of others nothing."""
    network = taps(name, (LEVEL,), options.weights, options.weights_sha256)
    with torch.inference_mode():
        channels = int(network(torch.zeros(1, 3, 64, 64))[0].shape[1])
    last: nn.Module = nn.Identity()
    if isinstance(network, Vgg16):
        end = network.ends[LEVEL - 1]
        last, network.features = network.features[end:], network.features[:end]
        network.levels, network.ends = (LEVEL - 1,), {k: v for k, v in network.ends.items() if k < LEVEL}
    elif isinstance(network, Lite0):
        last, network.stages = network.stages[-1], network.stages[:-1]
        network.taps = (len(network.stages) - 1,)
    return Trunk(First(network), last.requires_grad_(True), channels)
