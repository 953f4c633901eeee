"""Is every trigger accounted for while the camera fails? Our GenTL producer, the line simulator, 20 triggers a second.

    python tests/soak/camera.py [--minutes 10] [--hertz 20] [--seed 1] [--out camera.csv]

Every few seconds something goes wrong: packets get lost, frames are swallowed whole, the camera stalls, is killed and
started again, loses its controller, changes the size of its pictures. The client here is a plain one: it triggers,
waits until the next trigger is due, and opens the camera anew when a call fails or nothing comes any more.

What becomes of a trigger: `frame` arrived whole and in time; `late` whole, but after the next trigger; `incomplete`
with packets missing; `nothing` came; `away`: there was no camera that could be triggered. A frame tells by a chunk
which trigger it answers, and by its first pixel which picture it is: `wrong` counts where these do not agree. Memory
is that of this process after the first half minute, told apart by what a minute and what an opening cost.
"""

from __future__ import annotations

import argparse
import csv
import random
import re
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from genicam import genapi
from genicam import gentl as transport
from gentl import Linecam, producer, write_picture
from harvesters.core import Harvester
from machine import describe

HEIGHT, WIDTH, PICTURES = 240, 320, 200
SETTLED_S = 30
SILENT_TRIGGERS = 20  # so many without a frame, and the camera is opened anew
FAILURES = (transport.GenericException, genapi.GenericException)
OUTCOMES = ("frame", "late", "incomplete", "nothing", "away")


@dataclass
class Tally:
    """What became of the triggers, and what else was seen."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    triggers: int = 0
    wrong: int = 0
    opened: int = 0
    longest_call_s: float = 0.0
    memory: list[tuple[float, int, float, int]] = field(default_factory=list)  # s, openings, MiB, descriptors


class Client:
    """One camera, opened anew as often as it takes."""

    def __init__(self, camera: Linecam, tally: Tally) -> None:
        self._camera = camera
        self._tally = tally
        self._harvester: Harvester | None = None
        self._acquirer: Any = None
        self._event: Any = None
        self._silent = 0
        self._sent = 0  # triggers since the camera was opened
        self._open_frames: set[int] = set()  # numbers of triggers that nothing came for yet

    @property
    def is_open(self) -> bool:
        return self._acquirer is not None

    def open(self) -> None:
        """Try to open the camera; where it is not there, it stays closed."""
        self.close()
        self._harvester = Harvester()
        self._harvester.add_file(str(producer()))
        try:
            self._harvester.update()
            self._acquirer = self._harvester.create({"serial_number": self._camera.serial})
            self._set_up(self._acquirer.remote_device.node_map)
            self._camera.tell("rewind")
            self._acquirer.num_buffers = 8
            self._acquirer.start()
        except (*FAILURES, ValueError, OSError):  # ValueError: harvesters found no such camera
            self.close()
            return
        (self._event,) = self._acquirer._new_buffer_event_monitor_dict.values()
        self._silent = self._sent = 0
        self._open_frames.clear()
        self._tally.opened += 1

    @staticmethod
    def _set_up(nodes: Any) -> None:
        nodes.Width.value, nodes.Height.value, nodes.PixelFormat.value = WIDTH, HEIGHT, "Mono8"
        nodes.TriggerSelector.value, nodes.TriggerMode.value, nodes.TriggerSource.value = "FrameStart", "On", "Software"
        nodes.ExposureTime.value, nodes.ChunkModeActive.value = 500.0, True
        for chunk in ("FrameID", "CounterValue"):
            nodes.ChunkSelector.value, nodes.ChunkEnable.value = chunk, True
        nodes.CounterSelector.value = nodes.ChunkCounterSelector.value = "Counter0"
        nodes.CounterReset.execute()

    def close(self) -> None:
        """Close what is open of it."""
        for end in (
            getattr(self._acquirer, "stop", None),
            self._let_go_of_nodes if self._acquirer is not None else None,
            getattr(self._acquirer, "destroy", None),
            getattr(self._harvester, "reset", None),
        ):
            if end is not None:
                self._timed(end)
        self._acquirer = self._harvester = self._event = None

    def _let_go_of_nodes(self) -> None:
        """Do what harvesters 1.4.3 leaves out when it destroys an acquirer: half a MiB of nodes would stay."""
        self._acquirer._chunk_adapter.detach_node_map()
        self._acquirer.remote_device.node_map.disconnect()

    def _timed(self, call: Any) -> bool:
        started_s = time.monotonic()
        try:
            call()
        except FAILURES:
            return False
        finally:
            self._tally.longest_call_s = max(self._tally.longest_call_s, time.monotonic() - started_s)
        return True

    def trigger(self, until_s: float) -> None:
        """Trigger once and take what comes until the next is due; count one outcome."""
        tally = self._tally
        if not self._timed(self._acquirer.remote_device.node_map.TriggerSoftware.execute):
            tally.outcomes["away"] += 1
            self.close()
            return
        self._sent += 1
        self._open_frames.add(self._sent)
        outcome = "nothing"
        while (left_s := until_s - time.monotonic()) > 0:
            came = self._take(left_s)
            if came == "late":  # the trigger that it answers was counted as nothing
                tally.outcomes["nothing"] -= 1
                tally.outcomes["late"] += 1
            elif came is not None:
                outcome = came
        tally.outcomes[outcome] += 1
        self._silent = 0 if outcome == "frame" else self._silent + 1
        if self._silent >= SILENT_TRIGGERS:
            self.close()

    def _take(self, timeout_s: float) -> str | None:
        """Return what came, None if nothing did."""
        try:
            self._event.update_event_data(max(1, int(timeout_s * 1000)))
        except transport.TimeoutException:
            return None
        buffer = self._event.buffer
        try:
            return self._judged(buffer) if buffer.is_complete() else "incomplete"
        finally:
            buffer.parent.queue_buffer(buffer)

    def _judged(self, buffer: Any) -> str:
        payload = np.frombuffer(buffer.raw_buffer, np.uint8)[: buffer.size_filled]
        picture, number = int(payload[0]), chunk(payload, CHUNK_COUNTERS)
        if number not in self._open_frames or picture != (chunk(payload, CHUNK_FRAME_ID) - 1) % PICTURES:
            self._tally.wrong += 1
        self._open_frames.discard(number)
        return "frame" if number == self._sent else "late"


CHUNK_FRAME_ID, CHUNK_COUNTERS = 3, 4


def chunk(payload: np.ndarray, wanted: int) -> int:
    """Return the first number of a chunk, read from the end of the payload as GigE Vision lays it out."""
    end = len(payload)
    while end > 8:
        name, length = (int.from_bytes(payload[end - at : end - at + 4].tobytes(), "big") for at in (8, 4))
        if name == wanted:
            width = 4 if wanted == CHUNK_COUNTERS else 8
            begin = end - 8 - length
            return int.from_bytes(payload[begin : begin + width].tobytes(), "big")
        end -= 8 + length
    raise ValueError(f"no chunk {wanted} in a payload of {len(payload)} bytes")


class Trouble:
    """Brings one fault after another over the camera, without waiting."""

    def __init__(self, camera: Linecam, tally: Tally, seed: int) -> None:
        self._camera = camera
        self._tally = tally
        self._dice = random.Random(seed)
        self._next_s = time.monotonic() + 5
        self._undo: tuple[float, str] | None = None

    def act(self) -> None:
        """Begin or end a fault that is due."""
        now_s = time.monotonic()
        if self._undo is not None and now_s >= self._undo[0]:
            undo, self._undo = self._undo[1], None
            self._camera.start() if undo == "start" else self._camera.tell(undo)
        if self._undo is None and now_s >= self._next_s:
            self._begin(now_s)
            self._next_s = now_s + self._dice.uniform(3, 7)

    def _begin(self, now_s: float) -> None:
        faults = {
            "lose 5": "lose 0",
            "lose 100": "lose 0",
            f"drop {self._dice.randrange(1, 4)}": None,
            "stall 0.3": None,
            "kill": "start",
            "release": None,
            f"size {WIDTH // 2} {HEIGHT // 2}": f"size {WIDTH} {HEIGHT}",
        }
        fault = self._dice.choice(list(faults))
        self._tally.faults[fault.split()[0]] += 1
        if fault == "kill":
            self._camera.kill()
        else:
            self._camera.tell(fault)
        undo = faults[fault]
        if undo is not None:
            self._undo = (now_s + self._dice.uniform(1, 3), undo)


def memory_mib() -> tuple[float, int]:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024, len(list(Path("/proc/self/fd").iterdir()))


def run(camera: Linecam, tally: Tally, arguments: argparse.Namespace) -> None:
    client, trouble = Client(camera, tally), Trouble(camera, tally, arguments.seed)
    client.open()
    period_s = 1 / arguments.hertz
    begun_s = due_s = time.monotonic()
    while (elapsed_s := time.monotonic() - begun_s) < arguments.minutes * 60:
        trouble.act()
        due_s += period_s
        tally.triggers += 1
        if client.is_open:
            client.trigger(due_s)
        else:
            tally.outcomes["away"] += 1
            client.open()
        while due_s + period_s < time.monotonic():  # triggers that came while a call lasted
            due_s += period_s
            tally.triggers += 1
            tally.outcomes["away"] += 1
        if not tally.memory or elapsed_s - tally.memory[-1][0] >= 1:
            tally.memory.append((elapsed_s, tally.opened, *memory_mib()))
        time.sleep(max(0.0, due_s - time.monotonic()))
    client.close()


def growth(memory: list[tuple[float, int, float, int]]) -> tuple[float, float]:
    """Return the MiB that each minute and each opening of the camera cost, after the first half minute."""
    settled = np.array([entry[:3] for entry in memory if entry[0] >= SETTLED_S])
    if len(settled) < 30:
        return float("nan"), float("nan")
    causes = np.column_stack([np.ones(len(settled)), settled[:, 0] / 60, settled[:, 1]])
    _, per_minute, per_opening = np.linalg.lstsq(causes, settled[:, 2], rcond=None)[0]
    return float(per_minute), float(per_opening)


def report(tally: Tally, minutes: float) -> dict[str, object]:
    """Return the figures of the run, in the order of the table."""
    descriptors = [entry[3] for entry in tally.memory if entry[0] >= SETTLED_S]
    per_minute, per_opening = growth(tally.memory)
    return {
        "minutes": minutes,
        "triggers": tally.triggers,
        **{outcome: tally.outcomes[outcome] for outcome in OUTCOMES},
        "unaccounted": tally.triggers - sum(tally.outcomes.values()),
        "wrong": tally.wrong,
        "opened": tally.opened,
        "longest_call_s": round(tally.longest_call_s, 2),
        "mib_per_minute": round(per_minute, 2),
        "mib_per_opening": round(per_opening, 2),
        "descriptors": f"{min(descriptors, default=0)}-{max(descriptors, default=0)}",
        "faults": " ".join(f"{name} {count}" for name, count in sorted(tally.faults.items())),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--hertz", type=float, default=20)
    parser.add_argument("--seed", type=int, default=1, help="of the dice that choose the faults")
    parser.add_argument("--out", type=Path, help="write the figures as CSV")
    arguments = parser.parse_args()
    print(describe())
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(PICTURES):
            write_picture(Path(folder) / f"{number:03d}.pgm", np.full((HEIGHT, WIDTH), number, np.uint8))
        options = ("--no-resend", "--packet-size", "1500", "--seed", str(arguments.seed))
        with Linecam(Path(folder), *options) as camera:
            run(camera, tally, arguments)
    figures = report(tally, arguments.minutes)
    for name, value in figures.items():
        print(f"{name:>15}  {value}")
    if arguments.out is not None:
        with arguments.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(figures))
            writer.writeheader()
            writer.writerow(figures)
    return 0 if figures["unaccounted"] == 0 and tally.wrong == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
