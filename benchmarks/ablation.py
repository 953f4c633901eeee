"""What each part of patch_memory is worth: image AUROC per category, one change at a time.

    python benchmarks/ablation.py --data ../shared/data --out benchmarks/results/ablation.csv

Runs in torch, without registration, on all images at 256x256; every variant sees the same features.
"""

from __future__ import annotations

import argparse
import csv
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from machine import describe
from sklearn.metrics import roc_auc_score
from tables import categories_in

from calibration.preprocess import View
from trainer.data import GOOD, Item, Pictures, read_dataset, survey
from trainer.detectors import patch_memory, student
from trainer.learning import Options, in_chunks
from trainer.prepared import prepared_item

FOLDS = 5


@dataclass(frozen=True)
class Variant:
    """patch_memory with one thing changed."""

    name: str
    entries: int = 4000
    scaled: bool = True  # channels brought to deviation 1
    standardised: bool = True  # each place by what held-out good parts show there
    odd: float = patch_memory.ODD  # share of them that a place's moments leave out
    smoothed: bool = False  # the map under a Gaussian of one cell
    top_cells: int = 3


SHIPPED = Variant("as shipped")
VARIANTS = (
    SHIPPED,
    replace(SHIPPED, name="2000 entries", entries=2000),
    replace(SHIPPED, name="8000 entries", entries=8000),
    replace(SHIPPED, name="channels unscaled", scaled=False),
    replace(SHIPPED, name="places not standardised", standardised=False),
    replace(SHIPPED, name="moments of all images", odd=0.0),
    replace(SHIPPED, name="map smoothed", smoothed=True),
    replace(SHIPPED, name="score = maximum", top_cells=1),
    replace(SHIPPED, name="score = top 1 %", top_cells=10),
    Variant("plain PatchCore-like", scaled=False, standardised=False, top_cells=1),
)


def main() -> int:
    arguments = parsed()
    print(describe())
    categories = categories_in(arguments.data, None)
    table: dict[str, list[float]] = {variant.name: [] for variant in VARIANTS}
    for category in categories:
        good, test, defective = features(arguments.data / category)
        for variant in VARIANTS:
            table[variant.name].append(float(roc_auc_score(defective, scores(good, test, variant))))
        print(category, " ".join(f"{name}: {values[-1]:.4f}" for name, values in table.items()), flush=True)
    rows = [[name, *(f"{value:.4f}" for value in values), f"{np.mean(values):.4f}"] for name, values in table.items()]
    for row in rows:
        print("  ".join(row))
    if arguments.out is not None:
        with arguments.out.open("w", newline="") as file:
            csv.writer(file).writerows([["variant", *categories, "mean"], *rows])
    return 0


def features(root: Path) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Return (good (n, D, h', w'), test (m, D, h', w'), defective (m,))."""
    dataset = read_dataset(root)
    pictures = Pictures(dataset.photometric)
    found = survey(dataset.good, pictures)
    view = View(256, 256, found.colour > 0, found.size, fixed_size=False)
    network = patch_memory.Features(Options())

    def embedded(items: tuple[Item, ...]) -> torch.Tensor:
        batch = np.concatenate([prepared_item(item, pictures, view, None).batch for item in items])
        return in_chunks(network, torch.from_numpy(batch), lambda *_: None, "features")[0]

    return embedded(dataset.good), embedded(dataset.test), np.array([item.label != GOOD for item in dataset.test])


def scores(good: torch.Tensor, test: torch.Tensor, variant: Variant) -> np.ndarray:
    """Return (m,) scores of the test images."""
    mean = good.mean(dim=(0, 2, 3), keepdim=True)
    scale = 1.0 / (good.std(dim=(0, 2, 3), keepdim=True) + 1e-3) if variant.scaled else torch.ones_like(mean)
    good, test = (good - mean) * scale, (test - mean) * scale
    maps = distances(test, good, variant)
    if variant.standardised:
        held_out = torch.empty(len(good), 1, *good.shape[2:])
        fold = np.arange(len(good)) % FOLDS
        for k in range(FOLDS):
            held_out[fold == k] = distances(good[fold == k], good[fold != k], variant)
        usual, spread = patch_memory.moments(held_out, variant.odd)
        maps = (maps - usual) / spread
    if variant.smoothed:
        maps = student.smoothed(maps)
    return patch_memory.top_mean(maps, variant.top_cells).numpy()


def distances(images: torch.Tensor, good: torch.Tensor, variant: Variant) -> torch.Tensor:
    """Return (n, 1, h', w'): each place's distance to a memory of the good images."""
    patches = good.permute(0, 2, 3, 1).reshape(-1, good.shape[1])
    memory = patch_memory.coreset(patches, variant.entries, 0, lambda *_: None)
    squared = (memory * memory).sum(1)
    return torch.cat([patch_memory.nearest_distance(image[None], memory.T, squared) for image in images])


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of categories in MVTec AD layout")
    parser.add_argument("--out", type=Path, help="CSV to write")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
