"""The same network in half precision, for GPUs: a second graph beside the float32 one, only if it is close enough.

TensorRT 11 takes precision from the graph alone, so it is chosen here, per detector, by measured error, from CUTS. What
is sensitive stays in single precision in all but the first: distances (a square in half precision ends at 65504),
log-sum-exp, covariance products, standardised maps. Input and outputs are float32 in every case. Where no cut is close
enough there is no such graph, and engines take the float32 one.

Batch normalisation is folded into its convolution first: it would be rounded twice, and the error is that of the
weights, not of what flows through (measured in docs/engines.md).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.export import Parity, ReferenceRuntime, answers_of, export_graph, parity_of

NETWORKS = ("features", "reconstructor")  # attributes that hold what a detector sees through: no sums, no distances
STAGES = "stages"  # of a backbone: a list, the first ones with few channels and the largest weights
PRODUCTS = ("convolution", "conv2d", "conv_transpose2d", "mm", "bmm", "addmm", "baddbmm", "linear", "matmul")  # of aten
SCORE_TOLERANCE, MAP_TOLERANCE = 5e-3, 2e-2  # relative, as in trainer.export


@dataclass(frozen=True, slots=True)
class HalfGraph:
    """The graph in half precision, and how the choice was made."""

    graph: bytes | None  # None: no cut was close enough
    chosen: str  # key of CUTS, "" if none
    tried: dict[str, Parity]  # by the same keys; without those that could not be exported

    def facts(self) -> dict[str, Any]:
        """Return what the recipe's manifest tells of it; None stands for a difference that is no finite number."""
        tried = {
            name: {key: value if math.isfinite(value) else None for key, value in asdict(parity).items()}
            for name, parity in self.tried.items()
        }
        return {"chosen": self.chosen, "tried": tried}


def half_graph(module: nn.Module, batch: NDArray[np.float32], score_scale: float, map_scale: float) -> HalfGraph:
    """Return the first cut whose scores are within 5e-3 of the float32 network's, and whose maps within 2e-2.

    batch: (n, C, h, w) good images; each is looked at with a drawn fault too, and then black, white and noise, because
    large scores overflow first: a part that is quite another must be rejected, not answered with infinity.
    score_scale, map_scale: the thresholds, as in `trainer.export.checked_parity`.
    """
    images = np.concatenate([batch, with_fault(batch), _extremes(batch)])
    expected = answers_of(module, images)
    tried: dict[str, Parity] = {}
    for name, cut in CUTS.items():
        candidate = cut(folded(copy.deepcopy(module)))
        if candidate is None:
            continue
        try:
            # in torch: ONNX Runtime on a CPU reckons most of such a graph in float32, and no overflow shows there
            with QuickHalf():
                answers = answers_of(candidate.eval(), images)
            parity = tried[name] = parity_of(expected, answers, score_scale, map_scale)
            if not _is_close(parity):
                continue
            graph = export_graph(candidate, batch[:1])
        except RuntimeError:  # two precisions meet where torch wants one: this network cannot be cut here
            continue
        runtime = ReferenceRuntime(graph)
        if _is_close(parity_of(expected, [runtime(image[None]) for image in images], score_scale, map_scale)):
            return HalfGraph(graph, name, tried)
    return HalfGraph(None, "", tried)


def _is_close(parity: Parity) -> bool:
    return parity.worst_score <= SCORE_TOLERANCE and parity.worst_peak <= MAP_TOLERANCE


def with_fault(batch: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the images (n, C, h, w) with the middle sixteenth turned into its negative: a gross fault."""
    faulty = batch.copy()
    height, width = batch.shape[2:]
    rows, columns = slice(3 * height // 8, 5 * height // 8), slice(3 * width // 8, 5 * width // 8)
    faulty[:, :, rows, columns] = 1.0 - faulty[:, :, rows, columns]
    return faulty


def _extremes(batch: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return (3, C, h, w): what no part looks like."""
    shape = batch.shape[1:]
    noise = np.random.default_rng(0).integers(0, 2, shape).astype(np.float32)
    return np.stack([np.zeros(shape, np.float32), np.ones(shape, np.float32), noise])


def in_half(module: nn.Module) -> nn.Module:
    """Return the module, now in half precision, between neighbours in single precision: called, it rounds and returns.

    A network that is used otherwise than by calling it meets two precisions, and torch says so.
    """
    module.half()
    module.register_forward_pre_hook(
        lambda _, inputs: tuple(x.half() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
    )
    module.register_forward_hook(lambda *call: _in_single(call[2]))
    return module


class QuickHalf(TorchDispatchMode):
    """Within it, products of half-precision tensors are summed in float32 and then rounded, as GPUs do.

    Every other operation is done in half precision itself. On a CPU without such instructions this is the quick way.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return what the operation answers."""
        halves = [x for x in args if isinstance(x, Tensor) and x.dtype == torch.float16]
        if func.overloadpacket.__name__ not in PRODUCTS or not halves:
            return func(*args, **(kwargs or {}))
        single = [x.float() if isinstance(x, Tensor) and x.dtype == torch.float16 else x for x in args]
        mixed = any(isinstance(x, Tensor) and x.dtype == torch.float32 for x in args)
        if mixed:
            raise RuntimeError("two precisions in one product")
        return func(*single, **(kwargs or {})).half()


def folded(module: nn.Module) -> nn.Module:
    """Return the module, changed in place, without a batch normalisation that follows a convolution in a Sequential."""
    for child in module.children():
        folded(child)
    if isinstance(module, nn.Sequential):
        for place in range(len(module) - 1):
            conv, norm = module[place], module[place + 1]
            if isinstance(conv, nn.Conv2d | nn.ConvTranspose2d) and isinstance(norm, nn.BatchNorm2d):
                assert norm.running_mean is not None
                assert norm.running_var is not None
                conv.weight, conv.bias = fuse_conv_bn_weights(
                    conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias,
                    transpose=isinstance(conv, nn.ConvTranspose2d),
                )  # fmt: skip
                module[place + 1] = nn.Identity()
    return module


def _networks(module: nn.Module) -> nn.Module | None:
    """Return the module with its networks in half precision, None if it has none."""
    found = [child for child in _named(module, NETWORKS) if next(child.parameters(), None) is not None]
    for network in found:
        in_half(network)
    return module if found else None


def _later_stages(module: nn.Module, first: int) -> nn.Module | None:
    """Return the module with the stages of its backbones in half precision from `first` on, None if it has no such."""
    found = [stages[first:] for stages in _named(module, (STAGES,)) if isinstance(stages, nn.ModuleList)]
    for stage in (stage for stages in found for stage in stages):
        in_half(stage)
    return module if any(len(stages) for stages in found) else None


def _named(module: nn.Module, names: tuple[str, ...]) -> Iterator[nn.Module]:
    """Yield every module below that an attribute of these names holds; none below one that was found."""
    for name, child in module.named_children():
        if name in names:
            yield child
        else:
            yield from _named(child, names)


def _in_single(value: Any) -> Any:
    """Return a tensor, or a list or tuple of them, in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    return type(value)(_in_single(item) for item in value)


CUTS: dict[str, Callable[[nn.Module], nn.Module | None]] = {
    "everything": in_half,
    "networks": _networks,
    "networks without their first stage": lambda module: _later_stages(module, 1),
    "networks without their first two stages": lambda module: _later_stages(module, 2),
}
