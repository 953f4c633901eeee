"""Light and focus: which frames the limits learnt from good parts refuse, and what looking at a frame costs.

    python benchmarks/condition.py --data FOLDER

FOLDER holds categories in MVTec AD layout. Limits come from train/good. Refused, of the test images: good ones as they
are and under 20 % less and more light, defective ones, good ones with the lamp off (black level 3.5, noise 0.4 counts).
Noticed: the share of train/good refused once half the light, twice the light or a Gaussian of 2.5 px is drawn on it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from machine import describe

from calibration.condition import ConditionLimits, Glimpse, glimpse, learn_limits, measured, noticed
from calibration.images import image_files, read_image
from calibration.preprocess import View

SIDE_PX = 256  # of the detector's input
N, WARM_UP = 500, 50


def main() -> None:
    """Print one line per category, then the cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data
    print(describe())
    print("refused of the test images: good, good x 0.8, good x 1.2, defective, lamp off; noticed on train/good")
    for category in sorted(path for path in data.iterdir() if (path / "train" / "good").is_dir()):
        report(category)
    for size in ((1000, 1000), (1000, 1000, 3)):
        cost(size)


def report(category: Path) -> None:
    """Print what the limits of one category refuse."""
    good = seen(category / "train" / "good")
    limits = learn_limits(good)
    tested = seen(category / "test" / "good")
    defective = [
        part for folder in sorted((category / "test").iterdir()) if folder.name != "good" for part in seen(folder)
    ]
    dark = [lamp_off(part, number) for number, part in enumerate(tested)]
    sets = (tested, under(tested, 0.8), under(tested, 1.2), defective, dark)
    counted = ", ".join(f"{refused(parts, limits)} of {len(parts)}" for parts in sets)
    told = ", ".join(f"{name} {share:.0%}" for name, share in noticed(good, limits).items())
    print(f"{category.name}: {counted}; {told} (n = {len(good)})")


def seen(folder: Path) -> list[Glimpse]:
    """Return the images of a folder in small."""
    return [small(read_image(file)) for file in image_files(folder)]


def small(pixels: np.ndarray) -> Glimpse:
    """Return an image as the agent looks at it where the product is not registered."""
    view = View(SIDE_PX, SIDE_PX, colour=pixels.ndim == 3, reference_size=pixels.shape[:2])
    return glimpse(pixels, 8, view, registered=False)


def under(parts: Sequence[Glimpse], gain: float) -> list[Glimpse]:
    """Return the parts under another light."""
    return [
        Glimpse(cv2.convertScaleAbs(part.gray, alpha=gain), cv2.convertScaleAbs(part.peak, alpha=gain))
        for part in parts
    ]


def lamp_off(part: Glimpse, seed: int) -> Glimpse:
    """Return what a sensor delivers in the dark."""
    pixels = np.random.default_rng(seed).normal(3.5, 0.4, part.gray.shape).clip(0, 255).astype(np.uint8)
    return Glimpse(pixels, pixels)


def refused(parts: Sequence[Glimpse], limits: ConditionLimits) -> int:
    """Return how many are refused."""
    return sum(limits.complaint(measured(part)) is not None for part in parts)


def cost(size: tuple[int, ...]) -> None:
    """Print what one frame takes, ms."""
    pixels = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    took_ms = []
    for _ in range(WARM_UP + N):
        started_ns = time.perf_counter_ns()
        measured(small(pixels))
        took_ms.append((time.perf_counter_ns() - started_ns) / 1e6)
    p50, p99 = np.percentile(took_ms[WARM_UP:], (50, 99))
    print(f"{'x'.join(map(str, size))}: p50 {p50:.2f}, p99 {p99:.2f}, max {max(took_ms[WARM_UP:]):.2f} ms (n = {N})")


if __name__ == "__main__":
    main()
