"""The papers' tables: images divided as the paper does it, and a page that never invents a number."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from trainer.data import Dataset, Item
from trainer.metrics import ScoredImage

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def papers(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("papers")


def dataset() -> Dataset:
    def items(folder: str, label: str, n: int) -> list[Item]:
        return [Item(Path(f"{folder}/{label}/{i}"), f"{folder}/{label}/{i}", label) for i in range(n)]

    test = [*items("test", "good", 10), *items("test", "crack", 10), *items("test", "fray", 5)]
    return Dataset("tile", tuple(items("train", "good", 20)), tuple(test), None)


def cell(papers: ModuleType, labels: str):
    return papers.Cell(1, "tile", "VAE", "vae+elbo", 64, labels=labels)


def labels_of(items) -> dict[str, int]:
    return {label: sum(item.label == label for item in items) for label in {item.label for item in items}}


def test_four_fifths_of_every_kind_are_learnt_from_and_nothing_is_on_both_sides(papers: ModuleType):
    divided = papers.as_in_paper(dataset(), cell(papers, "threshold"), seed=1)
    assert labels_of(divided.good) == {"good": 24}
    assert labels_of(divided.defects) == {"crack": 8, "fray": 4}
    assert labels_of(divided.test) == {"good": 6, "crack": 2, "fray": 1}
    names = [item.name for item in (*divided.good, *divided.defects, *divided.test)]
    assert len(set(names)) == 45


def test_half_of_the_defects_are_learnt_from_and_the_good_stay_where_they_are(papers: ModuleType):
    divided = papers.as_in_paper(dataset(), cell(papers, "half"), seed=1)
    assert labels_of(divided.defects) == {"crack": 5, "fray": 2}
    assert labels_of(divided.test) == {"good": 10, "crack": 5, "fray": 3}
    assert len(divided.good) == 20
    assert papers.as_in_paper(dataset(), cell(papers, "none"), seed=1) == dataset()


def test_a_cell_that_nobody_ran_says_so_and_one_that_failed_says_why(papers: ModuleType):
    every = papers.cells(["lite0", "vgg16", "xception"])
    common = {"detector": "x", "backbone": "lite0", "size_px": "64", "minutes": "inf"}
    hybrid = {"table": "3", "category": "bottle", "method": "hybrid", **common}
    failed = {"table": "3", "category": "bottle", "method": "NN", **common}
    page = papers.page(
        [
            {**hybrid, "measure": "auroc", "value": "0.9876"},
            {**hybrid, "measure": "ap", "value": "0.9900"},
            {**failed, "measure": "failed", "value": "too few images"},
        ],
        every,
    )
    assert "| bottle | hybrid | 0.9971 | 0.999 | 0.988 | 0.990 | lite0, 64 px |" in page
    assert "| bottle | variation | 0.7925 | 0.9312 | not yet measured | not yet measured | - |" in page
    assert "- table 3, bottle, NN: too few images" in page
    assert papers.page([], every).count("not yet measured") > 60


def test_the_best_accuracy_is_that_of_the_best_threshold(papers: ModuleType):
    scores = [("good", 1.0), ("good", 2.0), ("good", 5.0), ("crack", 3.0), ("crack", 4.0)]
    images = [ScoredImage(str(i), label, score) for i, (label, score) in enumerate(scores)]
    assert papers.best_accuracy(images) == pytest.approx(4 / 5)


def test_the_distance_of_two_normals_is_that_of_their_means_and_deviations(papers: ModuleType):
    generator = np.random.default_rng(0)
    a, b = generator.normal(0, 1, (20_000, 2)), generator.normal([3, 0], [1, 2], (20_000, 2))
    assert papers.frechet(a, b) == pytest.approx(9 + 1, rel=0.03)


def test_a_training_is_ended_after_an_epoch_when_its_minutes_are_over(papers: ModuleType):
    papers.watch(float("inf"), 50)("vae, loss 3", 1, 50)
    late = papers.watch(0.0, 50)
    late("features", 10, 50)  # no epoch
    late("vae, loss 3", 50, 50)  # done anyway
    with pytest.raises(papers.OutOfTimeError) as over:
        late("vae, loss 3", 7, 50)
    assert over.value.epochs == 7
