"""One candidate of a race, in a process of its own: fit on four fifths of the good images, measure on the rest.

    python -m trainer.race_heat HEAT.json        (`race` writes that file; nobody types this)

What a detector is worth is asked of good images that it never saw and of synthetic defects made from these; where the
data have labelled test images, of these too. What it costs is all that a station does from a frame in memory to its
score.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from calibration.errors import BadFrame, NotRegistered, TaktsightError
from calibration.preprocess import prepare
from calibration.recipe import Recipe
from trainer.data import GOOD, Dataset, Item, Pictures, folds, read_dataset
from trainer.evaluate import scored_images
from trainer.export import ReferenceRuntime
from trainer.fit import FitRequest, fit
from trainer.learning import Options
from trainer.prepared import pixels_of
from trainer.race_process import end_with_race
from trainer.synthetic import synthetic_defects
from trainer.timing import engine_of, frame_times_ms, slowest_ms

FOLDS = 5  # one of them judges
FAULTS = 100  # synthetic defects


@dataclass(frozen=True, slots=True)
class Heat:
    """What one candidate is asked; its digest tells whether an older answer still holds."""

    data: str
    stamp: str  # of the images: an answer about others does not hold
    detector: str
    height: int
    width: int
    registration: str
    overkill: float  # share of good parts rejected at which escape is counted
    seed: int
    epochs: int | None  # None: the default of the options
    weights: str | None
    version: str = ""  # of this package: another one may answer otherwise
    bit_depth: int | None = None  # as in fit
    part_pattern: str | None = None  # as in fit
    takt_ms: float | None = None  # as in fit, for those that it concerns
    weights_digest: str | None = None  # of the weights file: an answer with another one does not hold


@dataclass(frozen=True, slots=True)
class Result:
    """What came of it. Shares are 0..1; None where the data cannot say."""

    failed: str = ""  # why there is no recipe; the figures below are then worth nothing
    synthetic_auroc: float | None = None  # unseen good images against synthetic defects
    synthetic_escape: float | None = None  # synthetic defects below the score that `overkill` of these good ones reach
    auroc: float | None = None  # of the labelled test images
    escape: float | None = None  # labelled defects below the score that `overkill` of the good test images reach
    p50_ms: float | None = None  # frame to score, see trainer.timing
    p99_ms: float | None = None
    engine: str = ""
    fit_s: float | None = None
    memory_mib: float | None = None  # the process's peak while it learnt
    recipe_mb: float | None = None


def main() -> int:
    """Run the heat that is written in the file, and write the answer beside it; the race's end is this one's too."""
    end_with_race()
    file = Path(sys.argv[1])
    heat = Heat(**json.loads(file.read_text(encoding="utf-8"))["heat"])
    try:
        result = run(heat, file.with_suffix(".recipe"))
    except TaktsightError as error:
        result = Result(failed=str(error))
    answer = {"heat": asdict(heat), "result": asdict(result)}
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")
    temporary.replace(file)
    return 0


def run(heat: Heat, scratch: Path) -> Result:
    """Return what the candidate is worth and costs. scratch: beside it a training may leave its checkpoint."""
    dataset = read_dataset(Path(heat.data), part_pattern=heat.part_pattern, bit_depth=heat.bit_depth)
    learn, judge = split(dataset.good, heat.seed)
    started_s = time.monotonic()
    fitted = fit(replace(dataset, good=tuple(learn), test=()), fit_request(heat, scratch), lambda *_: None)
    fit_s = time.monotonic() - started_s
    recipe = fitted.recipe
    pictures = Pictures(dataset.photometric)
    good, faults = _judged(recipe, judge, pictures, heat)
    synthetic_auroc, synthetic_escape = figures(good, faults, heat.overkill)
    auroc, escape = _labelled(recipe, dataset, pictures, heat)
    engine, name = engine_of(recipe.graph)
    times_ms = frame_times_ms(judge, dataset.photometric, recipe.view, recipe.reference, engine)
    return Result(
        synthetic_auroc=synthetic_auroc,
        synthetic_escape=synthetic_escape,
        auroc=auroc,
        escape=escape,
        p50_ms=float(np.percentile(times_ms, 50)),
        p99_ms=slowest_ms(times_ms),
        engine=name,
        fit_s=fit_s,
        memory_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        recipe_mb=len(recipe.graph) / 1e6,
    )


def fit_request(heat: Heat, recipe: Path) -> FitRequest:
    """Return what `fit` is asked for this candidate."""
    options = Options(seed=heat.seed, weights=Path(heat.weights) if heat.weights else None)
    if heat.epochs is not None:
        options = replace(options, epochs=heat.epochs)
    return FitRequest(
        recipe=recipe,
        detector=heat.detector,
        height=heat.height,
        width=heat.width,
        registration=heat.registration,
        takt_ms=heat.takt_ms,
        options=options,
    )


def split(items: Sequence[Item], seed: int) -> tuple[list[Item], list[Item]]:
    """Return (images to learn from, images to judge by); images of one part stay together."""
    fold = folds(items, min(FOLDS, len({item.part_id or item.name for item in items})), seed)
    return (
        [item for item, k in zip(items, fold, strict=True) if k != 0],
        [item for item, k in zip(items, fold, strict=True) if k == 0],
    )


def figures(
    good: NDArray[np.float64], defective: NDArray[np.float64], overkill: float
) -> tuple[float | None, float | None]:
    """Return (AUROC, escape where a share `overkill` of the good parts is rejected); None without both kinds.

    good, defective: scores (n,), inf for a part without verdict: it never passes.
    """
    if not len(good) or not len(defective):
        return None, None
    truth = np.concatenate([np.zeros(len(good)), np.ones(len(defective))])
    scores = np.concatenate([good, defective])
    finite = scores[np.isfinite(scores)]
    scores = np.where(np.isfinite(scores), scores, finite.max(initial=0.0) + 1.0)
    threshold = np.quantile(scores[: len(good)], 1.0 - overkill, method="higher")
    passed = np.isfinite(defective) & (defective <= threshold)
    return float(roc_auc_score(truth, scores)), float(np.mean(passed))


def _judged(
    recipe: Recipe, items: Sequence[Item], pictures: Pictures, heat: Heat
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the scores of unseen good images, and of synthetic defects on them."""
    runtime = ReferenceRuntime(recipe.graph)
    batches, scores = [], []
    for item in items:
        try:
            pixels, depth = pixels_of(item, pictures, recipe.view)
            batches.append(prepare(pixels, depth, recipe.view, recipe.reference).batch)
        except (NotRegistered, BadFrame):
            scores.append(np.inf)  # a good part without a verdict is overkill
            continue
        scores.append(runtime(batches[-1])[1])
    if not batches:
        return np.array(scores), np.empty(0)
    keep = torch.ones(heat.height, heat.width)
    faulty, _ = synthetic_defects(torch.from_numpy(np.concatenate(batches)), keep, FAULTS, heat.seed)
    return np.array(scores), np.array([runtime(image[None].numpy())[1] for image in faulty])


def _labelled(recipe: Recipe, dataset: Dataset, pictures: Pictures, heat: Heat) -> tuple[float | None, float | None]:
    items = [replace(item, mask=None) for item in dataset.test]  # nobody asks where
    images = scored_images(recipe, items, pictures, lambda *_: None)
    scores = np.array([np.inf if image.score is None else image.score for image in images])
    good = np.array([image.label == GOOD for image in images], dtype=bool)
    return figures(scores[good], scores[~good], heat.overkill)


if __name__ == "__main__":
    sys.exit(main())
