"""How long both sides of `peers.py` take for one image: turn by turn, so that the machine's other load meets all."""

from __future__ import annotations

import io
import json
import os
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import openvino
from numpy.typing import NDArray

from agent.engines.engine import EngineSettings, open_engine
from agent.line.pipeline import Pipeline
from calibration.frame import Frame
from calibration.images import read_image
from calibration.preprocess import prepare
from calibration.recipe import Recipe, read_recipe

THREADS = 2
WARM_UP = 5
F32 = {
    "INFERENCE_PRECISION_HINT": "f32",
    "INFERENCE_NUM_THREADS": THREADS,
    "PERFORMANCE_HINT": "LATENCY",
    "NUM_STREAMS": "1",
}
Timed = Callable[[int], tuple[float, float]]
"""Runs image number i; returns (wall ms, CPU ms of all threads)."""


class Anomalib:
    """A process in anomalib's environment that runs one inference when asked, by anomalib's own inferencers."""

    def __init__(self, python: Path, job: Path) -> None:
        self._process = subprocess.Popen(
            [str(python), str(Path(__file__).parent / "peers" / "anomalib_side.py"), "serve", job.name],
            cwd=job.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._answer("ready")

    def runner(self, what: str, images: Sequence[str]) -> Timed:
        """Return what times one path, such as "padim openvino", on the decoded images in these .npy files."""

        def timed(number: int) -> tuple[float, float]:
            self._process.stdin.write(json.dumps({"what": what, "image": images[number % len(images)]}) + "\n")
            self._process.stdin.flush()
            wall_ms, cpu_ms = json.loads(self._answer())
            return wall_ms, cpu_ms

        return timed

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _answer(self, wanted: str | None = None) -> str:
        for line in self._process.stdout:
            if wanted is None and line.startswith("["):
                return line
            if wanted is not None and line.strip() == wanted:
                return line
        raise SystemExit("anomalib's process ended before it answered: run peers/anomalib_side.py serve by hand")


def duel(recipes: Mapping[str, Path], peers: Mapping[str, dict], files: Sequence[Path], *, python: Path, folder: Path,
         rounds: int) -> dict:  # fmt: skip
    """Return p50, p99 (wall) and the median CPU time of every export and every whole path, in ms.

    recipes: ours by detector; peers: {"xml", "pt"} by method; files: the images. In a round each one runs once, in an
    order drawn anew; images take turns from round to round.
    """
    pictures = [colour(read_image(file)) for file in files]
    stored = [str(folder / f"image{number}.npy") for number in range(len(pictures))]
    for name, picture in zip(stored, pictures, strict=True):
        np.save(name, picture)
    loaded = {detector: read_recipe(path) for detector, path in recipes.items()}
    job = folder / "serve.json"
    job.write_text(json.dumps({"images": stored, "methods": dict(peers)}), encoding="utf-8")
    any_recipe = next(iter(loaded.values()))
    batch = prepare(as_trained(read_image(files[0]), any_recipe), 8, any_recipe.view, None).batch
    exports = {name: export_runner(recipe.graph, batch) for name, recipe in loaded.items()}
    rgb = np.ascontiguousarray(np.broadcast_to(batch, (1, 3, *batch.shape[2:])))
    exports |= {name: export_runner(Path(files["xml"]), rgb) for name, files in peers.items()}
    exports_ms = took_turns(exports, rounds)
    del exports
    anomalib = Anomalib(python, job)
    try:
        paths = {f"{name} path": path_runner(recipe, files) for name, recipe in loaded.items()}
        paths |= {
            f"{name} {kind}": anomalib.runner(f"{name} {kind}", stored)
            for name in peers
            for kind in ("openvino", "default", "torch")
        }
        paths_ms = took_turns(paths, rounds)
    finally:
        anomalib.close()
    return {"rounds": rounds, "images": len(files), "load": round(os.getloadavg()[0], 1), **exports_ms, **paths_ms}


def took_turns(runners: Mapping[str, Timed], rounds: int) -> dict[str, dict[str, float]]:
    """Return the figures of each runner after a warm-up."""
    order = np.random.default_rng(0)
    spent: dict[str, list[tuple[float, float]]] = defaultdict(list)
    names = list(runners)
    for number in range(WARM_UP + rounds):
        for index in order.permutation(len(names)):
            took = runners[names[index]](number)
            if number >= WARM_UP:
                spent[names[index]].append(took)
    return {name: figures(np.array(values)) for name, values in spent.items()}


def figures(spent_ms: NDArray[np.float64]) -> dict[str, float]:
    """Return p50, p99 and CPU median of (n, 2) wall and CPU times."""
    p50, p99 = np.percentile(spent_ms[:, 0], [50, 99])
    return {
        "p50_ms": round(float(p50), 2),
        "p99_ms": round(float(p99), 2),
        "cpu_ms": round(float(np.median(spent_ms[:, 1])), 2),
    }


def export_runner(graph: bytes | Path, batch: NDArray[np.float32]) -> Timed:
    """Return what times an export alone, both sides in this process: OpenVINO, float32, 2 threads."""
    core = openvino.Core()
    model = core.read_model(io.BytesIO(graph) if isinstance(graph, bytes) else graph)
    request = core.compile_model(model, "CPU", F32).create_infer_request()

    def run(_: int) -> object:
        return request.infer({0: batch})

    return timed_here(run)


def path_runner(recipe: Recipe, files: Sequence[Path]) -> Timed:
    """Return what times the agent's whole pipeline on a decoded image, less registration."""
    pipeline = Pipeline(recipe, open_engine(recipe, EngineSettings("openvino", threads=THREADS)))
    frames = [Frame(as_trained(read_image(file), recipe), 1, 1, 0, 0) for file in files]
    spent_registering = [0.0]

    def run(number: int) -> object:
        verdict = pipeline.inspect(frames[number % len(frames)])
        if verdict.score is None:
            raise SystemExit(f"{files[number % len(frames)]}: no verdict: {verdict.detail}")
        spent_registering[0] = verdict.stage_ms["registration"]
        return verdict

    timed = timed_here(run)

    def less_registration(number: int) -> tuple[float, float]:
        wall_ms, cpu_ms = timed(number)
        return wall_ms - spent_registering[0], cpu_ms

    return less_registration


def timed_here(run: Callable[[int], object]) -> Timed:
    def timed(number: int) -> tuple[float, float]:
        wall_ns, cpu_ns = time.perf_counter_ns(), time.process_time_ns()
        run(number)
        return (time.perf_counter_ns() - wall_ns) / 1e6, (time.process_time_ns() - cpu_ns) / 1e6

    return timed


def colour(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return (H, W, 3): anomalib takes colour only; its conversion is not timed."""
    return pixels if pixels.ndim == 3 else np.repeat(pixels[:, :, None], 3, axis=2)


def as_trained(pixels: NDArray[np.uint8], recipe: Recipe) -> NDArray[np.uint8]:
    """Return the pixels in colour where the product is; also this is not timed."""
    return colour(pixels) if recipe.view.colour else pixels
