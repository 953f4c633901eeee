"""Our side of `peers.py`: fit one detector on a list of files, score it as trained and through the agent's pipeline."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from agent.engines.engine import EngineSettings, open_engine
from agent.line.pipeline import Pipeline
from calibration.frame import Frame
from calibration.preprocess import prepare
from calibration.recipe import Recipe, read_recipe, write_recipe
from trainer.backbones import lite0
from trainer.data import Dataset, Item, Pictures
from trainer.fit import FitRequest, fit
from trainer.learning import Options
from trainer.prepared import pixels_of

THREADS = 2


def measured(dataset: Dataset, detector: str, recipe_file: Path, weights: Path, settings: dict[str, int]) -> dict:
    """Fit and score; returns what the other side's answer holds too. Run it in a process of its own: peak memory.

    settings: size (px), seed.
    """
    torch.set_num_threads(THREADS)
    request = FitRequest(
        recipe=recipe_file,
        detector=detector,
        height=settings["size"],
        width=settings["size"],
        options=Options(seed=settings["seed"], weights=weights),
    )
    started_s, started_cpu_s = time.monotonic(), time.process_time()
    result = fit(dataset, request, lambda *_: None)
    spent_s, spent_cpu_s = time.monotonic() - started_s, time.process_time() - started_cpu_s
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    write_recipe(recipe_file, result.recipe)
    recipe = read_recipe(recipe_file)
    return {
        "train": sorted(str(item.file.resolve()) for item in dataset.good),
        "test": [str(item.file.resolve()) for item in dataset.test],
        "fit_s": round(spent_s, 2),
        "fit_cpu_s": round(spent_cpu_s, 2),
        "fit_peak_mb": round(peak_mb),
        "onnx_mb": round(len(recipe.graph) / 1e6, 1),
        "recipe_mb": round(recipe_file.stat().st_size / 1e6, 1),
        "recipe": str(recipe_file),
        "registration": recipe.training["registration"],
        "export": "ok",
        **_scored(recipe, result.module, dataset),
    }


def backbone_difference(weights: Path, answers: Path) -> float:
    """Return the largest difference between our backbone and anomalib's, relative to the largest feature.

    answers: features.npz of anomalib_side.py: a drawn, normalised input and the features it gave.
    """
    theirs = np.load(answers)
    stages = sorted(int(name.removeprefix("blocks_")) for name in theirs.files if name.startswith("blocks_"))
    image = (torch.from_numpy(theirs["image"]) * 128.0 + 127.0) / 255.0  # undoes our own normalisation
    with torch.inference_mode():
        ours = lite0(stages, weights)(image)
    differences = [
        float(np.abs(feature.numpy() - theirs[f"blocks_{stage}"]).max() / np.abs(theirs[f"blocks_{stage}"]).max())
        for stage, feature in zip(stages, ours, strict=True)
    ]
    return max(differences)


def _scored(recipe: Recipe, module: nn.Module, dataset: Dataset) -> dict[str, Any]:
    """Return scores and verdicts of the network in torch and of the agent's pipeline; None: no verdict."""
    pipeline = Pipeline(recipe, open_engine(recipe, EngineSettings("openvino", threads=THREADS)))
    pictures = Pictures(dataset.photometric)
    answer: dict[str, list] = {
        name: [] for name in ("trained_score", "trained_reject", "export_score", "export_reject")
    }
    for number, item in enumerate(dataset.test, 1):
        frame = frame_of(item, pictures, recipe, number)
        verdict = pipeline.inspect(frame)
        trained = None
        if verdict.score is not None:
            prepared = prepare(frame.pixels, frame.bit_depth, recipe.view, recipe.reference)
            with torch.inference_mode():
                trained = float(module(torch.from_numpy(prepared.batch))[1][0])
        for kind, score in (("trained", trained), ("export", verdict.score)):
            answer[f"{kind}_score"].append(score)
            answer[f"{kind}_reject"].append(None if score is None else score > recipe.thresholds.score)
    return answer


def frame_of(item: Item, pictures: Pictures, recipe: Recipe, number: int) -> Frame:
    pixels, depth = pixels_of(item, pictures, recipe.view)
    return Frame(pixels, number, number, 0, 0, depth)
