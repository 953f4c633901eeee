"""anomalib's greedy coreset, computed in C: its own loop takes most of an hour for 200 images on two cores.

Only the loop is replaced. Random projection, starting point and distance are anomalib's own; `compared` says on a small
set whether both pick the same patches; `facts` holds what its loop would have taken, from its first steps.
"""

from __future__ import annotations

import ctypes
import subprocess
import time
from pathlib import Path

import numpy as np
import torch
from anomalib.models.components.sampling.k_center_greedy import KCenterGreedy

BLOCK = 16  # as in coreset.c
TIMED_STEPS = 10
COMPARED_PATCHES = 4096

own_loop = KCenterGreedy.select_coreset_idxs


class QuickCoreset:
    """Stands in for `KCenterGreedy.select_coreset_idxs` once installed; `facts` tells what it did."""

    def __init__(self, folder: Path) -> None:
        """Compile coreset.c into folder. Raises SystemExit without a C compiler, CalledProcessError if it fails."""
        library = folder / "coreset.so"
        source = Path(__file__).with_name("coreset.c")
        flags = ("-O3", "-march=native", "-ffast-math", "-fopenmp", "-shared", "-fPIC")
        try:
            subprocess.run(["cc", *flags, source, "-o", library], check=True)
        except FileNotFoundError as error:
            raise SystemExit("no C compiler found (cc): install one, or give --own-coreset") from error
        self._greedy = ctypes.CDLL(str(library.resolve())).greedy_picks
        self.facts: dict[str, object] = {}
        self._sample = torch.empty(0)

    def install(self) -> None:
        """Let anomalib call this from now on."""
        quick = self

        def select(sampler: KCenterGreedy) -> list[int]:
            started = time.monotonic()
            quick._sample = sampler.embedding[:COMPARED_PATCHES].clone()
            picks = quick.select(sampler)
            took_s = time.monotonic() - started
            timed, timed_cpu = time.monotonic(), time.process_time()
            estimate_s = _own_loop_s(sampler)  # on all patches: its memory counts in the peak as it would by itself
            quick.facts = {
                "coreset_s": round(took_s, 1),
                "own_coreset_s": round(estimate_s, 1),
                "timing_s": time.monotonic() - timed,
                "timing_cpu_s": time.process_time() - timed_cpu,
            }
            return picks

        KCenterGreedy.select_coreset_idxs = select

    def select(self, sampler: KCenterGreedy) -> list[int]:
        """Return the rows that anomalib's own loop picks from sampler.embedding (n, d), in its order."""
        sampler.model.fit(sampler.embedding)
        sampler.features = sampler.model.transform(sampler.embedding)
        start = int(torch.randint(high=sampler.n_observations, size=(1,)))
        head, tail = _rotated(sampler.features)
        picks = np.zeros(sampler.coreset_size, np.int64)
        done = self._greedy(
            _pointer(head),
            _pointer(tail),
            ctypes.c_long(len(head)),
            ctypes.c_long(tail.shape[1]),
            ctypes.c_long(len(picks)),
            ctypes.c_long(start),
            _pointer(picks),
        )
        if done != 0:
            raise MemoryError("no memory for the coreset's distances: give fewer good images with --most-good")
        return picks.tolist()

    def compared(self) -> dict[str, object]:
        """Return how many of the picks from the first 4096 patches both loops have in common, and where they part."""
        picked = []
        for select in (own_loop, self.select):
            torch.manual_seed(0)
            np.random.seed(0)  # noqa: NPY002 the projection draws from the global generator
            picked.append(select(KCenterGreedy(self._sample, sampling_ratio=0.1)))
        own, ours = picked
        parted = next((rank for rank, (a, b) in enumerate(zip(own, ours, strict=True)) if a != b), len(own))
        return {"coreset_compared": len(own), "coreset_same": len(set(own) & set(ours)), "coreset_parted_at": parted}


def _own_loop_s(sampler: KCenterGreedy) -> float:
    """Return what anomalib's own loop would take: the median of its first steps times the number of its steps."""
    sampler.reset_distances()
    index = torch.tensor(0)
    steps = []
    for _ in range(TIMED_STEPS):
        started = time.perf_counter()
        sampler.update_distances(index)
        index = sampler.get_new_idx()
        steps.append(time.perf_counter() - started)
    return float(np.median(steps)) * sampler.coreset_size


def _rotated(features: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows on their principal axes, as the first 16 numbers and the rest; distances stay what they were."""
    centred = features.float() - features.float().mean(0)
    values, vectors = torch.linalg.eigh((centred.T @ centred).double())
    held = int((values > values[-1] * 1e-9).sum())  # a projection to more dimensions adds none
    turned = (centred.double() @ vectors.flip(1)[:, :held]).float().numpy()
    rest = max(BLOCK, -(-(held - BLOCK) // BLOCK) * BLOCK)
    padded = np.zeros((len(turned), BLOCK + rest), np.float32)
    padded[:, :held] = turned
    return np.ascontiguousarray(padded[:, :BLOCK]), np.ascontiguousarray(padded[:, BLOCK:])


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)
