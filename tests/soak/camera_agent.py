"""Does the agent's own camera keep its promise while the camera fails? The same faults as `tests/soak/camera.py`.

    python tests/soak/camera_agent.py [--minutes 10] [--hertz 20] [--seed 1]

The line of the agent, with its camera process, and an inspector that passes everything. Each trigger must have exactly
one verdict; reasons are counted. Memory is that of the line's process and that of the camera's process, each after the
first half minute; the camera's process begins anew with each loss of the camera, and is told as its largest.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent))

import camera as soak

from agent.cameras.genicam import GenicamCamera
from agent.cameras.genicam_settings import GenicamSettings
from agent.line.beat import Beat, Settled
from agent.line.loop import Line
from agent.verdict import Outcome, Reason, Verdict
from calibration.frame import Frame


class Passing:
    """Passes every part whose picture is whole: all its pixels show the same number."""

    wrong = 0

    def inspect(self, frame: Frame, deadline_ns: int | None = None) -> Verdict:
        self.wrong += int(frame.pixels.min() != frame.pixels.max())
        return Verdict(frame.trigger_id, Outcome.PASS, Reason.SCORE, score=0.0, threshold=1.0)


def watch(line: Line, trouble: soak.Trouble, seconds: float, memory: list[tuple[float, float, float]]) -> None:
    """Bring faults over the camera and note (s, MiB here, MiB of the camera's process), then end the line."""
    ours, begun_s = psutil.Process(), time.monotonic()
    while (elapsed_s := time.monotonic() - begun_s) < seconds:
        trouble.act()
        children = 0
        for child in ours.children():
            try:
                if "agent.cameras.process" in child.cmdline():
                    children = max(children, child.memory_info().rss)
            except psutil.Error:
                continue
        memory.append((elapsed_s, ours.memory_info().rss / 2**20, children / 2**20))
        time.sleep(0.25)
    line.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--hertz", type=float, default=20)
    parser.add_argument("--seed", type=int, default=1, help="of the dice that choose the faults")
    arguments = parser.parse_args()
    print(soak.describe())
    reasons: Counter[str] = Counter()
    order: list[int] = []
    memory: list[tuple[float, float, float]] = []
    tally, inspector = soak.Tally(), Passing()

    def deliver(batch: Sequence[Settled]) -> None:
        for settled in batch:
            reasons[str(settled.verdict.reason)] += 1
            order.append(settled.verdict.trigger_id)

    with tempfile.TemporaryDirectory() as folder:
        for number in range(soak.PICTURES):
            picture = np.full((soak.HEIGHT, soak.WIDTH), number, np.uint8)
            soak.write_picture(Path(folder) / f"{number:03d}.pgm", picture)
        options = ("--no-resend", "--packet-size", "1500", "--seed", str(arguments.seed))
        with soak.Linecam(Path(folder), *options) as linecam:
            settings = GenicamSettings(
                producer=soak.producer(), serial=linecam.serial, pixel_format="Mono8", exposure_us=500.0
            )
            takt_ms = 1000 / arguments.hertz
            line = Line(GenicamCamera(settings), inspector, Beat(takt_ms, deadline_ms=0.9 * takt_ms), deliver)
            trouble = soak.Trouble(linecam, tally, arguments.seed)
            thread = threading.Thread(target=watch, args=(line, trouble, arguments.minutes * 60, memory))
            thread.start()
            done = line.run()
            thread.join()
    settled = np.array([entry for entry in memory if entry[0] >= soak.SETTLED_S])
    slope = np.polyfit(settled[:, 0] / 60, settled[:, 1], 1)[0] if len(settled) > 30 else float("nan")
    accounted = sorted(order) == list(range(1, done.triggers + 1))
    figures = {
        "triggers": done.triggers,
        "verdicts": len(order),
        **dict(reasons.most_common()),
        "each trigger once": accounted,
        "broken pictures": inspector.wrong,
        "camera restarts": line._camera.counters["camera_restarts"],
        "mib_per_minute": round(float(slope), 2),
        "largest camera process, MiB": round(max(entry[2] for entry in memory)),
        "faults": " ".join(f"{name} {count}" for name, count in sorted(tally.faults.items())),
    }
    for name, value in figures.items():
        print(f"{name:>28}  {value}")
    return 0 if accounted and not inspector.wrong else 1


if __name__ == "__main__":
    sys.exit(main())
