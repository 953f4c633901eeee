"""8-bit pixels go up as they are, and become the network's input on the GPU: a quarter of the bytes.

What preparation cuts out of an 8-bit frame is whole levels, (h, w) or (h, w, 3). Cast to float32, divided by full scale
and turned channels first, they are the batch (1, C, h, w), bit by bit what the host would have made of them. A plan of
three layers does that in front of the network's own plan, into the memory that the network reads. So the network takes
batches as well: those of the sealed set, and of frames that a station corrects, which are no whole levels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.engines.build import Network, Plan, empty, kept_or_built, key_of
from agent.engines.cuda import GpuFacts
from agent.engines.engine import CROP, INPUT, EngineSettings
from calibration.preprocess import View

FULL_SCALE = 255
CHANNELS_FIRST = (0, 3, 1, 2)


def crop_shape(view: View) -> tuple[int, int, int, int] | None:
    """Return (1, h, w, C) of a recipe's crops, None where what its network takes is never whole levels of 8 bits."""
    if view.bit_depth != 8 or view.gamma != 1.0:
        return None
    return (1, view.height, view.width, view.channels)


def crop_plan_for(shape: tuple[int, int, int, int], settings: EngineSettings, runtime: Any, gpu: GpuFacts) -> Plan:
    """Return the plan that makes batches of crops, built now if there is none that fits. Raises EngineError."""
    name = "crops of " + "x".join(map(str, shape[1:]))
    what = f"{name} by {FULL_SCALE}, axes {CHANNELS_FIRST}"  # stands for a graph: another one is another plan
    key = key_of(what.encode(), replace(settings, precision="u8"), runtime, gpu)
    return kept_or_built(settings.cache, key, lambda: expansion(runtime, shape), facts={"product": name})


def expansion(runtime: Any, shape: tuple[int, int, int, int]) -> Network:
    """Return the network crop (1, h, w, C) uint8 -> image (1, C, h, w) float32, reflectance 0..1."""
    builder, _, definition = empty(runtime)
    full_scale = np.full((1, 1, 1, 1), FULL_SCALE, np.float32)
    crop = definition.add_input(CROP, runtime.uint8, shape)
    levels = definition.add_cast(crop, runtime.float32).get_output(0)
    divisor = definition.add_constant(full_scale.shape, full_scale).get_output(0)
    share = definition.add_elementwise(levels, divisor, runtime.ElementWiseOperation.DIV).get_output(0)
    turned = definition.add_shuffle(share)
    turned.first_transpose = runtime.Permutation(CHANNELS_FIRST)
    image = turned.get_output(0)
    image.name = INPUT
    definition.mark_output(image)
    return Network(runtime, builder, definition, full_scale)


def sample(shape: tuple[int, int, int, int]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Return a crop with every level at changing places and channels, and the batch (1, C, h, w) it must become."""
    crop = np.random.default_rng(0).permutation(np.arange(np.prod(shape)) % (FULL_SCALE + 1)).astype(np.uint8)
    crop = crop.reshape(shape)
    return crop, crop.transpose(CHANNELS_FIRST).astype(np.float32) / np.float32(FULL_SCALE)
