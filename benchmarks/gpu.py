"""TensorRT on this machine's GPU: build time, latency, throughput, memory, parity, beside torch and ONNX Runtime.

    python benchmarks/gpu.py --out benchmarks/results/gpu.csv

Ends within --minutes, 8. The drawn flange is learnt at each size, then every engine gets the same prepared parts, batch
1, one after the other; torch.compile last, and no longer than there is time. Latency is from the part in host memory to
map and score in host memory; crop: the same from 8-bit pixels (agent/engines/crop.py); whole: the agent's whole path on
a 1-megapixel frame, registration included. gpu_mb: what the engine takes. worst: the parity gate's largest difference.

Each engine of the agent is opened in a process of its own, so that a runtime that ends it, as one may on a GPU that it
does not know, costs one row. An engine that cannot be had is a row with its reason in `note`. The table is written
after every engine. Where there is no GPU the CPU engines are measured, which shows that the rest works.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from latency import parts
from machine import describe
from tables import write_rows

from agent.engines.build import load_runtime, plan_for
from agent.engines.cuda import open_gpu
from agent.engines.engine import INPUT, MAP, RUNTIMES, SCORE, TOLERANCES, Engine, EngineSettings, load_engine, of_crops
from agent.engines.parity import examined
from agent.engines.tensorrt import crop_plan
from agent.line.pipeline import Pipeline
from agent.simulation.line import LineSettings, SimulatedLine
from calibration.errors import TaktsightError
from calibration.frame import Frame
from calibration.recipe import Recipe, read_recipe, write_recipe
from calibration.recording import RecordingWriter
from trainer.data import read_dataset
from trainer.fit import FitRequest, fit

COLUMNS = (
    "size", "engine", "build_s", "again_s", "p50_ms", "p99_ms", "max_ms", "per_s", "crop_p50_ms", "crop_p99_ms",
    "whole_p50_ms", "whole_p99_ms", "gpu_mb", "worst", "passed", "n", "note",
)  # fmt: skip
SIDE_PX, GOOD, WARM_UP = 1024, 60, 50
TARGET_SIZE, TARGET_MS, TARGET_WHOLE_MS = 256, 1.0, 2.0  # of the default detector
LEAST_S = 5.0  # with less time left no engine is begun
AGENTS = (
    *(f"{runtime} {precision}" for runtime in RUNTIMES for precision in ("f16", "f32")),
    "onnxruntime", "openvino", "onnxruntime cuda",
)  # fmt: skip
EAGER, COMPILED = ("torch f16", "torch f32"), ("torch.compile f16", "torch.compile f32")


def main() -> int:
    arguments = parsed()
    if arguments.engine is not None:
        print(json.dumps(measured(arguments.engine, arguments.recipe, arguments.count)))
        return 0
    until_s = time.monotonic() + 60 * arguments.minutes
    print(describe())
    print(f"GPU: {_gpu_in_words()}", flush=True)
    table, networks = Table(arguments.out), {}
    with tempfile.TemporaryDirectory() as folder:
        for place, size in enumerate(arguments.sizes):
            path = Path(folder) / str(size) / "flange.recipe"
            share_s = (until_s - time.monotonic()) / (len(arguments.sizes) - place)  # an even part of what is left
            size_until_s = time.monotonic() + share_s
            try:
                networks[size] = (path, learnt(path, size))
            except Exception as error:  # noqa: BLE001 the other size can still be measured
                traceback.print_exc()
                table.add(size, {"engine": "none", "note": f"not learnt: {error}"})
                continue
            for name in AGENTS:
                table.add(size, in_a_process(name, path, arguments.count, size_until_s))
            for name in EAGER:
                table.add(size, here(name, networks[size], arguments.count, size_until_s))
        for name in COMPILED:
            for size, network in networks.items():
                table.add(size, here(name, network, arguments.count, until_s))
    table.judge()
    return 0 if any(row.get("passed") for row in table.rows) else 1


class Table:
    """The rows so far, on the terminal and in the file."""

    def __init__(self, out: Path | None) -> None:
        self.out, self.rows = out, list[dict[str, Any]]()

    def add(self, size: int, row: dict[str, Any]) -> None:
        """Print one, and write all that there are."""
        self.rows.append({"size": size, **row})
        told = {name: self.rows[-1][name] for name in COLUMNS if self.rows[-1].get(name) not in (None, "")}
        print("  ".join(f"{name} {value}" for name, value in told.items()), flush=True)
        if self.out is not None:
            write_rows(self.out, COLUMNS, self.rows)

    def judge(self) -> None:
        """Say whether the targets are met."""
        for row in self.rows:
            if row["size"] == TARGET_SIZE and str(row["engine"]).startswith("tensorrt") and row.get("p50_ms"):
                alone, whole = row["p50_ms"], row["whole_p50_ms"]
                print(
                    f"{row['engine']}, {TARGET_SIZE} px: {alone} ms, wanted {TARGET_MS} "
                    f"({'met' if alone <= TARGET_MS else 'missed'}); host to verdict {whole} ms, wanted "
                    f"{TARGET_WHOLE_MS} ({'met' if whole <= TARGET_WHOLE_MS else 'missed'})"
                )


def in_a_process(name: str, recipe: Path, count: int, until_s: float) -> dict[str, Any]:
    """Return the row of an engine of the agent; whatever goes wrong in it is its note."""
    left_s = until_s - time.monotonic()
    if left_s < LEAST_S:
        return {"engine": name, "note": "not begun: no time left, see --minutes"}
    command = [sys.executable, __file__, "--recipe", str(recipe), "--engine", name, "--count", str(count)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, timeout=left_s, check=False)
    except subprocess.TimeoutExpired:
        return {"engine": name, "note": f"not ready within {left_s:.0f} s, see --minutes"}
    lines = done.stdout.decode(errors="replace").splitlines()
    if done.returncode or not lines:
        return {"engine": name, "note": f"its process ended with {done.returncode}, see its messages above"}
    return json.loads(lines[-1])


def here(name: str, network: tuple[Path, torch.nn.Module], count: int, until_s: float) -> dict[str, Any]:
    """Return the row of the network itself in torch, which needs what was learnt in this process."""
    left_s, (path, module) = until_s - time.monotonic(), network
    if left_s < LEAST_S:
        return {"engine": name, "note": "not begun: no time left, see --minutes"}

    def late(*_: object) -> None:
        raise TimeoutError(f"not ready within {left_s:.0f} s, see --minutes")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, left_s)
    try:
        return measured(name, path, count, module)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def measured(name: str, path: Path, count: int, module: torch.nn.Module | None = None) -> dict[str, Any]:
    """Return the row of one engine, with what could be measured of it; what failed is its note."""
    recipe, free_mb = read_recipe(path), _free_mb()
    row: dict[str, Any] = {"engine": name}
    try:
        engine, built_s, again_s = opened(name, path, recipe, module)
        row |= {"engine": engine.label, "build_s": _rounded(built_s), "again_s": _rounded(again_s)}
        row |= alone(engine, recipe, count)
        parity = examined(engine.infer, engine.label, recipe, TOLERANCES["f16" if name.endswith("f16") else "f32"])
        row |= {"worst": f"{parity.worst:.1e}", "passed": parity.passed, "n": count}
        after_mb = _free_mb()
        row["gpu_mb"] = None if free_mb is None or after_mb is None else round(free_mb - after_mb)
        row |= of_pixels(engine, recipe, count)
        row |= on_the_path(engine, recipe, count // 4)
    except Exception as error:  # noqa: BLE001 whatever a runtime raises on a GPU that nobody has tried costs one row
        if not isinstance(error, TaktsightError):
            traceback.print_exc()
        row["note"] = " ".join(str(error).split())[:300] or type(error).__name__
    return row


Opened = tuple[Engine, float | None, float | None]


def opened(name: str, path: Path, recipe: Recipe, module: torch.nn.Module | None) -> Opened:
    """Return an engine, the seconds that compiling took, and those of a start with the plan at hand."""
    kind, _, precision = name.partition(" ")
    if kind in RUNTIMES:
        cache = path.parent / "engines" / kind
        return compiled(recipe, EngineSettings("tensorrt", precision, runtime=kind, cache=cache))
    if name in ("onnxruntime", "openvino"):
        return load_engine(recipe, EngineSettings(name, threads=2)), None, None
    if name == "onnxruntime cuda":
        return OnnxRuntimeOnGpu(recipe.graph), None, None
    assert module is not None
    began_s = time.monotonic()
    engine = Torch(module, precision, compiled=name in COMPILED)
    engine.infer(recipe.selftest.batches[:1])
    return engine, time.monotonic() - began_s if name in COMPILED else None, None


def compiled(recipe: Recipe, settings: EngineSettings) -> Opened:
    """Return an engine of TensorRT, what compiling took, and a start with the plan at hand."""
    gpu, runtime = open_gpu(), load_runtime(settings.runtime)
    began_s = time.monotonic()
    with gpu.current():
        plan_for(recipe, settings, runtime, gpu.facts)
    crop_plan(recipe, settings, runtime, gpu)
    built_s = time.monotonic() - began_s
    began_s = time.monotonic()
    return load_engine(recipe, settings), built_s, time.monotonic() - began_s


class Torch:
    """The network itself on the GPU, its input page-locked as TensorRT's is."""

    def __init__(self, module: torch.nn.Module, precision: str, *, compiled: bool) -> None:
        if not torch.cuda.is_available():
            raise TaktsightError("torch sees no GPU")
        self.is_half = precision == "f16"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        module = module.to("cuda").eval()
        self.module = torch.compile(module, mode="reduce-overhead") if compiled else module  # with CUDA graphs
        self.host: torch.Tensor | None = None
        self.label = f"torch{'.compile' if compiled else ''} {precision}, {torch.cuda.get_device_name()}"

    def infer(self, batch: np.ndarray) -> tuple[np.ndarray, float]:
        """Return (anomaly_map (h', w'), score) of one part, from host memory to host memory."""
        if self.host is None:
            self.host = torch.empty(batch.shape, dtype=torch.float32, pin_memory=True)
        self.host.copy_(torch.from_numpy(batch))
        with torch.inference_mode(), torch.autocast("cuda", dtype=torch.float16, enabled=self.is_half):
            anomaly_map, score = self.module(self.host.to("cuda", non_blocking=True))
        return anomaly_map.float().cpu().numpy()[0, 0], float(score.float().cpu()[0])


class OnnxRuntimeOnGpu:
    """The float32 graph in ONNX Runtime with CUDA."""

    def __init__(self, graph: bytes) -> None:
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise TaktsightError("this onnxruntime is without CUDA: it is another package, onnxruntime-gpu")
        self.session = onnxruntime.InferenceSession(
            graph, providers=[("CUDAExecutionProvider", {"use_tf32": 0}), "CPUExecutionProvider"]
        )
        if "CUDAExecutionProvider" not in self.session.get_providers():
            raise TaktsightError("onnxruntime could not load its CUDA libraries, see its messages above")
        self.label = "onnxruntime cuda f32"

    def infer(self, batch: np.ndarray) -> tuple[np.ndarray, float]:
        """Return (anomaly_map (h', w'), score) of one part."""
        anomaly_map, score = self.session.run([MAP, SCORE], {INPUT: batch})
        return anomaly_map[0, 0], float(score[0])


def alone(engine: Engine, recipe: Recipe, count: int) -> dict[str, Any]:
    """Return the latencies and the throughput of the engine alone, on prepared parts."""
    batches = recipe.selftest.batches
    took_ms = timed(lambda number: engine.infer(batches[number % len(batches)][None]), count)
    p50, p99 = np.percentile(took_ms, [50, 99])
    return {
        "p50_ms": round(float(p50), 3),
        "p99_ms": round(float(p99), 3),
        "max_ms": round(float(took_ms.max()), 3),
        "per_s": round(1e3 / float(took_ms.mean())),
    }


def of_pixels(engine: Engine, recipe: Recipe, count: int) -> dict[str, Any]:
    """Return the latencies of the engine alone on 8-bit pixels, nothing where it takes none."""
    infer_crop, view = of_crops(engine), recipe.view
    if infer_crop is None:
        return {}
    shape = (view.height, view.width, 3) if view.colour else (view.height, view.width)
    crop = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    p50, p99 = np.percentile(timed(lambda _: infer_crop(crop), count), [50, 99])
    return {"crop_p50_ms": round(float(p50), 3), "crop_p99_ms": round(float(p99), 3)}


def on_the_path(engine: Engine, recipe: Recipe, count: int) -> dict[str, Any]:
    """Return the latencies from frame to verdict. Raises TaktsightError if a part gets none."""
    pipeline, frames = Pipeline(recipe, engine), list(parts(SIDE_PX, SIDE_PX, colour=False))

    def inspect(number: int) -> None:
        verdict = pipeline.inspect(replace(frames[number % len(frames)], trigger_id=number + 1))
        if verdict.score is None:
            raise TaktsightError(f"part {number} got no verdict: {verdict.detail}")

    p50, p99 = np.percentile(timed(inspect, count), [50, 99])
    return {"whole_p50_ms": round(float(p50), 2), "whole_p99_ms": round(float(p99), 2)}


def timed(work: Callable[[int], object], count: int) -> np.ndarray:
    """Return how long each of `count` calls took after a warm-up, ms."""
    took_ms = np.empty(WARM_UP + count)
    for number in range(WARM_UP + count):
        began_ns = time.perf_counter_ns()
        work(number)
        took_ms[number] = (time.perf_counter_ns() - began_ns) / 1e6
    return took_ms[WARM_UP:]


def learnt(path: Path, size: int) -> torch.nn.Module:
    """Write a recipe of the drawn flange, and return the network that its graph was made from."""
    began_s = time.monotonic()
    line = SimulatedLine(LineSettings(lot=1, width_px=SIDE_PX, height_px=SIDE_PX))
    recording = RecordingWriter(path.parent / "good")
    for trigger_id in range(1, GOOD + 1):
        pixels, _ = line.render(line.plan(trigger_id))
        recording.append(Frame(pixels, trigger_id, trigger_id, 0, 0))
    request = FitRequest(recipe=path, height=size, width=size, registration="on")
    result = fit(read_dataset(path.parent / "good"), request, lambda *_: None)
    write_recipe(path, result.recipe)
    half = result.recipe.training["half_precision"]["chosen"] or "nothing"
    seconds = time.monotonic() - began_s
    print(f"{size} px: {result.recipe.detector} learnt in {seconds:.0f} s, in half precision: {half}", flush=True)
    return result.module


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 2)


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
    except (TaktsightError, ImportError) as error:
        return f"none ({error})"
    return f"{facts.name}, compute capability {facts.compute_capability}, driver {facts.driver}, {facts.memory_mb} MB"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[256, 512])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=8.0, help="what is not begun by then is left out")
    parser.add_argument("--out", type=Path, help="CSV to write")
    parser.add_argument("--engine", choices=AGENTS, help="measure this one alone and print its row as JSON")
    parser.add_argument("--recipe", type=Path, help="with --engine")
    arguments = parser.parse_args()
    if arguments.engine is not None and arguments.recipe is None:
        parser.error("--engine needs --recipe")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
