"""Small faults on large parts: are faults of 10 px found, and at what cost, in one small view, one large, or tiles?

    python benchmarks/tiles.py --data ../shared/data --category ball_screw --layouts 256x256 704x256 t3x1
    python benchmarks/tiles.py --category simulated --layouts 256x256 960x768 t5x4

A layout is WIDTHxHEIGHT of one view, or tCOLUMNSxROWS tiles of 256 x 256. Every good test image is judged as it is and
with one drawn fault of 10 px (of the image): a soft disc, a piece of another image, a short line. Learnt from evenly
spaced good images, judged in torch; times are CPU time of one thread, without registration. "simulated": flanges of
the simulated line at 1600 x 1280 px, 2 megapixels, that lie still.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from machine import describe
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import nn

from agent.simulation.line import LineSettings, SimulatedLine
from calibration.images import read_image
from trainer.catalogue import method
from trainer.data import GOOD, Item, read_dataset
from trainer.learning import Learned, Material, Options
from trainer.tiling import Tiles, tiled

FAULT_PX = 10
SIMULATED, SIMULATED_PX = "simulated", (1600, 1280)
TILE = 256
FOLDS = 5

Picture = NDArray[np.float32]  # (H, W, C) 0..1


def main() -> None:
    """Print one line per layout."""
    asked = _arguments()
    torch.set_num_threads(1)
    print(describe(), file=sys.stderr)
    good, fresh = _simulated(asked) if asked.category == SIMULATED else _read(asked)
    generator = np.random.default_rng(0)
    faulty = [with_fault(part, fresh[number - 1], generator) for number, part in enumerate(fresh)]
    writer = None
    for layout in asked.layouts:
        row = measured(layout, asked, good, fresh, faulty)
        writer = writer or csv.DictWriter(sys.stdout, list(row))
        if row["layout"] == asked.layouts[0]:
            writer.writeheader()
        writer.writerow(row)
        sys.stdout.flush()


def measured(
    layout: str,
    asked: argparse.Namespace,
    good: Sequence[Picture],
    fresh: Sequence[Picture],
    faulty: Sequence[Picture],
) -> dict[str, Any]:
    """Return what one layout finds and costs."""
    tiles = _tiles(layout)
    width, height = (int(side) for side in layout.split("x")) if tiles is None else tiles.view[::-1]
    train = method(asked.detector) if tiles is None else tiled(method(asked.detector), tiles)
    with tempfile.TemporaryDirectory() as folder:
        material = Material(
            batch=_batch(good, height, width),
            keep=torch.ones(height, width),
            fold=np.arange(len(good)) % FOLDS,
            checkpoint=Path(folder) / "checkpoint",
        )
        started_s = time.process_time()
        options = Options(memory_entries=asked.entries, turned="off")
        learned: Learned = train(material, options, lambda *_: None)
        fit_s = time.process_time() - started_s
    started_s = time.process_time()
    passed, failed = (_scores(learned.module, _batch(parts, height, width)) for parts in (fresh, faulty))
    judge_s = (time.process_time() - started_s) / (len(fresh) + len(faulty))
    truth = [0] * len(passed) + [1] * len(failed)
    stored = [*learned.module.parameters(), *learned.module.buffers()]
    return {
        "category": asked.category,
        "detector": asked.detector,
        "layout": layout,
        "view": f"{width}x{height}",
        "fault_px": f"{FAULT_PX * width / fresh[0].shape[1]:.1f}x{FAULT_PX * height / fresh[0].shape[0]:.1f}",
        "good": len(good),
        "parts": f"{len(passed)}+{len(failed)}",
        "auroc": round(float(roc_auc_score(truth, [*passed, *failed])), 3),
        "cpu_ms": round(judge_s * 1e3),
        "fit_cpu_s": round(fit_s),
        "mb": round(sum(tensor.numel() * tensor.element_size() for tensor in stored) / 1e6, 1),
    }


def with_fault(part: Picture, other: Picture, generator: np.random.Generator) -> Picture:
    """Return the part with one fault of 10 px somewhere."""
    height, width = part.shape[:2]
    y, x = (int(generator.integers(FAULT_PX, side - 2 * FAULT_PX)) for side in (height, width))
    there = (slice(y, y + FAULT_PX), slice(x, x + FAULT_PX))
    found, cover = part.copy(), np.zeros((FAULT_PX, FAULT_PX), np.uint8)
    kind, tone = generator.integers(3), generator.choice([-1, 1]) * generator.uniform(0.15, 0.45)
    if kind == 0:
        cv2.circle(cover, (FAULT_PX // 2, FAULT_PX // 2), FAULT_PX // 2, 255, -1)
        found[there] += cv2.GaussianBlur(cover, (0, 0), 1)[:, :, None] / np.float32(255) * np.float32(tone)
    elif kind == 1:
        top, left = (int(generator.integers(0, side - FAULT_PX)) for side in other.shape[:2])
        found[there] = other[top : top + FAULT_PX, left : left + FAULT_PX][::-1] * generator.uniform(0.75, 1.25)
    else:
        cv2.line(cover, (1, int(generator.integers(FAULT_PX))), (8, int(generator.integers(FAULT_PX))), 255, 2)
        found[there] += cover[:, :, None] / np.float32(255) * np.float32(tone)
    return np.clip(found, 0, 1)


def _scores(module: nn.Module, batch: torch.Tensor) -> list[float]:
    with torch.inference_mode():
        return [float(module(image[None])[1]) for image in batch]


def _tiles(layout: str) -> Tiles | None:
    if not layout.startswith("t"):
        return None
    columns, rows = (int(side) for side in layout[1:].split("x"))
    return Tiles(columns, rows, TILE, TILE)


def _read(asked: argparse.Namespace) -> tuple[list[Picture], list[Picture]]:
    """Return the good images to learn from, and those to judge."""
    dataset = read_dataset(asked.data / asked.category)
    fresh = [item for item in dataset.test if item.label == GOOD]
    return _pictures(dataset.good, asked.good), _pictures(fresh, asked.test)


def _simulated(asked: argparse.Namespace) -> tuple[list[Picture], list[Picture]]:
    width, height = SIMULATED_PX
    settings = LineSettings(width_px=width, height_px=height, shift_px=0.0, angle_deg=0.0)
    found = []
    for lot, count in ((settings, asked.good), (replace(settings, lot=1), asked.test)):
        line = SimulatedLine(lot)
        pixels = (line.render(line.plan(number))[0] for number in range(1, count + 1))
        found.append([each[:, :, None].astype(np.float32) / np.float32(255) for each in pixels])
    return found[0], found[1]


def _pictures(items: Sequence[Item], most: int) -> list[Picture]:
    chosen = np.unique(np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int))
    found = [read_image(items[index].file) for index in chosen]
    return [(each[:, :, None] if each.ndim == 2 else each).astype(np.float32) / np.float32(255) for each in found]


def _batch(parts: Sequence[Picture], height: int, width: int) -> torch.Tensor:
    """Return (n, C, h, w)."""
    sized = [cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA) for part in parts]
    return torch.from_numpy(np.stack([each.reshape(height, width, -1).transpose(2, 0, 1) for each in sized]))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of categories; not for simulated")
    parser.add_argument("--category", default="ball_screw")
    parser.add_argument("--detector", default="patch_memory")
    parser.add_argument("--layouts", nargs="+", default=["256x256", "704x256", "t3x1"])
    parser.add_argument("--good", type=int, default=30)
    parser.add_argument("--test", type=int, default=40)
    parser.add_argument("--entries", type=int, default=500)
    asked = parser.parse_args()
    if asked.data is None and asked.category != SIMULATED:
        parser.error(f"--data is missing: give the folder that holds {asked.category}")
    return asked


if __name__ == "__main__":
    main()
