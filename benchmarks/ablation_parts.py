"""What each part of patch_layout is worth: image AUROC per category of every part, every sum of parts, and as weighed.

    python benchmarks/ablation_parts.py --data ../shared/data --out benchmarks/results/ablation_parts.csv

Runs in torch, without registration, on all images at 256x256; `--share 0.5 --seed 1` learns from a random half.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from machine import describe
from sklearn.metrics import roc_auc_score
from tables import categories_in

from calibration.preprocess import View
from trainer.data import GOOD, Dataset, Item, Pictures, folds, read_dataset, survey
from trainer.detectors import patch_layout
from trainer.learning import Material, Options, in_chunks
from trainer.prepared import prepared_item

FOLDS = 5
PARTS = ("memory", "gaussian", "layout")
WEIGHED = "as shipped"  # the sum of all three, the layout as much as it explains of unseen good images
SUMS = tuple(chosen for size in (1, 2, 3) for chosen in combinations(range(3), size))


def main() -> int:
    arguments = parsed()
    print(describe())
    categories = categories_in(arguments.data, arguments.categories)
    weighings = [np.isin(range(3), chosen).astype(float) for chosen in SUMS]
    table: dict[str, list[float]] = {"+".join(PARTS[part] for part in chosen): [] for chosen in SUMS}
    table[WEIGHED] = []
    for category in categories:
        standardised, defective, weights = scores(arguments.data / category, arguments.share, arguments.seed)
        for values, weighing in zip(table.values(), [*weighings, weights], strict=True):
            values.append(float(roc_auc_score(defective, standardised @ weighing)))
        print(
            category,
            f"layout counts {weights[2]:g}",
            *(f"{name}: {values[-1]:.4f}" for name, values in table.items()),
            flush=True,
        )
    rows = [[name, *(f"{value:.4f}" for value in values), f"{np.mean(values):.4f}"] for name, values in table.items()]
    for row in rows:
        print("  ".join(row))
    if arguments.out is not None:
        with arguments.out.open("w", newline="") as file:
            csv.writer(file).writerows([["parts", *categories, "mean"], *rows])
    return 0


def scores(root: Path, share: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (each part's standardised score of the test images (m, 3), defective (m,), weights (3,))."""
    dataset = read_dataset(root)
    order = np.random.default_rng(seed).permutation(len(dataset.good))
    good = [dataset.good[index] for index in sorted(order[: round(share * len(order))])]
    batches = [as_batch(items, dataset) for items in (good, dataset.test)]
    material = Material(batches[0], torch.ones(256, 256), folds(good, FOLDS, seed), Path("unused"))
    module = patch_layout.fit(material, Options(seed=seed), lambda *_: None).module
    assert isinstance(module, patch_layout.PatchLayout)
    raw = in_chunks(Parts(module), batches[1], lambda *_: None, "test")[0]
    standardised = (raw - module.weighing.centre) / module.weighing.scale
    defective = np.array([item.label != GOOD for item in dataset.test])
    return standardised.numpy(), defective, module.weighing.weights.numpy()


def as_batch(items: Sequence[Item], dataset: Dataset) -> torch.Tensor:
    """Return (n, C, 256, 256): the images as the detector sees them, not registered."""
    pictures = Pictures(dataset.photometric)
    found = survey(dataset.good, pictures)
    view = View(256, 256, found.colour > 0, found.size, fixed_size=False)
    return torch.from_numpy(np.concatenate([prepared_item(item, pictures, view, None).batch for item in items]))


class Parts(torch.nn.Module):
    """image -> [(N, 3) raw scores of memory, Gaussians and layout]."""

    def __init__(self, detector: patch_layout.PatchLayout) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Return a list of one tensor."""
        return [self.detector.part_scores(image)[0]]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of categories in MVTec AD layout")
    parser.add_argument("--out", type=Path, help="CSV to write")
    parser.add_argument("--categories", nargs="*", help="only these")
    parser.add_argument("--share", type=float, default=1.0, help="of the good images that are learnt from")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
