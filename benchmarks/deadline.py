"""The promise under load: one trigger, one verdict, within the takt, with everything else on the same cores.

    python benchmarks/deadline.py --takt-ms 50 --minutes 5 [--nice -10] [--resume] [--out DIR] [--csv FILE]
        [--picture FILE]

The real agent as its own processes (inspect, publish), as nice as its unit starts it, mosquitto and taktsight-subscribe
beside it, a simulated camera with frames of 1 megapixel drawn beforehand, the default detector on openvino with
2 threads. Cases:

    quiet     nothing else to do
    hog       a process at 100 % on every core
    heap      the hog, and 1.2 million objects in the inspect process with a thread that makes more
    ..., FIFO the same with realtime.priority 20 (SCHED_FIFO); left out where the machine does not allow it

Every trigger must be once in the archive, once at the gate and once at the MES; every verdict must be the one that the
same pipeline gives on the same frame at leisure, or `late`. Exit code 1 where one is not.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import yaml
from deadline_figures import (
    PATH,
    Case,
    Run,
    Said,
    Sample,
    complaints,
    cores_used,
    durations,
    growth_mib_per_minute,
    judged,
    percentiles,
    read_run,
    reasons,
    wrong,
)
from deadline_picture import draw
from deadline_programs import PATIENCE_S, TOPIC, broker, ended_with, hogs, sampled, size_of, subscriber
from latency import learnt_in_a_process
from machine import describe

from agent.engines.engine import EngineSettings, open_engine
from agent.line.pipeline import Pipeline
from agent.simulation.line import LineSettings, SimulatedLine
from calibration.frame import Frame
from calibration.recipe import read_recipe

HERE = Path(__file__).resolve().parent
RECIPE = "flange.recipe"
SIDE_PX, INPUT_PX = 1000, 256
PARTS = 100  # drawn beforehand; they come round and round
DEFECT_SHARE = 0.2
SAMPLE_EVERY_S = 1.0
UNIT_NICE = -10  # systemd/taktsight-agent@.service
CASES = (
    Case("quiet", "quiet"),
    Case("quiet, FIFO", "quiet-fifo", priority=20),
    Case("hog", "hog", hog=True),
    Case("hog + heap", "heap", hog=True, heap=True),
    Case("hog, FIFO", "hog-fifo", hog=True, priority=20),
    Case("hog + heap, FIFO", "heap-fifo", hog=True, heap=True, priority=20),
)


def main() -> int:
    arguments = parsed()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    print(describe())
    count = round(arguments.minutes * 60e3 / arguments.takt_ms)
    print(
        f"{count} parts a case, one every {arguments.takt_ms:g} ms, frames {SIDE_PX}x{SIDE_PX} gray, {PARTS} different"
    )
    if not may_be_nice(arguments.nice):
        arguments.nice = 0
    print(f"the agent is started with nice {arguments.nice}")
    recipe = out / RECIPE
    if not recipe.exists():
        learnt_in_a_process(recipe, INPUT_PX, colour=False, side_px=SIDE_PX)
    said = at_leisure(recipe, arguments.threads)
    runs = []
    for case in chosen(arguments.cases):
        run = None
        if arguments.resume:
            run = kept(case, out, arguments.takt_ms)
        run = run or carried_out(case, out, station_settings(out, arguments), count, arguments.nice)
        show(run, said)
        runs.append(run)
    show_all(runs, said)
    rows = [row for run in runs for row in rows_of(run, said)]
    write_csv(arguments.csv or out / "deadline.csv", ("case", "what", "value", "unit", "n"), rows)
    draw(runs, arguments.picture or out / "deadline.png")
    return 1 if any(complaints(run) or wrong(run, said) for run in runs) else 0


def write_csv(path: Path, heading: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(heading)
        writer.writerows(rows)


def chosen(names: Sequence[str]) -> list[Case]:
    """Return the cases by the names of their folders, all where none is named, that this machine can do."""
    wanted = [case for case in CASES if not names or case.file in names]
    if may_go_first():
        return wanted
    print("SCHED_FIFO is not allowed here: the cases with it are left out (ulimit -r, or run as root)")
    return [case for case in wanted if not case.priority]


def may_be_nice(nice: int) -> bool:
    """Return whether this user may start a process so nice."""
    started = subprocess.run(["nice", "-n", str(nice), "nice"], capture_output=True, text=True, check=False)
    return started.stdout.strip() == str(nice)


def may_go_first() -> bool:
    """Return whether this user may have SCHED_FIFO."""
    before, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(20))
    except PermissionError:
        return False
    os.sched_setscheduler(0, before, priority)
    return True


def line_settings() -> LineSettings:
    """Return the line that every case has."""
    return LineSettings(lot=2, width_px=SIDE_PX, height_px=SIDE_PX, defect_share=DEFECT_SHARE)


def at_leisure(recipe: Path, threads: int) -> list[Said]:
    """Return what the pipeline says of each frame with nothing else to do, in the order in which they come round."""
    loaded = read_recipe(recipe)
    pipeline = Pipeline(loaded, open_engine(loaded, EngineSettings("openvino", threads=threads)))
    line = SimulatedLine(line_settings())
    said = []
    for number in range(1, PARTS + 1):
        plan = line.plan(number)
        verdict = pipeline.inspect(Frame(line.render(plan)[0], number, number, 0, 0))
        said.append(Said(verdict.outcome, verdict.reason, verdict.score, plan.kind == "defective"))
    return said


def carried_out(case: Case, out: Path, settings: dict[str, Any], count: int, nice: int) -> Run:
    """Run the agent through one case and return what it left."""
    folder = out / case.file
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    station = folder / "station.yaml"
    with ExitStack() as stack:
        port = stack.enter_context(broker(folder))
        mes = stack.enter_context(subscriber(folder, port, count))
        if case.hog:
            stack.enter_context(hogs())
        mqtt = {"topic": TOPIC, "port": port, "consumers": ["mes"]}
        wanted = {**settings, "mqtt": mqtt, "realtime": {"priority": case.priority}}
        station.write_text(yaml.safe_dump(wanted, sort_keys=False))
        samples = agent_run(case, station, count, settings["takt_ms"], nice)
        ended_with(mes, folder / "mes.log")
    write_csv(folder / "samples.csv", [field.name for field in fields(Sample)], map(astuple, samples))
    return read_run(case, folder, settings["takt_ms"], settings["deadline_ms"], samples)


def kept(case: Case, out: Path, takt_ms: float) -> Run | None:
    """Return what an earlier run left of a case, if it came to its end, however long it was."""
    folder = out / case.file
    file = folder / "samples.csv"
    if not file.is_file():
        return None
    with file.open(newline="") as table:
        samples = [Sample(**{name: float(value) for name, value in row.items()}) for row in csv.DictReader(table)]
    return read_run(case, folder, takt_ms, 0.9 * takt_ms, samples)


def station_settings(out: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what every case's station.yaml says; what it does not say is as delivered."""
    line = line_settings()
    return {
        "station": "deadline",
        "recipe": str(out / RECIPE),
        "recipes": {"unsigned": "allow"},
        "takt_ms": arguments.takt_ms,
        "deadline_ms": 0.9 * arguments.takt_ms,
        "camera": {
            "kind": "simulated",
            "lot": line.lot,
            "width_px": line.width_px,
            "height_px": line.height_px,
            "defect_share": line.defect_share,
            "prerendered": PARTS,
        },
        "engine": {"kind": "openvino", "threads": arguments.threads},
        "archive": {"folder": "archive", "pictures": "rejects"},
        "output": {"kind": "file", "file": "gate.txt"},
    }


def agent_run(case: Case, station: Path, count: int, takt_ms: float, nice: int) -> list[Sample]:
    """Run the agent to its end; return what its two processes used while parts went by."""
    program = [str(HERE / "deadline_heap.py")] if case.heap else ["-m", "agent"]
    command = ["nice", "-n", str(nice), sys.executable, *program, "run", str(station), "--count", str(count)]
    folder, samples = station.parent, []
    with (folder / "agent.log").open("w") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            give_up_s = time.monotonic() + 2 * PATIENCE_S + 1.5 * count * takt_ms / 1e3
            seen = 0
            while process.poll() is None and time.monotonic() < give_up_s:
                time.sleep(SAMPLE_EVERY_S)
                parts = size_of(folder / "gate.txt")
                if parts > seen:  # neither before the first part nor while the report is written
                    samples += sampled(process.pid)
                seen = parts
            ended_with(process, folder / "agent.log")
        finally:
            process.kill()
            process.wait()
    return samples


def show(run: Run, said: Sequence[Said]) -> None:
    """Print one case, stage by stage."""
    print(f"\n{run.case.name}: {len(run.verdicts)} parts, deadline {run.deadline_ms:g} ms")
    for name, values in durations(run).items():
        p50, p99, p999, most = percentiles(values)
        print(f"  {name:18s} p50 {p50:7.2f}  p99 {p99:7.2f}  p99.9 {p999:7.2f}  max {most:7.2f} ms  n = {len(values)}")
    for process in ("inspect", "publish"):
        sizes = [getattr(one, f"{process}_mib") for one in run.samples]
        growth = growth_mib_per_minute(run.samples, f"{process}_own_mib")
        told = "too short to tell growth" if growth is None else f"its own grows by {growth:+.2f} MiB a minute"
        if sizes:
            print(f"  {process} process      {min(sizes):.0f} to {max(sizes):.0f} MiB, {told}")
    cores = cores_used(run.samples)
    if cores is not None:
        print(f"  both processes keep {cores:.2f} cores busy")
    for reason, number in reasons(run).items():
        print(f"  no verdict, {reason}: {number}")
    for complaint in [*complaints(run), *(f"trigger {one}: wrong verdict" for one in wrong(run, said)[:5])]:
        print(f"  NOT AS PROMISED: {complaint}")


def show_all(runs: Sequence[Run], said: Sequence[Said]) -> None:
    """Print a line per case, and what became of the targets."""
    print(
        f"\n{'case':18s}triggers  archive   gate    MES   late    wrong  escaped  overkill  p50    p99  p99.9    max ms"
    )
    for run in runs:
        p50, p99, p999, most = percentiles(durations(run)[PATH])
        late = reasons(run)["late"] / len(run.verdicts)
        escaped, overkill = judged(run, said)
        print(
            f"{run.case.name:18s}{run.triggers:8d} {len(run.verdicts):8d} {len(run.gate):6d} {len(run.mes):6d} "
            f"{late:7.2%} {len(wrong(run, said)):7d} {escaped:8d} {overkill:9d} "
            f"{p50:5.1f} {p99:6.1f} {p999:6.1f} {most:6.1f}"
        )
    for run in runs:
        if not run.case.hog:
            measured = durations(run)
            p50, _, p999, _ = percentiles(measured[PATH])
            overhead = percentiles(measured["overhead"])[0]
            print(f"{run.case.name}: p99.9 {p999:.1f} ms, target at most 1.5 x p50 + 5 = {1.5 * p50 + 5:.1f} ms")
            print(f"{run.case.name}: overhead p50 {overhead:.2f} ms, target at most 2 ms")


def rows_of(run: Run, said: Sequence[Said]) -> Iterator[tuple[str, str, object, str, int]]:
    """Yield a case's figures as rows of the CSV."""
    case, n = run.case.name, len(run.verdicts)
    escaped, overkill = judged(run, said)
    counts = {
        "triggers": run.triggers,
        "verdicts in the archive": n,
        "gate actions": len(run.gate),
        "parts at the MES": len(run.mes),
        "late": reasons(run)["late"],
        "no verdict, other": reasons(run).total() - reasons(run)["late"],
        "wrong": len(wrong(run, said)),
        "defective parts passed": escaped,
        "good parts rejected": overkill,
    }
    yield from ((case, what, number, "", run.triggers) for what, number in counts.items())
    for what, values in durations(run).items():
        for name, value in zip(("p50", "p99", "p99.9", "max"), percentiles(values), strict=True):
            yield case, f"{what}, {name}", round(value, 3), "ms", len(values)
    for process in ("inspect", "publish"):
        sizes = [getattr(one, f"{process}_mib") for one in run.samples]
        growth = growth_mib_per_minute(run.samples, f"{process}_own_mib")
        if sizes:
            yield case, f"{process} process, most memory", round(max(sizes), 1), "MiB", len(sizes)
        if growth is not None:
            yield case, f"{process} process, growth of its own memory", round(growth, 3), "MiB/min", len(sizes)
    cores = cores_used(run.samples)
    if cores is not None:
        yield case, "cores kept busy by both processes", round(cores, 3), "", len(run.samples)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--takt-ms", type=float, default=50.0)
    parser.add_argument("--minutes", type=float, default=5.0, help="of every case")
    parser.add_argument("--threads", type=int, default=2, help="of the engine")
    parser.add_argument("--nice", type=int, default=UNIT_NICE, help="of the agent; by hand: 0")
    parser.add_argument("--cases", nargs="*", default=[], choices=[case.file for case in CASES], help="all")
    parser.add_argument("--out", type=Path, default=HERE.parent / "out" / "deadline", help="recipe, logs, databases")
    parser.add_argument("--resume", action="store_true", help="read the cases that --out holds, run the others")
    parser.add_argument("--csv", type=Path, help="else in --out")
    parser.add_argument("--picture", type=Path, help="PNG; else in --out")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
