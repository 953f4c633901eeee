"""TensorRT on this machine's GPU: build time, latency, throughput, memory, parity, beside torch and ONNX Runtime.

    python benchmarks/gpu.py --out benchmarks/results/gpu.csv

Ends within --minutes, 8. The drawn flange is learnt at each size, then every engine gets the same prepared parts, batch
1, one after the other; torch.compile last, and no longer than there is time. Latency is from the part in host memory to
map and score in host memory; crop: the same from 8-bit pixels (agent/engines/crop.py); whole: the agent's whole path on
a 1-megapixel frame, registration included. n: how many calls; a slow engine gets fewer, no more than fit in SERIES_S.
sm_mhz: the GPU's clock just after them. gpu_mb: what the engine takes. worst: the parity gate's largest difference.

Each engine of the agent is opened in a process of its own, so that a runtime that ends it, as one may on a GPU that it
does not know, costs one row, less what it had measured by then. What runtimes print is shown behind a bar. An engine
that cannot be had is a row with its reason in `note`. The table is written after every engine. Where there is no GPU
the CPU engines are measured, which shows that the rest works. Needs what `pip install '.[trainer,openvino,tensorrt]'`
installs (docs/engines.md), or as much of it as is to be measured.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
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
from typing import TYPE_CHECKING, Any

import numpy as np
from gpu_engines import (
    AGENTS,
    COMPILED,
    EAGER,
    ON_THE_CPU,
    ON_THE_GPU,
    STATE,
    Torch,
    free_mb,
    gpu_in_words,
    opened,
    smi,
    torch_sees_a_gpu,
)
from latency import parts
from machine import describe
from tables import write_rows

from agent.engines.engine import TOLERANCES, Engine, of_crops
from agent.engines.parity import examined
from agent.line.pipeline import Pipeline
from agent.simulation.line import LineSettings, SimulatedLine
from calibration.errors import TaktsightError
from calibration.frame import Frame
from calibration.recipe import Recipe, read_recipe, write_recipe
from calibration.recording import RecordingWriter

if TYPE_CHECKING:  # it takes seconds, and most processes here do without
    import torch

COLUMNS = (
    "size", "engine", "build_s", "again_s", "p50_ms", "p99_ms", "max_ms", "per_s", "crop_p50_ms", "crop_p99_ms",
    "whole_p50_ms", "whole_p99_ms", "gpu_mb", "sm_mhz", "worst", "passed", "n", "note",
)  # fmt: skip
SIDE_PX, GOOD, FRAMES = 1024, 60, 10
WARM_UP, WARM_UP_S = 50, 0.3  # both: a GPU that has rested takes a moment to raise its clocks
SERIES_S = 6.0  # no longer for one series
TARGET_SIZE, TARGET_MS, TARGET_WHOLE_MS = 256, 1.0, 2.0  # of the default detector
LEAST_S = 5.0  # with less time left no engine is begun
COMPILED_S = 90.0  # kept for torch.compile
ENDING_S = 10.0  # before the time is over nothing is measured any more; what hangs ends with the time
ROW = "row "  # what a line with a row in it begins with, among those that runtimes print


def main() -> int:
    arguments = parsed()
    if arguments.engine is not None:
        measured(arguments.engine, arguments.recipe, arguments.count, tell=printed)
        return 0
    faulthandler.dump_traceback_later(60 * arguments.minutes, exit=True, file=sys.__stderr__)
    try:
        return run(arguments)
    finally:
        faulthandler.cancel_dump_traceback_later()


def run(arguments: argparse.Namespace) -> int:
    """Measure everything, as far as there is time; return 0 if an engine was measured and passed the gate."""
    until_s = time.monotonic() + 60 * arguments.minutes - ENDING_S
    print(describe())
    print(f"GPU: {gpu_in_words()}", flush=True)
    table, networks = Table(arguments.out), {}
    kept_s = min(COMPILED_S, 15 * arguments.minutes) if torch_sees_a_gpu() else 0.0
    with tempfile.TemporaryDirectory() as folder:
        for place, size in enumerate(arguments.sizes):
            path = Path(folder) / str(size) / "flange.recipe"
            left_s = until_s - kept_s - time.monotonic()
            share_s = left_s / (len(arguments.sizes) - place)  # an even part of what is left
            size_until_s = time.monotonic() + share_s
            try:
                networks[size] = (path, learnt(path, size))
            except Exception as error:  # noqa: BLE001 the other size can still be measured
                traceback.print_exc()
                table.add(size, {"engine": "none", "note": f"not learnt: {error}"})
                continue
            for name in (*ON_THE_GPU, *EAGER, *ON_THE_CPU):
                if name in EAGER:
                    table.add(size, here(name, networks[size], arguments.count, size_until_s))
                else:
                    table.add(size, in_a_process(name, path, arguments.count, size_until_s))
        for name in COMPILED:
            for size, network in networks.items():
                table.add(size, here(name, network, arguments.count, until_s))
    table.judge()
    print(f"GPU: {smi(*STATE) or 'no nvidia-smi'}")
    return 0 if any(row.get("passed") for row in table.rows) else 1


class Table:
    """The rows so far, on the terminal and in the file."""

    def __init__(self, out: Path | None) -> None:
        self.out, self.rows = out, list[dict[str, Any]]()
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)

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
                alone, whole = row["p50_ms"], row.get("whole_p50_ms", float("nan"))
                print(
                    f"{row['engine']}, {TARGET_SIZE} px: {alone} ms, wanted {TARGET_MS} "
                    f"({'met' if alone <= TARGET_MS else 'missed'}); host to verdict {whole} ms, wanted "
                    f"{TARGET_WHOLE_MS} ({'met' if whole <= TARGET_WHOLE_MS else 'missed'})"
                )


def in_a_process(name: str, recipe: Path, count: int, until_s: float) -> dict[str, Any]:
    """Return the row of an engine of the agent; whatever goes wrong in it is its note, beside what it had measured."""
    left_s = until_s - time.monotonic()
    if left_s < LEAST_S:
        return {"engine": name, "note": "not begun: no time left, see --minutes"}
    command = [sys.executable, __file__, "--recipe", str(recipe), "--engine", name, "--count", str(count)]
    ended = None
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, timeout=left_s, check=False)
        output = done.stdout
        if done.returncode:
            ended = f"its process ended with {done.returncode}, see its messages above"
    except subprocess.TimeoutExpired as error:
        output, ended = error.stdout, f"not ready within {left_s:.0f} s, see --minutes"
    row = {"engine": name}
    for line in (output or b"").decode(errors="replace").splitlines():
        if line.startswith(ROW) and line.endswith("}"):  # the last one has all; one that is cut off does not count
            row = json.loads(line.removeprefix(ROW))
        else:
            print(f"| {line}")  # TensorRT says on standard output why it refuses a GPU
    if ended is not None:
        row["note"] = "; ".join(filter(None, [row.get("note"), ended]))
    return row


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


def printed(row: dict[str, Any]) -> None:
    """Print a row so that `in_a_process` finds it."""
    print(f"{ROW}{json.dumps(row)}", flush=True)


def measured(
    name: str,
    path: Path,
    count: int,
    module: torch.nn.Module | None = None,
    *,
    tell: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Return the row of one engine, with what could be measured of it; what failed is its note.

    tell: gets the row as far as it has come, more than once.
    """
    row: dict[str, Any] = {"engine": name}
    try:
        recipe, before_mb = read_recipe(path), free_mb()
        engine, built_s, again_s = opened(name, path, recipe, module)
        row |= {"engine": engine.label, "build_s": _rounded(built_s), "again_s": _rounded(again_s)}
        tell(row)
        row |= alone(engine, recipe, count)
        row["sm_mhz"] = None if name in ON_THE_CPU else (smi("clocks.sm") or "").partition(" ")[0]
        tell(row)
        parity = examined(engine.infer, engine.label, recipe, TOLERANCES["f16" if name.endswith("f16") else "f32"])
        row |= {"worst": f"{parity.worst:.1e}", "passed": parity.passed}
        after_mb = free_mb()
        row["gpu_mb"] = None if before_mb is None or after_mb is None else round(before_mb - after_mb)
        if isinstance(engine, Torch):  # in this process, where what others took is kept
            row["gpu_mb"] = engine.gpu_mb()
        tell(row)
        row |= of_pixels(engine, recipe, count)
        tell(row)
        row |= on_the_path(engine, recipe, max(1, count // 4))
    except Exception as error:  # noqa: BLE001 whatever a runtime raises on a GPU that nobody has tried costs one row
        if not isinstance(error, TaktsightError):
            traceback.print_exc()
        row["note"] = " ".join(str(error).split())[:300] or type(error).__name__
    tell(row)
    return row


def alone(engine: Engine, recipe: Recipe, count: int) -> dict[str, Any]:
    """Return the latencies and the throughput of the engine alone, on prepared parts."""
    batches = recipe.selftest.batches
    took_ms = timed(lambda number: engine.infer(batches[number % len(batches)][None]), count)
    p50, p99 = np.percentile(took_ms, [50, 99])
    return {
        "n": len(took_ms),
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
    pipeline, frames = Pipeline(recipe, engine), list(itertools.islice(parts(SIDE_PX, SIDE_PX, colour=False), FRAMES))

    def inspect(number: int) -> None:
        verdict = pipeline.inspect(replace(frames[number % len(frames)], trigger_id=number + 1))
        if verdict.score is None:
            raise TaktsightError(f"part {number} got no verdict: {verdict.detail}")

    p50, p99 = np.percentile(timed(inspect, count), [50, 99])
    return {"whole_p50_ms": round(float(p50), 2), "whole_p99_ms": round(float(p99), 2)}


def timed(work: Callable[[int], object], count: int) -> np.ndarray:
    """Return how long each of `count` calls took after a warm-up, ms; of fewer where they take longer than SERIES_S."""
    began_s, number = time.monotonic(), 0
    while number < WARM_UP or time.monotonic() < began_s + WARM_UP_S:
        work(number)
        number += 1
        if time.monotonic() > began_s + SERIES_S / 4:
            break
    took_ms: list[float] = []
    while len(took_ms) < count and (not took_ms or time.monotonic() < began_s + SERIES_S):
        began_ns = time.perf_counter_ns()
        work(number + len(took_ms))
        took_ms.append((time.perf_counter_ns() - began_ns) / 1e6)
    return np.array(took_ms)


def learnt(path: Path, size: int) -> torch.nn.Module:
    """Write a recipe of the drawn flange, and return the network that its graph was made from."""
    from trainer.data import read_dataset
    from trainer.fit import FitRequest, fit

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
