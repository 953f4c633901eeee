"""How many steps a dcgan's search in latent space takes: as many as the takt allows, and none for nothing.

Decided from good images alone, before the thresholds are: scores of another number of steps are other scores. Steps
that together lower the loss of good images by less than 1 % are not taken (early stop, where every part takes the same
time). Time is the exported graph's, on this machine.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from trainer.export import export_graph
from trainer.inversion import Inversion
from trainer.learning import Progress
from trainer.reconstructors.dcgan import Dcgan, signed
from trainer.timing import engine_of, engine_times_ms, slowest_ms

MOST_STEPS = 16  # each adds a hundred nodes to the graph
TRIAL_STEPS = 4
WORTH = 0.01  # of the loss before the search
JUDGED_BY = 32  # images


def pick_steps(network: Dcgan, detector: nn.Module, images: Tensor, engine_ms: float, progress: Progress) -> str:
    """Set the steps of a network that the detector searches with, and return what was decided, for people.

    images: good ones that were not learnt from, (n, C, h, w) in 0..1. engine_ms: what the engine may take for one.
    """
    worth = worthwhile(network, images[:JUDGED_BY])
    search = network.inversion
    bare_ms = _times_ms(search, 0, detector, images[:1])
    progress("time of the search", 1, 2)
    trial_ms = _times_ms(search, TRIAL_STEPS, detector, images[:1])
    progress("time of the search", 2, 2)
    step_ms = max(0.0, float(np.median(trial_ms) - np.median(bare_ms))) / TRIAL_STEPS
    slowest = slowest_ms(bare_ms)
    search.take(min(worth, affordable(engine_ms, slowest, step_ms)))
    while search.steps > 0:  # until it holds as it stands, slowest parts and all
        took_ms = slowest_ms(_times_ms(search, search.steps, detector, images[:1]))
        if took_ms <= engine_ms:
            break
        step_ms = (took_ms - slowest) / search.steps
        search.take(min(search.steps - 1, affordable(engine_ms, slowest, step_ms)))
    return told(search.steps, worth, engine_ms, slowest, step_ms)


def affordable(engine_ms: float, bare_ms: float, step_ms: float) -> int:
    """Return how many steps fit where the rest takes bare_ms: none if that alone is too long, MOST_STEPS at most."""
    if not engine_ms > bare_ms:
        return 0
    if step_ms * MOST_STEPS <= engine_ms - bare_ms:
        return MOST_STEPS
    return math.floor((engine_ms - bare_ms) / step_ms)


def worthwhile(network: Dcgan, images: Tensor) -> int:
    """Return after how many steps the loss of good images is within 1 % of where MOST_STEPS would bring it."""
    search = network.inversion
    search.take(MOST_STEPS)
    target = signed(images)
    with torch.inference_mode():
        course = search.course(target, network.encoder(target)).double().mean(1)
    enough = course - course[-1] <= WORTH * course[0]
    return int(torch.nonzero(enough)[0])


def told(steps: int, worth: int, engine_ms: float, bare_ms: float, step_ms: float) -> str:
    """Return the decision in words."""
    costs = f"here the engine has {engine_ms:.3g} ms and takes {bare_ms:.3g} without, {step_ms:.3g} more for each"
    if steps == worth < MOST_STEPS:
        return f"search steps: {steps}, more would lower the loss of good parts by less than {WORTH:.0%} ({costs})"
    if steps == MOST_STEPS:
        return f"search steps: {steps}, the most that are taken ({costs})"
    return f"search steps: {steps}, as many as the takt allows ({costs})"


def _times_ms(search: Inversion, steps: int, detector: nn.Module, image: Tensor) -> list[float]:
    search.take(steps)
    example = image.numpy()
    engine, _ = engine_of(export_graph(detector, example))
    return engine_times_ms(engine, example)
