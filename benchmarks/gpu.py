"""TensorRT on the GPU of this machine: build time, latency, memory and parity, beside torch and ONNX Runtime.

    python benchmarks/gpu.py --out benchmarks/results/gpu.csv

Under 8 minutes for both sizes. The drawn flange is learnt at each size, then every engine that can be had gets the same
prepared parts, batch 1, one after the other. Latency is from the part in host memory to map and score in host memory;
whole_ms is the agent's whole path, registration included. gpu_mb: what the engine takes. worst: the parity gate's
largest difference. An engine that cannot be had is a line with its reason, not a row.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from latency import parts
from machine import describe
from tables import write_rows

from agent.engines.build import load_runtime, plan_for
from agent.engines.cuda import open_gpu
from agent.engines.engine import RUNTIMES, TOLERANCES, Engine, EngineSettings, load_engine
from agent.engines.parity import examined
from agent.line.pipeline import Pipeline
from agent.simulation.line import LineSettings, SimulatedLine
from calibration.errors import TaktsightError
from calibration.frame import Frame
from calibration.recipe import Recipe, read_recipe, write_recipe
from calibration.recording import RecordingWriter
from trainer.data import read_dataset
from trainer.fit import FitRequest, fit

COLUMNS = (
    "size", "engine", "build_s", "again_s", "p50_ms", "p99_ms", "max_ms", "per_s", "whole_p50_ms", "whole_p99_ms",
    "gpu_mb", "worst", "passed", "n",
)  # fmt: skip
SIDE_PX, GOOD, WARM_UP = 1024, 60, 50


def main() -> int:
    arguments = parsed()
    print(describe())
    print(f"GPU: {_gpu_in_words()}")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in arguments.sizes:
            began_s = time.monotonic()
            recipe, module = learnt(Path(folder) / str(size), size)
            half = recipe.training["half_precision"]
            print(f"{size} px: learnt in {time.monotonic() - began_s:.0f} s, in half precision: {half}", flush=True)
            frames = list(parts(SIDE_PX, SIDE_PX, colour=False))
            for name, opened in candidates(recipe, module, Path(folder) / "engines", arguments.torch_compile):
                row = tried(name, opened, recipe, frames, arguments.count)
                if row is not None:
                    rows.append({"size": size, **row})
                    print("  ".join(f"{key} {rows[-1][key]}" for key in COLUMNS), flush=True)
                if arguments.out is not None:
                    write_rows(arguments.out, COLUMNS, rows)
    return 0 if rows else 1


def candidates(
    recipe: Recipe, module: torch.nn.Module, cache: Path, with_compile: bool
) -> Iterator[tuple[str, Callable[[], tuple[Engine, float | None, float | None]]]]:
    """Yield a name and what opens the engine, with the seconds of its first build and of a later start."""
    for runtime in RUNTIMES:
        for precision in ("f16", "f32"):
            settings = EngineSettings("tensorrt", precision, runtime=runtime, cache=cache / runtime)
            yield f"{runtime} {precision}", lambda settings=settings: compiled(recipe, settings)
    for precision in ("f32", "f16"):
        yield f"torch {precision}", lambda precision=precision: (Torch(module, precision), None, None)
    if with_compile:
        yield "torch.compile f32", lambda: (Torch(module, "f32", compiled=True), None, None)
    for kind in ("onnxruntime", "openvino"):
        yield kind, lambda kind=kind: (load_engine(recipe, EngineSettings(kind, threads=2)), None, None)


def compiled(recipe: Recipe, settings: EngineSettings) -> tuple[Engine, float, float]:
    """Return the engine, the seconds that compiling took, and those of a start with the plan at hand."""
    gpu, runtime = open_gpu(), load_runtime(settings.runtime)
    began_s = time.monotonic()
    with gpu.current():
        plan_for(recipe, settings, runtime, gpu.facts)
    built_s = time.monotonic() - began_s
    began_s = time.monotonic()
    return load_engine(recipe, settings), built_s, time.monotonic() - began_s


class Torch:
    """The network itself on the GPU."""

    def __init__(self, module: torch.nn.Module, precision: str, *, compiled: bool = False) -> None:
        if not torch.cuda.is_available():
            raise TaktsightError("torch sees no GPU")
        self.dtype = torch.float16 if precision == "f16" else torch.float32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        module = module.to("cuda")
        self.module = torch.compile(module, mode="max-autotune") if compiled else module
        self.label = f"torch {'compile ' if compiled else ''}{precision}, {torch.cuda.get_device_name()}"

    def infer(self, batch: np.ndarray) -> tuple[np.ndarray, float]:
        """Return (anomaly_map (h', w'), score) of one part, from host memory to host memory."""
        image = torch.from_numpy(batch).pin_memory().to("cuda", non_blocking=True)
        with torch.inference_mode(), torch.autocast("cuda", dtype=torch.float16, enabled=self.dtype == torch.float16):
            anomaly_map, score = self.module(image)
        return anomaly_map.float().cpu().numpy()[0, 0], float(score.float().cpu()[0])


def tried(
    name: str,
    opened: Callable[[], tuple[Engine, float | None, float | None]],
    recipe: Recipe,
    frames: list[Frame],
    count: int,
) -> dict | None:
    """Return an engine's row, None where it cannot be had."""
    free_mb = _free_mb()
    try:
        engine, build_s, again_s = opened()
        row = measured(engine, recipe, frames, count)
    except (TaktsightError, RuntimeError, ImportError) as error:
        print(f"{name}: not measured: {error}", flush=True)
        return None
    precision = "f16" if " f16" in engine.label else "f32"
    parity = examined(engine.infer, engine.label, recipe, TOLERANCES[precision])
    after_mb = _free_mb()
    return {
        "engine": engine.label,
        "build_s": None if build_s is None else round(build_s, 1),
        "again_s": None if again_s is None else round(again_s, 2),
        **row,
        "gpu_mb": None if free_mb is None or after_mb is None else round(free_mb - after_mb),
        "worst": f"{parity.worst:.1e}",
        "passed": parity.passed,
        "n": count,
    }


def measured(engine: Engine, recipe: Recipe, frames: list[Frame], count: int) -> dict:
    """Return the latencies of the engine alone and of the whole path."""
    batches, pipeline = recipe.selftest.batches, Pipeline(recipe, engine)
    alone_ms, whole_ms = [], []
    for number in range(WARM_UP + count):
        batch = batches[number % len(batches)][None]
        began_ns = time.perf_counter_ns()
        engine.infer(batch)
        alone_ms.append((time.perf_counter_ns() - began_ns) / 1e6)
    for number in range(WARM_UP + count // 4):
        frame = replace(frames[number % len(frames)], trigger_id=number + 1)
        began_ns = time.perf_counter_ns()
        verdict = pipeline.inspect(frame)
        whole_ms.append((time.perf_counter_ns() - began_ns) / 1e6)
        if verdict.score is None:
            raise SystemExit(f"part {number} got no verdict: {verdict.detail}")
    alone, whole = np.array(alone_ms[WARM_UP:]), np.array(whole_ms[WARM_UP:])
    p50, p99 = np.percentile(alone, [50, 99])
    whole_p50, whole_p99 = np.percentile(whole, [50, 99])
    return {
        "p50_ms": round(float(p50), 3),
        "p99_ms": round(float(p99), 3),
        "max_ms": round(float(alone.max()), 3),
        "per_s": round(1e3 / float(alone.mean())),
        "whole_p50_ms": round(float(whole_p50), 2),
        "whole_p99_ms": round(float(whole_p99), 2),
    }


def learnt(folder: Path, size: int) -> tuple[Recipe, torch.nn.Module]:
    """Return a recipe of the drawn flange, and the network that its graph was made from."""
    line = SimulatedLine(LineSettings(lot=1, width_px=SIDE_PX, height_px=SIDE_PX))
    recording = RecordingWriter(folder / "good")
    for trigger_id in range(1, GOOD + 1):
        pixels, _ = line.render(line.plan(trigger_id))
        recording.append(Frame(pixels, trigger_id, trigger_id, 0, 0))
    request = FitRequest(recipe=folder / "flange.recipe", height=size, width=size, registration="on")
    result = fit(read_dataset(folder / "good"), request, lambda *_: None)
    write_recipe(request.recipe, result.recipe)
    return read_recipe(request.recipe), result.module


def _free_mb() -> float | None:
    try:
        with open_gpu().current():
            import pycuda.driver

            return pycuda.driver.mem_get_info()[0] / 2**20
    except (TaktsightError, ImportError):
        return None


def _gpu_in_words() -> str:
    try:
        facts = open_gpu().facts
    except TaktsightError as error:
        return f"none ({error})"
    return f"{facts.name}, compute capability {facts.compute_capability}, driver {facts.driver}, {facts.memory_mb} MB"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[256, 512])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--torch-compile", action="store_true", help="torch.compile too: a minute or more each")
    parser.add_argument("--out", type=Path, help="CSV to write")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
