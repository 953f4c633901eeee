"""How a detector fares with fewer, other and contaminated good images.

    python benchmarks/robustness.py --data ../shared/data --out benchmarks/results/robustness.csv

Changes: `seed` (all good images, another seed), `half` (a random half), `small` (20 random images), `contaminated` (a
share of the good images exchanged for random defective ones, which are then no longer in the test; the 10 % that could
be drawn are left out of the test at every share, so that the rows compare). As `fit` does, the detector learns again
without the images that score as no good part does. Runs in torch, without registration, at
256x256. Every row is written as soon as it is known, and a run that was broken off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from ablation_parts import FOLDS, as_batch
from machine import describe
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from tables import categories_in

from trainer.catalogue import method
from trainer.data import GOOD, Dataset, Item, folds, read_dataset
from trainer.learning import Learned, Material, Options, in_chunks
from trainer.limits import fitted_thresholds, good_parts
from trainer.prepared import FEWEST_GOOD
from trainer.strangers import learn_without_strangers

SMALL = 20
SHARES = (0.0, 0.02, 0.05, 0.1)
FALSE_REJECT_RATE = 0.01


@dataclass(frozen=True)
class Case:
    """One training set."""

    category: str
    detector: str
    change: str  # seed | half | small | contaminated
    share: float  # of the good images exchanged for defective ones
    seed: int


@dataclass(frozen=True)
class Row:
    """What came of it."""

    category: str
    detector: str
    change: str
    share: float
    seed: int
    good_images: int  # that were learnt from, defective ones among them included
    defective_images: int  # among them
    auroc: float
    threshold: float
    rate: float  # false reject rate that the threshold is set for
    rate_upper_bound: float
    overkill: float
    escape: float
    left_out: int  # images that score as no good part does: the detector learnt again without them
    left_out_defective: int  # defective ones among these
    escape_if_kept: float  # at the threshold that they would have given


def main() -> int:
    arguments = parsed()
    print(describe())
    categories = categories_in(arguments.data, arguments.categories)
    rows = finished(arguments.out)
    done = {tuple(str(row[field.name]) for field in fields(Case)) for row in rows}
    for category in categories:
        dataset = read_dataset(arguments.data / category)
        for case in cases(category, arguments.detector, arguments.changes, arguments.seeds):
            if tuple(str(value) for value in asdict(case).values()) in done:
                continue
            row = measured(case, dataset)
            append(arguments.out, row)
            print("  ".join(f"{name} {value}" for name, value in asdict(row).items()), flush=True)
    summarise(finished(arguments.out))
    return 0


def cases(category: str, detector: str, changes: Sequence[str], seeds: int) -> list[Case]:
    """Return every training set of a category; contamination is drawn once per share."""
    found = [
        Case(category, detector, change, 0.0, s) for change in changes if change != "contaminated" for s in range(seeds)
    ]
    if "contaminated" in changes:
        found += [Case(category, detector, "contaminated", share, 0) for share in SHARES]
    return found


def measured(case: Case, dataset: Dataset) -> Row:
    """Learn from one training set and score the test images that it left alone."""
    learn, test, names = training_set(case, dataset)
    rounds: list[Learned] = []

    def again(kept: NDArray[np.int64]) -> Learned:
        rounds.append(learnt_from([learn[index] for index in kept], dataset, case))
        return rounds[-1]

    learned, _, left_out = learn_without_strangers(len(learn), again, FEWEST_GOOD)
    found = {learn[stranger.index].name for stranger in left_out}
    kept_threshold = fitted_thresholds(good_parts(rounds[0]), FALSE_REJECT_RATE)[0].score
    kept_scores = scores_of(rounds[0], test, dataset)
    scores = scores_of(learned, test, dataset) if left_out else kept_scores
    defective = np.array([item.label != GOOD for item in test])
    thresholds, _ = fitted_thresholds(good_parts(learned, left_out=sorted(found)), FALSE_REJECT_RATE)
    rejected = scores > thresholds.score
    return Row(
        **asdict(case),
        good_images=len(learn),
        defective_images=len(names),
        auroc=round(float(roc_auc_score(defective, scores)), 4),
        threshold=round(thresholds.score, 3),
        rate=round(thresholds.false_reject_rate, 4),
        rate_upper_bound=round(thresholds.rate_upper_bound, 4),
        overkill=round(float(rejected[~defective].mean()), 4),
        escape=round(float((~rejected[defective]).mean()), 4),
        left_out=len(found),
        left_out_defective=len(found & set(names)),
        escape_if_kept=round(float((kept_scores[defective] <= kept_threshold).mean()), 4),
    )


def learnt_from(items: Sequence[Item], dataset: Dataset, case: Case) -> Learned:
    """Return a detector of these images and no others."""
    material = Material(as_batch(items, dataset), torch.ones(256, 256), folds(items, FOLDS, case.seed), Path("unused"))
    return method(case.detector)(material, Options(seed=case.seed), lambda *_: None)


def scores_of(learned: Learned, items: Sequence[Item], dataset: Dataset) -> NDArray[np.float64]:
    return in_chunks(learned.module, as_batch(items, dataset), lambda *_: None, "test")[1].double().numpy()


def training_set(case: Case, dataset: Dataset) -> tuple[list[Item], list[Item], list[str]]:
    """Return (items to learn from, items to test on, names of the defective ones among the first)."""
    generator = np.random.default_rng(case.seed)
    order = generator.permutation(len(dataset.good))
    count = {"half": len(order) // 2, "small": min(SMALL, len(order))}.get(case.change, len(order))
    good = [dataset.good[index] for index in order[:count]]
    if case.change != "contaminated":
        return good, list(dataset.test), []
    defective = [item for item in dataset.test if item.label != GOOD]
    drawn = [defective[index] for index in generator.permutation(len(defective))[: round(max(SHARES) * count)]]
    strangers = drawn[: round(case.share * count)]
    kept_out = {item.name for item in drawn}
    test = [item for item in dataset.test if item.name not in kept_out]
    return good[: count - len(strangers)] + strangers, test, [item.name for item in strangers]


def finished(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, row: Row) -> None:
    new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        if new:
            writer.writeheader()
        writer.writerow(asdict(row))


def summarise(rows: Sequence[dict[str, str]]) -> None:
    """Print the mean, the lowest and the deviation of every group's AUROC."""
    groups: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("detector", "category", "change", "share"))
        groups.setdefault(key, []).append(float(row["auroc"]))
    for key, values in groups.items():
        print(
            f"{' '.join(key)}: AUROC mean {np.mean(values):.4f}, lowest {min(values):.4f}, "
            f"deviation {np.std(values):.4f}, n = {len(values)}"
        )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of categories in MVTec AD layout")
    parser.add_argument("--out", type=Path, required=True, help="CSV to write, and to go on from")
    parser.add_argument("--categories", nargs="*", help="only these")
    parser.add_argument("--detector", default="patch_layout")
    parser.add_argument("--changes", nargs="*", default=["seed", "half", "small", "contaminated"])
    parser.add_argument("--seeds", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
