"""The graph of a trained detector, and what proves it: beside the network at once, on every station later."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from calibration.recipe import SelfTest
from calibration.thresholds import Thresholds
from trainer.export import Parity, answers_of, checked_parity, export_graph
from trainer.half import HalfGraph, half_graph, with_fault
from trainer.learning import Learned, Material, Progress

PARITY_IMAGES = 16
SELFTEST_IMAGES = 3
SELFTEST_BYTES = 12 * 1024**2  # of large views fewer go along, one at least


def exported(
    learned: Learned, material: Material, thresholds: Thresholds, progress: Progress
) -> tuple[bytes, Parity, HalfGraph]:
    """Return the graph, how closely it follows the network, and the one in half precision.

    Raises ParityError if the graph does not follow.
    """
    progress("graph", 0, 2)
    chosen = parity_images(material)
    graph = export_graph(learned.module, chosen[:1])
    parity = checked_parity(learned.module, graph, chosen, thresholds.score, thresholds.map)
    progress("graph", 1, 2)
    half = half_graph(learned.module, chosen[::4], thresholds.score, thresholds.map)
    progress("graph", 2, 2)
    return graph, parity, half


def parity_images(material: Material) -> NDArray[np.float32]:
    """Return good images that the graph is compared on, evenly spaced, (n, C, h, w)."""
    images = material.batch.numpy()
    return images[np.unique(np.linspace(0, len(images) - 1, PARITY_IMAGES).round().astype(int))]


def selftest(learned: Learned, material: Material) -> SelfTest:
    """Return a few good parts, from the easiest to the hardest and that one with a fault, and the network's answers."""
    order = learned.held_out[np.argsort(learned.good_scores, kind="stable")]
    affordable = max(1, SELFTEST_BYTES // material.batch[0].numel() // 4 - 1)
    count = min(SELFTEST_IMAGES, len(order), affordable)
    chosen = order[np.linspace(len(order) - 1, 0, count).round().astype(int)[::-1]]
    good = material.batch[torch.from_numpy(chosen.copy())].numpy()
    batches = np.concatenate([good, with_fault(good[-1:])])  # engines must be right far above the threshold too
    answers = answers_of(learned.module, batches)
    return SelfTest(
        batches=batches,
        scores=tuple(score for _, score in answers),
        map_peaks=tuple(float(anomaly_map.max()) for anomaly_map, _ in answers),
        maps=np.stack([anomaly_map[None] for anomaly_map, _ in answers]),
    )
