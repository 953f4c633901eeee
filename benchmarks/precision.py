"""Half precision against single: scores, AUROC and verdicts of every test image, both graphs in ONNX Runtime.

    python benchmarks/precision.py --data ../shared/data --out benchmarks/results/precision.csv

With --recipes FOLDER recipes are kept there, and one that lies there is taken as it is: a run that was cut off goes on.
One row per category. score_error and map_error are the largest over all test images, relative to the answer or the
threshold, whichever is larger (agent/engines/parity.py). flips: parts on the other side of the recipe's threshold, in
all and outside the grey band of the f16 tolerance. On a CPU ONNX Runtime rounds weights and what passes between layers
to half precision, and reckons inside them in float32.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from accuracy import frame_of, rounded, scored
from machine import describe
from tables import categories_in, write_rows

from agent.engines.parity import TOLERANCES, Difference, Wanted, difference
from agent.line.pipeline import Pipeline
from calibration.recipe import Recipe, read_recipe, write_recipe
from trainer.data import Dataset, read_dataset
from trainer.export import ReferenceRuntime
from trainer.fit import FitRequest, fit
from trainer.learning import Options
from trainer.metrics import evaluate

COLUMNS = (
    "category", "detector", "in_half", "parts", "score_error", "map_error", "auroc_f32", "auroc_f16", "flips",
    "flips_outside_band", "graph_mb", "graph_f16_mb", "recipe_mb",
)  # fmt: skip


def main() -> int:
    arguments = parsed()
    print(describe())
    categories = categories_in(arguments.data, arguments.categories)
    rows = []
    for category in categories:
        for detector in arguments.detectors:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                task = pool.submit(measure, arguments.data / category, detector, arguments.size, arguments.recipes)
                rows.append(task.result())
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
            if arguments.out is not None:
                write_rows(arguments.out, COLUMNS, rows)
    return 0


def measure(folder: Path, detector: str, size: int, recipes: Path | None) -> dict:
    """Fit one category, unless its recipe is there, and compare its two graphs."""
    dataset = read_dataset(folder)
    with tempfile.TemporaryDirectory() as scratch:
        path = (recipes or Path(scratch)) / f"{folder.name}-{detector}-{size}.recipe"
        if not path.is_file():
            request = FitRequest(recipe=path, detector=detector, height=size, width=size, options=Options())
            write_recipe(path, fit(dataset, request, lambda *_: None).recipe)
        recipe, recipe_mb = read_recipe(path), path.stat().st_size / 1e6
    row = {
        "category": folder.name,
        "detector": detector,
        "in_half": recipe.training["half_precision"]["chosen"] or "none",
        "graph_mb": round(len(recipe.graph) / 1e6, 1),
        "recipe_mb": round(recipe_mb, 1),
    }
    if recipe.graph_f16 is not None:
        row |= {"graph_f16_mb": round(len(recipe.graph_f16) / 1e6, 1), **compared(recipe, dataset)}
    return {name: row.get(name) for name in COLUMNS}


class Reference:
    """A graph in ONNX Runtime as an engine of the agent."""

    def __init__(self, graph: bytes, label: str) -> None:
        self.label = label
        self.infer = ReferenceRuntime(graph)


def compared(recipe: Recipe, dataset: Dataset) -> dict:
    """Return the figures over all test images."""
    assert recipe.graph_f16 is not None
    single = Pipeline(recipe, Reference(recipe.graph, "f32"))
    half = Pipeline(recipe, Reference(recipe.graph_f16, "f16"))
    images, images_f16, found = [], [], list[Difference]()
    for number, item in enumerate(dataset.test, 1):
        frame = frame_of(item, number)
        wanted, verdict = single.inspect(frame), half.inspect(frame)
        images.append(scored(recipe, item, wanted))
        images_f16.append(scored(recipe, item, verdict))
        if wanted.score is None or wanted.anomaly_map is None:
            continue
        if verdict.score is None or verdict.anomaly_map is None:
            raise SystemExit(f"{item.name}: f16 gave no verdict: {verdict.detail}")
        told = Wanted(item.name, wanted.score, float(wanted.anomaly_map.max()), wanted.anomaly_map)
        found.append(
            difference(
                told, verdict.anomaly_map, verdict.score, thresholds=recipe.thresholds, tolerance=TOLERANCES["f16"]
            )
        )
    limit = recipe.thresholds.score
    return {
        "parts": len(found),
        "score_error": f"{max(part.of_score for part in found):.1e}",
        "map_error": f"{max(part.of_map for part in found):.1e}",
        "auroc_f32": rounded(evaluate(images, limit).auroc),
        "auroc_f16": rounded(evaluate(images_f16, limit).auroc),
        "flips": int(np.sum([part.flips for part in found])),
        "flips_outside_band": int(np.sum([part.flips and not part.in_band for part in found])),
    }


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of categories in MVTec AD layout")
    parser.add_argument("--out", type=Path, help="CSV to write")
    parser.add_argument("--categories", nargs="*", help="only these")
    parser.add_argument("--detectors", nargs="*", default=["patch_layout"])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--recipes", type=Path, help="folder to keep the recipes in, and to take them from")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
