"""VGG16 and Xception as published, up to a level: the networks of papers 000 and 002.

A level is the number of times that the picture has been halved: features at level 4 have stride 16. Inputs are
reflectance 0..1, gray or colour; each network does its own published preprocessing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# VGG16, one row per block: (convolutions, channels). Source: Simonyan & Zisserman 2015 (arXiv:1409.1556), table 1, D.
VGG16_BLOCKS = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))
VGG16_MEAN = (123.68, 116.779, 103.939)  # RGB, 0..255, of the Oxford weights; no division
VGG16_CHANNELS = {level: channels for level, (_, channels) in enumerate(VGG16_BLOCKS, 1)}

# Xception's blocks 1..12: (channels out, separable convolutions, stride, whether a ReLU comes first, channels grow in
# the first convolution). Source: Chollet 2017 (arXiv:1610.02357), fig. 5.
XCEPTION_BLOCKS = (
    (128, 2, 2, False, True),
    (256, 2, 2, True, True),
    (728, 2, 2, True, True),
    *((728, 3, 1, True, True),) * 8,
    (1024, 2, 2, True, False),
)
XCEPTION_LEVELS = {2: 1, 3: 2, 4: 11}  # level -> block after which it is tapped; 5 is the end
XCEPTION_CHANNELS = {2: 128, 3: 256, 4: 728, 5: 2048}


class Vgg16(nn.Module):
    """image (N, 1 or 3, h, w) -> one (N, channels, h / 2**level, w / 2**level) per level: each block after its pool.

    Level 4 is the network of paper 000 (sec. 4.2): without the last three convolutions, the last pool and the dense
    layers. Level 5 is what Keras gives without the top.
    """

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.levels = tuple(levels)
        layers: list[nn.Module] = []
        self.ends = {}
        inputs = 3
        for level, (count, channels) in enumerate(VGG16_BLOCKS[: max(levels)], 1):
            for _ in range(count):
                layers += [nn.Conv2d(inputs, channels, 3, padding=1), nn.ReLU()]
                inputs = channels
            layers.append(nn.MaxPool2d(2))
            self.ends[level] = len(layers)
        self.features = nn.Sequential(*layers)
        self.register_buffer("mean", torch.tensor(VGG16_MEAN)[:, None, None], persistent=False)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return one tensor per level."""
        x = coloured(image) * 255.0 - self.mean
        found, start = [], 0
        for level, end in self.ends.items():
            x = self.features[start:end](x)
            start = end
            if level in self.levels:
                found.append(x)
        return found


class SeparableConv(nn.Module):
    """A depthwise 3x3 and a pointwise convolution, stride 1, SAME padding, no activation in between."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False)
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, h, w) -> (N, outputs, h, w)."""
        mixed: Tensor = self.pointwise(self.conv1(x))
        return mixed


class SamePool(nn.Module):
    """Maximum of 3x3, stride 2, padded as TensorFlow's SAME does for this size: static in the graph."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, C, ceil(h / 2), ceil(w / 2))."""
        rows, columns = (side % 2 for side in x.shape[2:])
        if rows != columns:  # an even side takes its padding at the end, an odd one on both sides
            x = F.pad(x, (columns, 1, rows, 1), value=float(torch.finfo(x.dtype).min))
            return F.max_pool2d(x, 3, stride=2)
        return F.max_pool2d(x, 3, stride=2, padding=rows, ceil_mode=rows == 0)


class XceptionBlock(nn.Module):
    """Separable convolutions with a shortcut; names as in the weights file."""

    def __init__(self, inputs: int, outputs: int, convolutions: int, *, stride: int, relu: bool, grow: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(convolutions):
            first = inputs if index == 0 or not grow else outputs
            second = inputs if not grow and index < convolutions - 1 else outputs
            layers += [nn.ReLU(), SeparableConv(first, second), nn.BatchNorm2d(second, eps=1e-3)]
        if stride > 1:
            layers.append(SamePool())
        self.rep = nn.Sequential(*(layers if relu else layers[1:]))
        self.shrinks = stride > 1 or inputs != outputs
        if self.shrinks:
            self.skip = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.skipbn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, h, w) -> (N, outputs, h / stride, w / stride), rounded up."""
        shortcut = self.skipbn(self.skip(x)) if self.shrinks else x
        out: Tensor = self.rep(x) + shortcut
        return out


class Xception(nn.Module):
    """image (N, 1 or 3, h, w) -> one tensor per level of 2..5; level 5 is the input of the global pooling."""

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.levels = tuple(levels)
        self.conv1, self.bn1 = nn.Conv2d(3, 32, 3, stride=2, bias=False), nn.BatchNorm2d(32, eps=1e-3)
        self.conv2, self.bn2 = nn.Conv2d(32, 64, 3, bias=False), nn.BatchNorm2d(64, eps=1e-3)
        self.whole = max(levels) == 5
        self.blocks = len(XCEPTION_BLOCKS) if self.whole else XCEPTION_LEVELS[max(levels)]
        inputs = 64
        for number, (outputs, count, stride, relu, grow) in enumerate(XCEPTION_BLOCKS[: self.blocks], 1):
            block = XceptionBlock(inputs, outputs, count, stride=stride, relu=relu, grow=grow)
            self.add_module(f"block{number}", block)
            inputs = outputs
        if self.whole:
            self.conv3, self.bn3 = SeparableConv(1024, 1536), nn.BatchNorm2d(1536, eps=1e-3)
            self.conv4, self.bn4 = SeparableConv(1536, 2048), nn.BatchNorm2d(2048, eps=1e-3)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return one tensor per level."""
        x = F.relu(self.bn1(self.conv1(coloured(image) * 2.0 - 1.0)))
        x = F.relu(self.bn2(self.conv2(x)))
        found = []
        for number in range(1, self.blocks + 1):
            x = self.get_submodule(f"block{number}")(x)
            if any(XCEPTION_LEVELS.get(level) == number for level in self.levels):
                found.append(x)
        if self.whole:
            x = F.relu(self.bn3(self.conv3(x)))
            found.append(F.relu(self.bn4(self.conv4(x))))
        return found


def coloured(image: Tensor) -> Tensor:
    """Return (N, 3, h, w): a gray image in all three channels."""
    return image.expand(-1, 3, -1, -1) if image.shape[1] == 1 else image
