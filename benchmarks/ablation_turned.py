"""What turned copies are worth for parts at any angle: image AUROC of patch_layout with and without them.

    python benchmarks/ablation_turned.py --data ../shared/data --out benchmarks/results/ablation_turned.csv

Every good and every test image is turned about its centre by a random angle of its own, edge pixels repeated, as parts
would lie on a belt; `upright` leaves them as they are. `share` is what decides: of the good patches' votes, how many
are for a turned other part being nearer than any other part as it is. Runs in torch, without registration, at 256x256.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from ablation_parts import FOLDS, as_batch
from machine import describe
from sklearn.metrics import roc_auc_score
from tables import categories_in, write_rows

from trainer.data import GOOD, Dataset, folds, read_dataset
from trainer.detectors import patch_layout, turned
from trainer.learning import Material, Options, in_chunks

POSES = ("turned", "upright")


@dataclass(frozen=True)
class Row:
    """One training set."""

    category: str
    pose: str  # turned | upright
    good_images: int
    seed: int
    share: float
    auroc_without: float  # Options.turned = "off"
    auroc_auto: float  # Options.turned = "auto"
    copies_used: bool


def main() -> int:
    arguments = parsed()
    print(describe())
    categories = categories_in(arguments.data, arguments.categories)
    rows = []
    for seed in range(arguments.seeds):
        for category in categories:
            dataset = read_dataset(arguments.data / category)
            for pose in arguments.poses:
                count = arguments.good or len(dataset.good)
                rows.append(measured(dataset, category, pose, count, seed=seed, entries=arguments.entries))
                print("  ".join(f"{name} {value}" for name, value in asdict(rows[-1]).items()), flush=True)
                if arguments.out is not None:
                    write_rows(arguments.out, [field.name for field in fields(Row)], [asdict(row) for row in rows])
    return 0


def measured(dataset: Dataset, category: str, pose: str, count: int, *, seed: int, entries: int) -> Row:
    """Learn from `count` random good images of one category, with and without turned copies."""
    order = np.random.default_rng(seed).permutation(len(dataset.good))[:count]
    good = [dataset.good[index] for index in sorted(order)]
    batches = [as_batch(items, dataset) for items in (good, dataset.test)]
    if pose == "turned":
        generator = torch.Generator().manual_seed(1000 + seed)
        batches = [turned.turned(batch, 1.0, generator) for batch in batches]
    material = Material(batches[0], torch.ones(256, 256), folds(good, FOLDS, seed), Path("unused"))
    defective = np.array([item.label != GOOD for item in dataset.test])
    options = Options(seed=seed, memory_entries=entries, turned="off")
    without = learned_auroc(material, options, batches[1], defective)
    found = share(material, seed)
    used = found >= turned.ANY_ANGLE
    auto = learned_auroc(material, replace(options, turned="auto"), batches[1], defective) if used else without
    return Row(category, pose, len(good), seed, round(found, 3), round(without, 4), round(auto, 4), used)


def learned_auroc(material: Material, options: Options, test: torch.Tensor, defective: np.ndarray) -> float:
    """Return the image AUROC of one fit."""
    module = patch_layout.fit(material, options, lambda *_: None).module
    return float(roc_auc_score(defective, in_chunks(module, test, lambda *_: None, "test")[1].numpy()))


def share(material: Material, seed: int) -> float:
    """Return the share of votes that `auto` decides by."""
    features = patch_layout.Features(Options(), 16, 16)
    return turned.nearer_turned_of(features, material, torch.Generator().manual_seed(seed), lambda *_: None, patches=1)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of categories in MVTec AD layout")
    parser.add_argument("--out", type=Path, help="CSV to write")
    parser.add_argument("--categories", nargs="*", help="only these")
    parser.add_argument("--poses", nargs="*", choices=POSES, default=list(POSES))
    parser.add_argument("--good", type=int, help="good images to learn from, drawn at random; all if not given")
    parser.add_argument("--entries", type=int, default=4000, help="of the memory")
    parser.add_argument("--seeds", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
