"""The four papers' tables, theirs beside ours: every system trained, exported, measured in the exported graph.

    python benchmarks/papers.py --data ../shared/data --out DIR

Resumable: each cell's figures are appended to DIR/papers.csv as soon as it is done, and an interrupted training goes
on from its checkpoint. Cells with the same reconstructor on the same images share its training: the fit time of all
but the first is that of the scorer. --minutes-per-fit ends every training after so long, with the network as it is
then (dcgan, its encoder and the Siamese network are three); --quick shows that everything runs (64 px, 2 epochs, 24
images) and is worth nothing else. Trains on a GPU where torch finds one; what is measured runs on the CPU. Writes
docs/papers.md from the CSV, or the file given with --page.
"""

from __future__ import annotations

import argparse
import csv
import resource
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from machine import describe
from papers_cells import TYPES, Cell, as_in_paper, cells
from papers_page import page

from agent.engines.engine import EngineSettings, open_engine
from calibration.errors import TaktsightError
from calibration.recipe import Recipe
from trainer.data import GOOD, Dataset, Pictures, read_dataset
from trainer.evaluate import scored_images
from trainer.fit import FitRequest, FitResult, fit
from trainer.label_limits import normal_intersection
from trainer.learning import Options
from trainer.metrics import ScoredImage, evaluate
from trainer.scorers.latent_frechet import diagonal_distance, frechet_distance, whole_covariances
from trainer.training import checkpoint_of

COLUMNS = ("table", "category", "method", "detector", "backbone", "size_px", "minutes", "measure", "value")
WEIGHTS = {"vgg16": "vgg16_imagenet_notop_fp16.pth", "xception": "xception_imagenet_notop_fp16.pth"}
SIAMESE_LIMIT = 20.0  # the score of a probability of 0.5
TIMED, WARM_UP = 50, 5  # inferences


class OutOfTimeError(Exception):
    """The minutes for this fit are over; the checkpoint holds what was learnt so far."""

    def __init__(self, epochs: int) -> None:
        super().__init__()
        self.epochs = epochs


def main() -> int:
    arguments = parsed()
    arguments.out.mkdir(parents=True, exist_ok=True)
    print(describe())
    file = arguments.out / "papers.csv"
    rows = read_rows(file)
    there = ["lite0", *(name for name, weights in WEIGHTS.items() if (arguments.weights / weights).is_file())]
    for cell in cells(there):
        done = {(row["table"], row["category"], row["method"]) for row in rows}
        wanted = (
            cell.table in arguments.tables
            and (arguments.methods is None or cell.method in arguments.methods)
            and (arguments.categories is None or cell.category in arguments.categories)
        )
        if not wanted or cell.key in done or not (arguments.data / cell.category).is_dir():
            continue
        print(f"table {cell.table}  {cell.category}  {cell.method}  ({cell.detector}, {cell.backbone})", flush=True)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # a fresh process: its peak memory is its own
            measured = pool.submit(measure, arguments, cell).result()
        new = [{**described(arguments, cell), "measure": name, "value": value} for name, value in measured.items()]
        append(file, new)
        rows += new
        print("   " + "  ".join(f"{name} {value}" for name, value in measured.items()), flush=True)
    text = page(rows, cells(["lite0", *WEIGHTS]))
    arguments.page.write_text(text, encoding="utf-8")
    print(text)
    print(f"written: {arguments.page}")
    return 0


def described(arguments: argparse.Namespace, cell: Cell) -> dict:
    return {
        "table": str(cell.table),
        "category": cell.category,
        "method": cell.method,
        "detector": cell.detector,
        "backbone": cell.backbone,
        "size_px": str(size_of(arguments, cell)),
        "minutes": f"{arguments.minutes_per_fit:g}",
    }


def size_of(arguments: argparse.Namespace, cell: Cell) -> int:
    return 64 if arguments.quick else (arguments.size or cell.size_px)


def measure(arguments: argparse.Namespace, cell: Cell) -> dict[str, str]:
    """Return the cell's figures by name; a training that fails is a figure too."""
    dataset = as_in_paper(read_dataset(arguments.data / cell.category), cell, arguments.seed)
    if arguments.quick:
        dataset = replace(dataset, good=dataset.good[:24], test=thinned(dataset.test), defects=thinned(dataset.defects))
    started_s = time.monotonic()
    try:
        result, epochs = fitted(arguments, cell, dataset)
    except TaktsightError as error:
        return {"failed": " ".join(str(error).split())}
    fit_s = time.monotonic() - started_s
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    images = scored_images(result.recipe, dataset.test, Pictures(dataset.photometric), lambda *_: None)
    figures = evaluate(images, result.recipe.thresholds.score)
    found = {"auroc": figures.auroc, "ap": figures.average_precision, "best_f1": figures.best_f1}
    found["accuracy"] = best_accuracy(images)
    if cell.table == 1:
        found |= by_type(cell, result, dataset, images)
    if cell.detector.endswith("latent_frechet"):
        found |= frechet_distances(result, images)
    told = {
        name: value if isinstance(value, str) else f"{value:.4f}" for name, value in found.items() if value is not None
    }
    return {
        **told,
        "infer_ms": f"{inference_ms(result.recipe):.1f}",
        "fit_s": f"{fit_s:.0f}",
        "fit_peak_mb": f"{peak_mb:.0f}",
        "epochs_at_most": str(epochs),
        "recipe_graph_mb": f"{len(result.recipe.graph) / 1e6:.1f}",
    }


def fitted(arguments: argparse.Namespace, cell: Cell, dataset: Dataset) -> tuple[FitResult, int]:
    """Return the training and its most epochs; when the minutes are over, the checkpoint's epoch is the last."""
    size = size_of(arguments, cell)
    name = f"{cell.table}-{cell.category}-{cell.method}".replace(" ", "_").replace("+", "and")
    options = Options(
        seed=arguments.seed,
        epochs=2 if arguments.quick else arguments.epochs,
        device="cuda" if torch.cuda.is_available() else "cpu",
        backbone=cell.backbone,
        weights=None if cell.backbone == "lite0" else arguments.weights / WEIGHTS[cell.backbone],
        **{"neighbours": 5 if arguments.quick else 15, **cell.options},
    )
    request = FitRequest(
        recipe=arguments.out / f"{name}.recipe",
        detector=cell.detector,
        height=size,
        width=size,
        registration="off",
        keep_suspects=True,
        resume=True,
        options=options,
    )
    shared = Shared(arguments.out, cell, request)
    request = shared.request
    ends_s = time.monotonic() + 60 * arguments.minutes_per_fit
    while True:
        epochs = request.options.epochs
        try:
            return fit(dataset, request, watch(ends_s, epochs, shared.keep)), epochs
        except OutOfTimeError as over:
            print(f"   out of time after epoch {over.epochs}", flush=True)
            request = replace(request, options=replace(request.options, epochs=over.epochs))
            ends_s = time.monotonic() + 60 * arguments.minutes_per_fit  # for what is trained after it


class Shared:
    """The training that cells with the same reconstructor share, as DIR/<training>.<epochs>.trained."""

    def __init__(self, folder: Path, cell: Cell, request: FitRequest) -> None:
        self.folder, self.training = folder, cell.training
        self.checkpoint = checkpoint_of(request.recipe)
        self.request = request
        """As asked for, or with the epochs of the training that is there."""
        for file in folder.glob(f"{self.training}.*.trained") if "+" in cell.detector else ():
            if not self.checkpoint.is_file():
                shutil.copy(file, self.checkpoint)
            epochs = int(file.suffixes[-2].removeprefix("."))
            self.request = replace(request, options=replace(request.options, epochs=epochs))

    def keep(self, epochs: int) -> None:
        """Put the checkpoint aside: `fit` deletes it when the recipe is written."""
        if self.checkpoint.is_file():
            shutil.copy(self.checkpoint, self.folder / f"{self.training}.{epochs}.trained")


def watch(ends_s: float, epochs: int, trained: Callable[[int], None]):
    """Return a progress that raises OutOfTimeError after an epoch when the time is over; it calls trained(epochs)."""
    training = False

    def progress(what: str, done: int, total: int) -> None:
        nonlocal training
        before, training = training, what == "generator" or ", loss " in what
        if training and total == epochs and done < total and time.monotonic() > ends_s:
            raise OutOfTimeError(done)
        if before and not training:
            trained(epochs)

    return progress


def by_type(cell: Cell, result: FitResult, dataset: Dataset, images: list[ScoredImage]) -> dict[str, float | None]:
    """Return precision, recall and F1 of every type against the good test images, at the paper's threshold.

    Siamese networks: probability 0.5. Others: where the normals of the type's and of the good training scores cross.
    """
    learnt = scored_images(result.recipe, dataset.defects, Pictures(dataset.photometric), lambda *_: None)
    found: dict[str, float | None] = {}
    for kind in TYPES:
        limit = SIAMESE_LIMIT
        if cell.method in ("GAN", "VAE"):
            own = np.array([image.score for image in learnt if image.label == kind])
            try:
                limit = normal_intersection(result.good_scores, own)
            except TaktsightError:  # the type scores no higher than good parts: every part passes
                limit = float("inf")
        chosen = [image for image in images if image.label in (GOOD, kind)]
        truth = np.array([image.label == kind for image in chosen])
        said = np.array([image.score > limit for image in chosen])
        hit = int((truth & said).sum())
        found[f"{kind} n"] = int(truth.sum())
        found[f"{kind} precision"] = hit / said.sum() if said.any() else 0.0
        found[f"{kind} recall"] = hit / truth.sum()
        found[f"{kind} f1"] = 2 * hit / (truth.sum() + said.sum())
    return found


def frechet_distances(result: FitResult, images: list[ScoredImage]) -> dict[str, float | str]:
    """Return the Frechet distance of the latents of good and of defective test images to those of unseen good ones."""
    sets = {"usual": latents(result, list(result.good_pictures))}
    for name, wanted in (("good", False), ("defect", True)):
        views = [image.view for image in images if image.defective is wanted and image.view is not None]
        sets[name] = latents(result, [view[None] if view.ndim == 2 else view.transpose(2, 0, 1) for view in views])
    whole = whole_covariances(*sets.values())
    distance = frechet_distance if whole else diagonal_distance
    good, defect = (distance(sets["usual"], sets[name]) for name in ("good", "defect"))
    return {
        "frechet_good": good,
        "frechet_defect": defect,
        "frechet_ratio": defect / max(good, 1e-12),
        "frechet_covariance": "whole" if whole else "diagonal",
    }


def latents(result: FitResult, pictures: list[np.ndarray]) -> torch.Tensor:
    with torch.inference_mode():
        parts = [result.module.reconstructor(torch.from_numpy(p[None].copy()))[1].flatten(1) for p in pictures]
    return torch.cat(parts)


def best_accuracy(images: list[ScoredImage]) -> float:
    """Return the highest share of right answers of any threshold: chosen with labels, for every method alike."""
    scores = np.array([np.inf if image.score is None else image.score for image in images])
    truth = np.array([image.defective for image in images])
    limits = [-np.inf, *np.unique(scores)]
    return float(max(np.mean((scores > limit) == truth) for limit in limits))


def inference_ms(recipe: Recipe) -> float:
    """Return the median time of the graph alone, batch 1, in the agent's CPU engine with 2 threads."""
    engine = open_engine(recipe, EngineSettings("openvino"))
    batch = recipe.selftest.batches[:1]
    times = []
    for _ in range(WARM_UP + TIMED):
        started = time.perf_counter()
        engine.infer(batch)
        times.append(time.perf_counter() - started)
    return 1e3 * float(np.median(times[WARM_UP:]))


def thinned(items: tuple) -> tuple:
    """Return at most six items of every label."""
    return tuple(
        item for label in sorted({i.label for i in items}) for item in [i for i in items if i.label == label][:6]
    )


def read_rows(file: Path) -> list[dict]:
    if not file.is_file():
        return []
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def append(file: Path, rows: list[dict]) -> None:
    new = not file.is_file()
    with file.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of categories in MVTec AD layout")
    parser.add_argument("--out", type=Path, required=True, help="folder for CSV and checkpoints")
    parser.add_argument("--weights", type=Path, help="folder of VGG16's and Xception's files  [weights beside --data]")
    parser.add_argument("--page", type=Path, default=Path(__file__).parents[1] / "docs" / "papers.md", help="to write")
    parser.add_argument("--tables", type=int, nargs="*", default=[1, 2, 3, 4], choices=[1, 2, 3, 4])
    parser.add_argument("--categories", nargs="*", help="only these")
    parser.add_argument("--methods", nargs="*", help="only these, as the table names them")
    parser.add_argument("--minutes-per-fit", type=float, default=float("inf"))
    parser.add_argument("--epochs", type=int, default=200, help="of every training at most  [200]")
    parser.add_argument("--size", type=int, help="px, instead of the paper's")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.weights = arguments.weights or arguments.data.parent / "weights"
    return arguments


if __name__ == "__main__":
    sys.exit(main())
