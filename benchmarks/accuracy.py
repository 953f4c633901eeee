"""Accuracy on real images, through the exported graph and the agent's own pipeline; never through torch.

    python benchmarks/accuracy.py --data ../shared/data --out benchmarks/results/accuracy.csv
    python benchmarks/accuracy.py --data ../shared/data --detectors patch_layout patchcore padim dfm

patchcore, padim and dfm are those of the papers (references.py). One row per category, detector and engine. Every
category is fitted with the same settings; `--registration auto` lets the trainer decide per product from its good
images. fit_s covers `taktsight-trainer fit` without evaluation; infer_ms is the median of the engine alone, batch 1,
2 threads.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from machine import describe
from references import REFERENCES
from tables import categories_in, write_rows

from agent.engines.engine import EngineSettings, open_engine
from agent.line.pipeline import Pipeline
from agent.verdict import Verdict
from calibration.frame import Frame
from calibration.images import read_image
from calibration.preprocess import in_view
from calibration.recipe import Recipe, read_recipe, write_recipe
from trainer.catalogue import DETECTORS
from trainer.data import Dataset, Item, read_dataset
from trainer.fit import FitRequest, fit
from trainer.learning import Options
from trainer.metrics import ScoredImage, evaluate

COLUMNS = (
    "category", "detector", "engine", "size", "auroc", "ap", "f1", "pixel_auroc", "au_pro", "fit_s", "infer_ms",
    "recipe_mb", "registration", "overkill", "escape", "fit_peak_mb",
)  # fmt: skip


def main() -> int:
    arguments = parsed()
    print(describe())
    categories = categories_in(arguments.data, arguments.categories)
    rows = []
    for category in categories:
        for detector in arguments.detectors:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # a fresh process: its peak memory is its own
                rows += pool.submit(measure, arguments, category, detector).result()
            show(rows[-len(arguments.engines) :])
    for detector in arguments.detectors:
        for engine in arguments.engines:
            chosen = [row for row in rows if row["detector"] == detector and row["engine"].startswith(engine)]
            print(f"mean AUROC, {detector}, {engine}: {np.mean([row['auroc'] for row in chosen]):.4f}")
    if arguments.out is not None:
        write_rows(arguments.out, COLUMNS, rows)
        print(f"written: {arguments.out}")
    return 0


def measure(arguments: argparse.Namespace, category: str, detector: str) -> list[dict]:
    """Fit one category and return a row per engine."""
    dataset = read_dataset(arguments.data / category)
    DETECTORS.update(REFERENCES)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{category}.recipe"
        request = FitRequest(
            recipe=path,
            detector=detector,
            height=arguments.size,
            width=arguments.size,
            registration=arguments.registration,
            keep_suspects=detector in REFERENCES,  # they leave nothing out
            options=Options(seed=arguments.seed, epochs=arguments.epochs),
        )
        started_s = time.monotonic()
        result = fit(dataset, request, lambda *_: None)
        fit_s = time.monotonic() - started_s
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        write_recipe(path, result.recipe)
        recipe, recipe_mb = read_recipe(path), path.stat().st_size / 1e6
    common = {
        "category": category,
        "detector": detector,
        "size": arguments.size,
        "fit_s": round(fit_s, 1),
        "recipe_mb": round(recipe_mb, 1),
        "registration": recipe.training["registration"],
        "fit_peak_mb": round(peak_mb),
    }
    return [{**common, **scores(recipe, dataset, engine)} for engine in arguments.engines]


def scores(recipe: Recipe, dataset: Dataset, engine_kind: str) -> dict:
    """Return the figures of one engine on all test images."""
    engine = open_engine(recipe, EngineSettings(engine_kind))
    pipeline = Pipeline(recipe, engine)
    images, infer_ms = [], []
    for number, item in enumerate(dataset.test, 1):
        verdict = pipeline.inspect(frame_of(item, number))
        images.append(scored(recipe, item, verdict))
        infer_ms.append(verdict.stage_ms.get("engine", np.nan))
    figures = evaluate(images, recipe.thresholds.score)
    return {
        "engine": engine.label,
        "auroc": rounded(figures.auroc),
        "ap": rounded(figures.average_precision),
        "f1": rounded(figures.best_f1),
        "pixel_auroc": rounded(figures.pixel_auroc),
        "au_pro": rounded(figures.au_pro),
        "overkill": rounded(figures.overkill),
        "escape": rounded(figures.escape),
        "infer_ms": round(float(np.nanmedian(infer_ms)), 1),
    }


def frame_of(item: Item, number: int) -> Frame:
    pixels = read_image(item.file)
    return Frame(pixels, number, number, 0, 0, 8 if pixels.dtype == np.uint8 else 16)


def scored(recipe: Recipe, item: Item, verdict: Verdict) -> ScoredImage:
    mask = None
    if item.mask is not None and verdict.score is not None:
        drawn = read_image(item.mask)
        flat = drawn.max(axis=2) if drawn.ndim == 3 else drawn
        mask = in_view((flat > 0).astype(np.uint8), recipe.view, verdict.registration)
    return ScoredImage(item.name, item.label, verdict.score, verdict.detail, verdict.anomaly_map, mask)


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def show(rows: list[dict]) -> None:
    for row in rows:
        print("  ".join(f"{name} {row[name]}" for name in COLUMNS), flush=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of categories in MVTec AD layout")
    parser.add_argument("--out", type=Path, help="CSV to write")
    parser.add_argument("--categories", nargs="*", help="only these")
    parser.add_argument("--detectors", nargs="*", default=["patch_layout"])
    parser.add_argument("--engines", nargs="*", default=["openvino", "onnxruntime"])
    parser.add_argument("--registration", choices=["auto", "on", "off"], default="auto")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
