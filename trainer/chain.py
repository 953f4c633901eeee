"""Layers whose gradient by their input is written out, so that a search through them exports as plain arithmetic.

A graph for the line cannot hold automatic differentiation. The gradient of a generator or a discriminator by its input
needs no gradients of weights: per layer it is one transposed operation. Rectifiers open over a small width of their
input instead of at one point (`trainer.rounded`): a unit that turns would send sixteen steps of a search another way in
every engine, by up to 200 times the rounding that turned it (the sign in the L1 of `laplacian` added to that, to 855
times; 3 times are left, and the search ends at the same loss: a dcgan of wood at 128 px, 16 images, by a script that is
not kept; `tests/unit/test_inversion.py` holds it below 5 on networks of chance).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from trainer.rounded import opened

KINK = 0.05  # width over which a rectifier opens; its input has a deviation of about 1


class Chain(nn.Module):
    """Layers one after another, as they stand, in evaluation mode; batch normalisation is folded in where it can be."""

    def __init__(self, layers: nn.Sequential, kink: float = KINK) -> None:
        super().__init__()
        self.kink = kink
        self.layers = nn.ModuleList(_folded(layers)).eval().requires_grad_(False)

    def forward(self, value: Tensor) -> list[Tensor]:
        """Return the input and what comes out of every layer; the last is the answer."""
        values = [value]
        for layer in self.layers:
            values.append(layer(values[-1]))
        return values

    def gradient(self, values: list[Tensor], gradient: Tensor) -> Tensor:
        """Return the gradient by the input. values: of `forward`; gradient: by the answer, of its shape."""
        for layer, before, after in zip(reversed(self.layers), values[-2::-1], values[:0:-1], strict=True):
            gradient = _by_input(layer, (before, after), gradient, self.kink)
        return gradient


def _folded(layers: nn.Sequential) -> list[nn.Module]:
    found: list[nn.Module] = []
    for layer in layers.eval():
        if isinstance(layer, nn.BatchNorm2d) and found and isinstance(found[-1], nn.Conv2d | nn.ConvTranspose2d):
            transposed = isinstance(found[-1], nn.ConvTranspose2d)
            found[-1] = fuse_conv_bn_eval(found[-1], layer, transpose=transposed)
        else:
            found.append(layer)
    return found


def _by_input(  # noqa: PLR0911 - one for each kind of layer
    layer: nn.Module, values: tuple[Tensor, Tensor], gradient: Tensor, kink: float
) -> Tensor:
    """Return the gradient by a layer's input, from that by its output. values: what it was given and gave."""
    before, after = values
    match layer:
        case nn.Linear():
            return gradient @ layer.weight
        case nn.Conv2d():
            return F.conv_transpose2d(
                gradient, layer.weight, None, layer.stride, layer.padding, _rest(layer, before, gradient)
            )
        case nn.ConvTranspose2d():
            return F.conv2d(gradient, layer.weight, None, layer.stride, layer.padding)
        case nn.BatchNorm2d():
            scale = layer.weight * torch.rsqrt(layer.running_var + layer.eps)
            return gradient * scale[:, None, None]
        case nn.ReLU() | nn.LeakyReLU():
            least = getattr(layer, "negative_slope", 0.0)
            return gradient * (least + (1.0 - least) * opened(before, kink))
        case nn.Tanh():
            return gradient * (1.0 - after * after)
        case nn.Flatten() | nn.Unflatten():
            return gradient.reshape(before.shape)
        case nn.UpsamplingNearest2d():  # by 2
            return 4.0 * F.avg_pool2d(gradient, 2)
    raise NotImplementedError(f"no gradient is written for {type(layer).__name__}")


def _rest(layer: nn.Conv2d, before: Tensor, gradient: Tensor) -> list[int]:
    """Return the rows and columns that the transposed convolution would leave out."""
    found = []
    for axis in (0, 1):
        step, pad, kernel = (int(values[axis]) for values in (layer.stride, layer.padding, layer.kernel_size))
        found.append(before.shape[2 + axis] - ((gradient.shape[2 + axis] - 1) * step - 2 * pad + kernel))
    return found
