"""What benchmarks/peers.py does without anomalib: lists of files, resuming, tables."""

from __future__ import annotations

import argparse
import csv
import importlib
import json
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest

from trainer.data import read_dataset

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def peers(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("peers")


@pytest.fixture
def table(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("peers_table")


@pytest.fixture
def category(tmp_path) -> Path:
    root = tmp_path / "nut"
    for folder, count in (("train/good", 12), ("test/good", 2), ("test/crack", 2)):
        (root / folder).mkdir(parents=True)
        for number in range(count):
            cv2.imwrite(str(root / folder / f"{number}.png"), np.full((8, 8), number, np.uint8))
    return root


def settings(**given: object) -> argparse.Namespace:
    return argparse.Namespace(**{"size": 256, "seed": 0, "own_coreset": False, **given})


def answer(lists: dict, scores: tuple = (1.0, 2.0, 3.0, 4.0), exported: tuple = (1.0, 2.0, 3.0, 4.0)) -> dict:
    """Scores by rank in the test list, rejected above 2.5."""
    return {
        "train": sorted(lists["train"]),
        "test": [file for file, _ in lists["test"]],
        "trained_score": list(scores),
        "trained_reject": [None if score is None else score > 2.5 for score in scores],
        "export_score": list(exported),
        "export_reject": [None if score is None else score > 2.5 for score in exported],
        "fit_s": 1.5,
        "export": "ok",
    }


def test_the_files_laid_out_for_anomalib_are_those_of_our_lists_in_our_order(peers, category, tmp_path):
    dataset = read_dataset(category)
    lists = peers.file_lists(dataset)
    folders = peers.laid_out(dataset, tmp_path / "files")
    laid = [sorted(Path(folder).iterdir()) for folder in (folders["train"], *folders["defective"], folders["good"])]
    resolved = [[str(link.resolve()) for link in links] for links in laid]
    assert resolved[0] == lists["train"]  # natural order: 2.png before 10.png, though anomalib sorts by name
    assert [*resolved[1], *resolved[2]] == [file for file, _ in lists["test"]]


def test_links_of_an_earlier_list_do_not_stay(peers, category, tmp_path):
    dataset = read_dataset(category)
    peers.laid_out(dataset, tmp_path / "files")
    folders = peers.laid_out(peers.thinned(dataset, 3), tmp_path / "files")
    assert [link.resolve().name for link in sorted(Path(folders["train"]).iterdir())] == ["0.png", "6.png", "11.png"]


def test_an_answer_about_other_files_is_refused(peers, table, category):
    lists = peers.file_lists(read_dataset(category))
    other = answer(lists)
    other["train"] = other["train"][1:]
    with pytest.raises(SystemExit, match="11 train files found, 12 wanted"):
        table.row(lists, "anomalib", "padim", other)


def test_an_answer_that_lists_a_file_twice_is_refused(peers, table, category):
    lists = peers.file_lists(read_dataset(category))
    other = answer(lists)
    other["train"] = [*other["train"], other["train"][0]]
    with pytest.raises(SystemExit, match="one of them twice"):
        table.row(lists, "anomalib", "padim", other)


def test_a_stored_answer_is_taken_only_for_the_same_lists_and_settings(peers, category, tmp_path):
    dataset = read_dataset(category)
    calls = []

    def compute(arguments: argparse.Namespace, folder: Path, method: str) -> dict:
        calls.append((arguments.seed, method))
        return {"fit_s": len(calls)}

    lists = peers.file_lists(dataset)
    file = tmp_path / "answer.json"
    assert peers.answered(file, lists, compute, settings(), "padim") == {"fit_s": 1}
    assert peers.answered(file, lists, compute, settings(), "padim") == {"fit_s": 1}
    assert peers.answered(file, lists, compute, settings(seed=1), "padim") == {"fit_s": 2}
    fewer = peers.file_lists(peers.thinned(dataset, 3))
    assert peers.answered(file, fewer, compute, settings(seed=1), "padim") == {"fit_s": 3}
    whole = settings(seed=1, own_coreset=True)
    assert peers.answered(file, fewer, compute, whole, "padim") == {"fit_s": 4}
    assert calls == [(0, "padim"), *[(1, "padim")] * 3]


def test_a_race_is_run_again_when_an_answer_that_it_rests_on_is_new(peers, category, tmp_path):
    lists = peers.file_lists(read_dataset(category))
    seen = []

    def race(arguments: argparse.Namespace, folder: Path, ours: dict) -> dict:
        seen.append(ours)
        return {}

    for fit_s in (1, 1, 2):
        peers.answered(tmp_path / "duel.json", lists, race, settings(), {"patch_memory": {"fit_s": fit_s}})
    assert [ours["patch_memory"]["fit_s"] for ours in seen] == [1, 2]


def test_accuracy_and_flips_come_from_the_scores_of_either_side(peers, table, category):
    lists = peers.file_lists(read_dataset(category))
    assert [label for _, label in lists["test"]] == ["crack", "crack", "good", "good"]
    entry = table.row(lists, "anomalib", "padim", answer(lists, (4.0, 3.0, 2.0, 1.0), (4.0, 2.0, 2.2, 1.0)))
    assert (entry["trained_auroc"], entry["export_auroc"]) == (1.0, 0.75)
    assert entry["flips"] == 1
    assert (entry["train"], entry["test_good"], entry["test_defective"]) == (12, 2, 2)


def test_a_part_without_a_verdict_ranks_as_rejected_and_is_counted(peers, table, category):
    lists = peers.file_lists(read_dataset(category))
    entry = table.row(lists, "taktsight", "patch_memory", answer(lists, (None, 3.0, 2.0, 1.0), (None, 3.0, 2.0, 1.0)))
    assert (entry["trained_auroc"], entry["no_verdict"], entry["flips"]) == (1.0, 1, 0)


def test_ratios_set_their_inferencer_against_our_pipeline_and_export_against_export(peers, table, category):
    lists = peers.file_lists(read_dataset(category))
    rows = [
        table.row(lists, side, method, answer(lists))
        for side, method in (("taktsight", "patch_memory"), ("anomalib", "padim"))
    ]
    times = {
        name: {"p50_ms": p50, "p99_ms": 9.0, "cpu_ms": cpu}
        for name, p50, cpu in (
            ("patch_memory", 10.0, 20.0), ("patch_memory path", 12.0, 24.0), ("padim", 30.0, 50.0),
            ("padim openvino", 48.0, 60.0), ("padim torch", 90.0, 99.0),
        )
    }  # fmt: skip
    ours, theirs = table.with_latency(rows, {"rounds": 100, "load": 0.5, **times}, "patch_memory")
    assert (ours["export_ratio"], ours["path_ratio"]) == (1.0, 1.0)
    assert (theirs["export_ratio"], theirs["path_ratio"]) == (3.0, 4.0)
    assert (theirs["export_cpu_ratio"], theirs["path_cpu_ratio"]) == (2.5, 2.5)
    assert "| nut | anomalib padim | 30.0 / 9.0 | 50.0 | 3.0 (2.5) | 48.0 / 9.0 |" in table.latency_table(
        [ours, theirs]
    )


def test_what_was_replaced_stands_below_the_tables(peers, table, category):
    lists = peers.file_lists(read_dataset(category))
    quick = {"coreset_s": 3.0, "own_coreset_s": 900.0, "coreset_same": 409, "coreset_compared": 409}
    entry = table.row(lists, "anomalib", "patchcore", {**answer(lists), **quick, "torchvision_stub": True})
    text = table.tables([entry])
    assert "picked in C in 3 s" in text
    assert "about 900 s" in text
    assert "409 of 409 picks are the same" in text
    assert "torchvision's compiled operators were declared" in text


def test_rows_of_categories_that_were_not_run_stay_in_the_csv(table, tmp_path):
    file = tmp_path / "peers.csv"
    table.write_csv(file, [{"category": "wood", "fit_s": 1}, {"category": "bottle", "fit_s": 2}], ["wood", "bottle"])
    table.write_csv(file, [{"category": "wood", "fit_s": 3}], ["wood"])
    with file.open(newline="", encoding="utf-8") as stored:
        assert [(row["category"], row["fit_s"]) for row in csv.DictReader(stored)] == [("bottle", "2"), ("wood", "3")]


def test_an_answer_is_written_in_one_step(peers, tmp_path):
    file = tmp_path / "answer.json"
    peers.store(file, {"fit_s": 1})
    with pytest.raises(TypeError):
        peers.store(file, {"fit_s": object()})
    assert json.loads(file.read_text(encoding="utf-8")) == {"fit_s": 1}
