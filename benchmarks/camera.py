"""From a software trigger to the frame: harvesters, our GenTL producer, GigE Vision over loopback, the line simulator.

    python benchmarks/camera.py [--count 200] [--rounds 3] [--against FILE.cti] [--link-mbit 10000] [--out FILE.csv]

Builds the producer and the simulator where they are not built. Mono8, 8192-byte packets. A row's times are from
TriggerSoftware.execute() to try_fetch() returning; of that, `wire` is what a link of this speed takes for the bytes.
`cpu` is this process's time, both threads of the producer included, the simulator's not. With --against another
producer is measured in the same run with the same camera, one round each in turn. One that takes packets from a packet
socket does so for root alone, and waits up to 5 ms for more of them; to compare as the agent runs, without that right:

    setpriv --bounding-set=-net_raw --inh-caps=-net_raw python benchmarks/camera.py --against FILE.cti

`copies`: a payload is copied once by the producer, from the packet into the buffer that harvesters announced, and the
array that harvesters gives is a view of that buffer; where it is not, the row says 2.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from gentl import Linecam, producer, write_picture
from harvesters.core import Harvester

SIZES = ((640, 480), (1920, 1200))  # pixels
WARM_UP = 20
PAUSE_S = 0.005  # between a frame and the next trigger
PICTURES = 4
BUFFER_INFO_BASE = 0  # the question to GenTL where the announced buffer lies


@dataclass
class Measured:
    """What one producer took for frames of one size."""

    frame_ms: list[float] = field(default_factory=list)
    open_ms: list[float] = field(default_factory=list)
    close_ms: list[float] = field(default_factory=list)
    cpu_s: float = 0.0
    wall_s: float = 0.0
    incomplete: int = 0
    copies: int = 1


def main() -> int:
    arguments = parsed()
    print(describe())
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("harvesters", "genicam")))
    programs = {"ours": producer()}
    if arguments.against is not None:
        programs["against"] = arguments.against
    rows = []
    for size in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            write_pictures(Path(folder), size)
            with Linecam(Path(folder), "--link-mbit", str(arguments.link_mbit)) as camera:
                rows += measured_size(programs, camera, size, arguments)
    show(rows, arguments.count * arguments.rounds, arguments.link_mbit)
    if arguments.out is not None:
        with arguments.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return 0


def write_pictures(folder: Path, size: tuple[int, int]) -> None:
    width, height = size
    for number in range(PICTURES):
        dice = np.random.default_rng(number)
        write_picture(folder / f"{number}.pgm", dice.integers(0, 256, (height, width), dtype=np.uint8))


def measured_size(
    programs: dict[str, Path], camera: Linecam, size: tuple[int, int], arguments: argparse.Namespace
) -> list[dict[str, object]]:
    """Return a row per producer for frames of this size."""
    results: dict[str, Measured] = defaultdict(Measured)
    for _ in range(arguments.rounds):
        for name, program in programs.items():
            measure_round(results[name], program, camera, arguments.count)
    return [row(name, size, result, arguments.link_mbit) for name, result in results.items()]


def measure_round(result: Measured, program: Path, camera: Linecam, count: int) -> None:
    """Open the camera, trigger `count` frames after a warm-up, and close it again."""
    harvester = Harvester()
    harvester.add_file(str(program))
    harvester.update()
    started_s = time.perf_counter()
    acquirer = harvester.create({"serial_number": camera.serial})
    set_up(acquirer)
    result.open_ms.append((time.perf_counter() - started_s) * 1e3)
    try:
        for number in range(WARM_UP + count):
            if number == WARM_UP:
                cpu_s, wall_s = sum(os.times()[:2]), time.perf_counter()
            frame_ms = timed_frame(result, acquirer)
            if number >= WARM_UP and frame_ms is not None:
                result.frame_ms.append(frame_ms)
            time.sleep(PAUSE_S)
        result.cpu_s += sum(os.times()[:2]) - cpu_s
        result.wall_s += time.perf_counter() - wall_s
    finally:
        started_s = time.perf_counter()
        acquirer.stop()
        acquirer.destroy()
        result.close_ms.append((time.perf_counter() - started_s) * 1e3)
        harvester.reset()


def set_up(acquirer: Any) -> None:
    nodes = acquirer.remote_device.node_map
    nodes.TriggerSelector.value, nodes.TriggerMode.value, nodes.TriggerSource.value = "FrameStart", "On", "Software"
    nodes.ExposureTime.value = 1.0  # us
    acquirer.num_buffers = 8
    acquirer.start()


def timed_frame(result: Measured, acquirer: Any) -> float | None:
    """Return the milliseconds from the trigger to the frame, None if it came incomplete or not at all."""
    started_s = time.perf_counter()
    acquirer.remote_device.node_map.TriggerSoftware.execute()
    buffer = acquirer.try_fetch(timeout=2.0)
    frame_ms = (time.perf_counter() - started_s) * 1e3
    if buffer is None:
        result.incomplete += 1
        return None
    with buffer:
        pixels = buffer.payload.components[0].data
        if pixels.ctypes.data != buffer.module.get_info_ptr(BUFFER_INFO_BASE):
            result.copies = 2
    return frame_ms


def row(name: str, size: tuple[int, int], result: Measured, link_mbit: float) -> dict[str, object]:
    p50, p99 = np.percentile(result.frame_ms, [50, 99])
    wire_ms = size[0] * size[1] * 8 / link_mbit / 1e3 if link_mbit else 0.0
    return {
        "producer": name,
        "size": f"{size[0]}x{size[1]}",
        "n": len(result.frame_ms),
        "wire_ms": round(wire_ms, 2),
        "p50_ms": round(float(p50), 2),
        "p99_ms": round(float(p99), 2),
        "max_ms": round(max(result.frame_ms), 2),
        "cpu_ms_per_frame": round(result.cpu_s * 1e3 / max(1, len(result.frame_ms)), 2),
        "cpu_share": round(result.cpu_s / result.wall_s, 2),
        "incomplete": result.incomplete,
        "copies": result.copies,
        "open_ms": round(float(np.median(result.open_ms)), 1),
        "close_ms": round(float(np.median(result.close_ms)), 1),
    }


def show(rows: Sequence[dict[str, object]], wanted: int, link_mbit: float) -> None:
    print(f"\n{wanted} frames each after {WARM_UP} warm-up a round, wire of {link_mbit:g} Mbit/s")
    heads = list(rows[0])
    cells = [heads, *[[str(entry[head]) for head in heads] for entry in rows]]
    widths = [max(len(line[column]) for line in cells) for column in range(len(heads))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="frames a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path, help="another GenTL producer to compare with, a .cti file")
    parser.add_argument("--link-mbit", type=float, default=10000, help="speed of the simulated wire; 0: no limit")
    parser.add_argument("--out", type=Path, help="write the rows as CSV")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
