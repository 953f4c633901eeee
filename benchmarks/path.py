"""The path from a frame to the detector's batch, per stage, at 1 megapixel.

    python benchmarks/path.py [--against FOLDER] [--baseline FILE.csv] [--recipe FILE] [--out FILE.csv]

Gray and colour, with dark and flat field or none, registered or not; every part is a flange drawn at any angle, +-40
px. With --against the same parts go through another checkout too, a few frames here, a few there, so that both meet the
same machine: its rows are called "before". --baseline prints the ratio to the rows of an earlier run. With --recipe the
recipe's engine runs after every frame, as it does in the agent.
CPU time is the calling thread's, hardly touched by whatever else the machine does: with one OpenCV thread it is all the
path costs. Peak memory is what one frame allocates at once (tracemalloc), measured apart from the times.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from machine import describe
from numpy.typing import NDArray

HERE = Path(__file__).resolve()
VIEW_PX = 256
WARM_UP = 20
TURN = 10  # frames that one checkout measures before the other has its turn
DISTINCT_PARTS = 20
CASES = tuple(
    f"{colour} {fields} {pose}"
    for colour in ("gray", "colour")
    for fields in ("plain", "dark+flat")
    for pose in ("unregistered", "registered")
)
Times = dict[str, tuple[float, float]]  # per stage: ms on the clock, ms of the calling thread
Step = Callable[[], Times]


def main() -> int:
    arguments = parsed()
    if arguments.serve is not None:
        serve(arguments.serve, arguments.cv_threads, arguments.recipe)
        return 0
    print(describe())
    print(f"OpenCV threads: {arguments.cv_threads}, n = {arguments.count} after {WARM_UP} warm-up, 1000 x 1000 px, ms")
    trees = {"after": HERE.parents[1]} | ({"before": arguments.against.resolve()} if arguments.against else {})
    workers = {name: started(tree, arguments) for name, tree in trees.items()}
    rows = [row for case in CASES for row in measured(workers, case, arguments.count)]
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    known = baseline(arguments.baseline) if arguments.baseline else {}
    if arguments.against:
        known = {place(row): row["cpu_p50_ms"] for row in rows if row["tree"] == "before"}
    show(rows, known)
    if arguments.out is not None:
        with arguments.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return 0


def started(tree: Path, arguments: argparse.Namespace) -> subprocess.Popen[str]:
    """Return a process that measures the checkout at tree."""
    command = [sys.executable, str(HERE), "--serve", str(tree), "--cv-threads", str(arguments.cv_threads)]
    if arguments.recipe is not None:
        command += ["--recipe", str(arguments.recipe)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def asked(worker: subprocess.Popen[str], case: str, count: int) -> list[Times]:
    worker.stdin.write(json.dumps([case, count]) + "\n")
    worker.stdin.flush()
    answer = worker.stdout.readline()
    if not answer:
        raise SystemExit(f"{case}: the process that measured ended with {worker.wait()}: see above, then run again")
    return json.loads(answer)


def measured(workers: dict[str, subprocess.Popen[str]], case: str, count: int) -> Iterator[dict[str, Any]]:
    """Yield a row per checkout and stage."""
    stage_ms = {name: defaultdict(list) for name in workers}
    for worker in workers.values():
        asked(worker, case, WARM_UP)
    for _ in range(-(-count // TURN)):
        for name, worker in workers.items():
            for frame in asked(worker, case, TURN):
                for stage, duration_ms in frame.items():
                    stage_ms[name][stage].append(duration_ms)
    for name, worker in workers.items():
        peak_kib = asked(worker, case, 0)[0]["peak"][0]
        for stage, values in stage_ms[name].items():
            (p50, cpu_p50), (p99, cpu_p99), (longest, _) = (
                np.percentile(values, [50, 99, 100], axis=0).round(3).tolist()
            )
            yield {
                "tree": name, "case": case, "stage": stage, "n": len(values), "p50_ms": p50, "p99_ms": p99,
                "max_ms": longest, "cpu_p50_ms": cpu_p50, "cpu_p99_ms": cpu_p99, "peak_kib": round(peak_kib),
            }  # fmt: skip


def place(row: dict[str, Any]) -> tuple[str, str]:
    return row["case"], row["stage"]


def baseline(path: Path) -> dict[tuple[str, str], float]:
    """Return the median CPU times of an earlier run, of the checkout that it stood in."""
    with path.open(newline="") as file:
        return {place(row): float(row["cpu_p50_ms"]) for row in csv.DictReader(file) if row["tree"] == "after"}


def show(rows: list[dict[str, Any]], known: dict[tuple[str, str], float]) -> None:
    """Print the rows, with the ratio of CPU times to what is known."""
    for row in rows:
        cpu = row["cpu_p50_ms"]
        ratio = cpu / known[place(row)] if row["tree"] == "after" and known.get(place(row), 0) > 0.01 else None
        peak = f"  peak {row['peak_kib']:6d} KiB" if row["stage"] == "whole" else ""
        print(
            f"{row['tree']:6s} {row['case']:29s} {row['stage']:20s} p50 {row['p50_ms']:6.2f}  p99 {row['p99_ms']:6.2f}"
            f"  max {row['max_ms']:6.2f}  cpu p50 {cpu:6.2f}  p99 {row['cpu_p99_ms']:6.2f}"
            + (f"  x {ratio:.2f}" if ratio else "")
            + peak
        )


def serve(tree: Path, cv_threads: int, recipe: Path | None) -> None:
    """Measure the checkout at tree as stdin asks: [case, frames] a line, answered by one JSON line."""
    sys.path.insert(0, str(tree))
    import calibration  # now: the benchmark of registration puts its own checkout first

    if Path(calibration.__file__).parents[1] != tree:
        raise SystemExit(f"{calibration.__file__} was imported, need {tree}")
    cv2.setNumThreads(cv_threads)
    inference = engine_call(recipe) if recipe else None
    steps: dict[str, Step] = {}
    for line in sys.stdin:
        case, count = json.loads(line)
        if case not in steps:
            steps = {case: prepared(case)}
        if count == 0:
            answer = [{"peak": (peak_kib(steps[case]), 0.0)}]
        else:
            answer = []
            for _ in range(count):
                answer.append(steps[case]())
                if inference is not None:
                    before = now()
                    inference()
                    answer[-1]["engine"] = tuple((now() - before).tolist())
        print(json.dumps(answer), flush=True)


def now() -> NDArray[np.float64]:
    """Return the clock and the calling thread's CPU time, ms."""
    return np.array([time.perf_counter_ns(), time.thread_time_ns()]) / 1e6


def engine_call(path: Path) -> Callable[[], object]:
    """Return one inference of the recipe's own test image."""
    from agent.engines.engine import EngineSettings, open_engine
    from calibration.recipe import read_recipe

    recipe = read_recipe(path)
    engine = open_engine(recipe, EngineSettings("openvino", threads=2))
    return lambda: engine.infer(recipe.selftest.batches[:1])


def peak_kib(step: Step) -> float:
    """Return what one frame allocates at once, the highest of five."""
    step()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(5):
        step()
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    return peak / 1024


def prepared(case: str) -> Step:
    """Return what takes the next part through the path and tells the milliseconds of each stage."""
    from registration import SIDE_PX, products, shots  # the benchmark beside this one

    from calibration.photometric import Photometric
    from calibration.preprocess import View, check_frame, to_batch
    from calibration.reference import learn_reference
    from calibration.registration import RegistrationSettings

    colour, fields, pose = case.split()
    generator = np.random.default_rng(5)
    product = products()[0]
    frames = [shot.frame for shot in shots(product, generator, DISTINCT_PARTS, defects=True)]
    reference = None
    if pose == "registered":
        good = [shot.frame for shot in shots(product, generator, 6, defects=False)]
        reference = learn_reference(good, 8, RegistrationSettings()).reference
    if colour == "colour":
        frames = [np.stack([frame, frame // 2 + 40, 255 - frame], axis=2) for frame in frames]
    photometric = Photometric()
    if fields == "dark+flat":
        noise = generator.uniform(0.9, 1.0, frames[0].shape).astype(np.float32)
        photometric = Photometric(dark=0.02 * noise, flat=0.9 * noise)
    view = View(VIEW_PX, VIEW_PX, colour=colour == "colour", reference_size=(SIDE_PX, SIDE_PX))
    numbers = iter(range(10**9))

    def step() -> Times:
        frame = frames[next(numbers) % len(frames)]
        moments = [now()]
        pixels = photometric.correct(frame, 8)
        check_frame(pixels, 8, view)
        moments.append(now())
        found = None if reference is None else reference.register(pixels, 8)
        moments.append(now())
        to_batch(pixels, 8, view, found)
        moments.append(now())
        corrected, registered, batched = np.diff(moments, axis=0)
        stages = {"photometric": corrected, "registration": registered, "preprocess": batched}
        sums = {"whole": corrected + registered + batched, "whole - registration": corrected + batched}
        return {stage: tuple(times.tolist()) for stage, times in (stages | sums).items()}

    return step


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout, measured in turn")
    parser.add_argument("--baseline", type=Path, help="CSV of an earlier run")
    parser.add_argument("--recipe", type=Path, help="run this recipe's engine after every frame")
    parser.add_argument("--cv-threads", type=int, default=1, help="as many as OpenCV may use")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--out", type=Path, help="CSV to write")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
