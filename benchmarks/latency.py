"""Latency of the agent's path on 1-megapixel frames, per stage, on the path that runs in production.

    python benchmarks/latency.py [--recipe FILE] [--count 300]

Without --recipe a flange of the simulated line is learnt first. Prints p50, p99 and max per stage after a warm-up, the
overhead (whole path - engine - registration), and two ratios that hold on a noisy machine, because both sides come from
the same parts in the same run:

    whole path / engine alone, and (whole path - registration) / engine alone
"""

from __future__ import annotations

import argparse
import csv
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from machine import describe

from agent.engines.engine import EngineSettings, open_engine
from agent.line.pipeline import Pipeline
from agent.simulation.line import LineSettings, SimulatedLine
from calibration.frame import Frame
from calibration.recipe import Recipe, read_recipe

SIDE_PX = 1024
WARM_UP = 20
DISTINCT_PARTS = 40


def main() -> int:
    arguments = parsed()
    print(describe())
    recipe = read_recipe(arguments.recipe) if arguments.recipe else learnt_recipe(arguments.size, arguments.colour)
    height, width = recipe.view.reference_size
    colour = "colour" if recipe.view.colour else "gray"
    print(
        f"recipe: {recipe.detector}, frames {width}x{height} {colour}, input {recipe.view.width}x{recipe.view.height}"
    )
    frames = list(parts(width, height, recipe.view.colour))
    rows = []
    for kind in arguments.engines:
        rows += measured(recipe, frames, EngineSettings(kind, threads=arguments.threads), arguments.count)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"peak memory of this process: {peak_mb:.0f} MiB"
        + ("" if arguments.recipe else " (the training ran in another process)")
    )
    if arguments.out is not None:
        with arguments.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return 0


def measured(recipe: Recipe, frames: list[Frame], settings: EngineSettings, count: int) -> list[dict]:
    """Print and return a row per stage for one engine."""
    engine = open_engine(recipe, settings)
    pipeline = Pipeline(recipe, engine)
    stage_ms = defaultdict(list)
    for number in range(WARM_UP + count):
        frame = frames[number % len(frames)]
        started_ns = time.perf_counter_ns()
        verdict = pipeline.inspect(frame)
        whole_ms = (time.perf_counter_ns() - started_ns) / 1e6
        if verdict.score is None:
            raise SystemExit(f"part {number} got no verdict: {verdict.detail}")
        if number >= WARM_UP:
            for stage, duration_ms in verdict.stage_ms.items():
                stage_ms[stage].append(duration_ms)
            stage_ms["whole path"].append(whole_ms)
    rows = [row(engine.label, stage, values) for stage, values in stage_ms.items()]
    print(f"\n{engine.label}, n = {count} after {WARM_UP} warm-up")
    for entry in rows:
        print("  {stage:14s} p50 {p50_ms:7.2f}  p99 {p99_ms:7.2f}  max {max_ms:7.2f} ms".format(**entry))
    whole, alone = np.array(stage_ms["whole path"]), np.array(stage_ms["engine"])
    registration = np.array(stage_ms["registration"])
    print(f"  overhead, whole - engine - registration, at p50: {np.median(whole - alone - registration):.2f} ms")
    print(f"  whole / engine at p50: {np.median(whole) / np.median(alone):.2f}")
    print(f"  (whole - registration) / engine at p50: {np.median(whole - registration) / np.median(alone):.2f}")
    return rows


def row(engine: str, stage: str, values: list[float]) -> dict:
    p50, p99 = np.percentile(values, [50, 99])
    return {
        "engine": engine,
        "stage": stage,
        "n": len(values),
        "p50_ms": round(float(p50), 3),
        "p99_ms": round(float(p99), 3),
        "max_ms": round(max(values), 3),
    }


def parts(width: int, height: int, colour: bool) -> Iterator[Frame]:
    """Yield different good parts, rendered beforehand."""
    line = SimulatedLine(LineSettings(lot=2, width_px=width, height_px=height, colour=colour))
    for trigger_id in range(1, DISTINCT_PARTS + 1):
        pixels, _ = line.render(line.plan(trigger_id))
        yield Frame(pixels, trigger_id, trigger_id, 0, 0)


def learnt_recipe(size: int, colour: bool) -> Recipe:
    """Return a recipe of the simulated flange at 1 megapixel, learnt in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "flange.recipe"
        learnt_in_a_process(path, size, colour, SIDE_PX)
        return read_recipe(path)


def learnt_in_a_process(path: Path, size: int, colour: bool, side_px: int) -> None:
    """Learn the flange of frames with this side and write the recipe; this process is spared torch and its memory."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(learn, path, size, colour, side_px).result()


def learn(path: Path, size: int, colour: bool, side_px: int) -> None:
    """Learn 60 good parts and write the recipe."""
    from calibration.recipe import write_recipe
    from calibration.recording import RecordingWriter
    from trainer.data import read_dataset
    from trainer.fit import FitRequest, fit

    line = SimulatedLine(LineSettings(lot=1, width_px=side_px, height_px=side_px, colour=colour))
    recording = RecordingWriter(path.parent / "good")
    for trigger_id in range(1, 61):
        pixels, _ = line.render(line.plan(trigger_id))
        recording.append(Frame(pixels, trigger_id, trigger_id, 0, 0))
    request = FitRequest(recipe=path, height=size, width=size, registration="on")
    write_recipe(path, fit(read_dataset(path.parent / "good"), request, lambda *_: None).recipe)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, help="measure this recipe instead of a simulated flange's")
    parser.add_argument("--engines", nargs="*", default=["openvino", "onnxruntime"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--colour", action="store_true", help="RGB frames")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--out", type=Path, help="CSV to write")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
