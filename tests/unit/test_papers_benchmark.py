"""The papers' tables: images divided as the paper does it, and a page that never invents a number."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

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


def rows_of(table: int, category: str, method: str, figures: dict[str, float]) -> list[dict]:
    common = {"table": str(table), "category": category, "method": method, "detector": "x", "backbone": "lite0"}
    common |= {"size_px": "64", "minutes": "inf"}
    return [{**common, "measure": name, "value": f"{value:.4f}"} for name, value in figures.items()]


def table_1(crack_of_the_vae: float) -> list[dict]:
    rows = []
    for method, f1 in {"GAN": 0.2, "VAE": 0.3, "Siamese + GAN": 0.5, "Siamese + VAE": 0.6}.items():
        figures = {f"{kind} f1": f1 for kind in ("blowhole", "break", "crack", "fray", "uneven")}
        if method == "VAE":
            figures["crack f1"] = crack_of_the_vae
        rows += rows_of(1, "magnetic_tile", method, figures)
    return rows


def table_2(gan: float, ratio: float) -> list[dict]:
    rows = rows_of(2, "wood", "GAN", {"accuracy": gan, "frechet_ratio": ratio})
    for method, accuracy in {"GMM": 0.85, "one-class SVM": 0.5, "LOF": 0.7}.items():
        rows += rows_of(2, "wood", method, {"accuracy": accuracy})
    return rows


SIAMESE = "000: Siamese"
RATIO = "001: Fréchet distance defect / good at least 10, wood"
ACCURACY = "001: the GAN method has the best accuracy on its codes, wood"
HYBRID = "002: hybrid on bottle"


def test_a_target_is_met_missed_or_not_yet_measured(papers: ModuleType):
    def judged(rows: list[dict], target: str) -> list[str]:
        page = papers.page(rows, papers.cells(["lite0"]))
        (line,) = [line for line in page.splitlines() if line.startswith(f"| {target}")]
        return [cell.strip() for cell in line.split("|")[2:4]]

    assert all(judged([], target) == ["-", "not yet measured"] for target in (SIAMESE, RATIO, ACCURACY, HYBRID))
    assert judged(table_1(0.3), SIAMESE) == ["in 5 of 5 types", "met"]
    assert judged(table_1(0.55), SIAMESE) == ["in 4 of 5 types", "missed"]
    assert judged(table_2(0.8, 12.5), RATIO) == ["12.5", "met"]
    assert judged(table_2(0.8, 9.9), RATIO) == ["9.9", "missed"]
    assert judged(table_2(0.8, 1.0), ACCURACY) == ["place 2 of 4", "missed"]
    assert judged(table_2(0.9, 1.0), ACCURACY) == ["place 1 of 4", "met"]
    assert judged(rows_of(3, "bottle", "hybrid", {"auroc": 0.9976, "ap": 0.9992}), HYBRID) == ["0.9976, 0.9992", "met"]


def test_the_best_accuracy_is_that_of_the_best_threshold(papers: ModuleType):
    scores = [("good", 1.0), ("good", 2.0), ("good", 5.0), ("crack", 3.0), ("crack", 4.0)]
    images = [ScoredImage(str(i), label, score) for i, (label, score) in enumerate(scores)]
    assert papers.best_accuracy(images) == pytest.approx(4 / 5)


def test_a_training_is_ended_after_an_epoch_when_its_minutes_are_over(papers: ModuleType):
    papers.watch(float("inf"), 50, not_yet)("vae, loss 3", 1, 50)
    late = papers.watch(0.0, 50, not_yet)
    late("features", 10, 50)  # no epoch
    late("vae, loss 3", 50, 50)  # done anyway
    with pytest.raises(papers.OutOfTimeError) as over:
        late("vae, loss 3", 7, 50)
    assert over.value.epochs == 7


def not_yet(epochs: int) -> None:
    raise AssertionError(f"told of {epochs} epochs before the end")


def test_what_follows_the_last_epoch_is_told_once(papers: ModuleType):
    told: list[int] = []
    watching = papers.watch(float("inf"), 50, told.append)
    for what in ("images", "generator", "generator", "encoder, loss 3", "codes", "codes", "held-out scores"):
        watching(what, 1, 50)
    assert told == [50]


def test_cells_with_the_same_reconstructor_share_its_training(papers: ModuleType, tmp_path: Path):
    first, second, other, plain = (
        papers.Cell(2, "wood", name, name, 128, options=options)
        for name, options in (("dcgan+lof", {}), ("dcgan+gmm", {}), ("dcgan+ssim", {"latent": 8}), ("gmm", {}))
    )

    def shared(cell, epochs: int = 200):
        options = papers.Options(epochs=epochs)
        request = papers.FitRequest(tmp_path / f"{cell.method}.recipe", cell.detector, 128, 128, options=options)
        return papers.Shared(tmp_path, cell, request)

    trained = shared(first)
    trained.keep(40)  # fit has left no checkpoint
    assert shared(second).request.options.epochs == 200
    trained.checkpoint.write_bytes(b"network")
    trained.keep(40)
    found = shared(second)
    assert (found.request.options.epochs, found.checkpoint.read_bytes()) == (40, b"network")
    for unlike in (other, plain):
        assert shared(unlike).request.options.epochs == 200
        assert not shared(unlike).checkpoint.exists()
    found.checkpoint.write_bytes(b"further")  # one that was interrupted goes on, as far as the shared one went
    again = shared(second)
    assert (again.request.options.epochs, again.checkpoint.read_bytes()) == (40, b"further")
