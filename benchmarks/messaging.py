"""From the verdict to the MES: a durable outbox, a real mosquitto, taktsight-subscribe with SQLite in its own process.

    python benchmarks/messaging.py [--seconds 30] [--out benchmarks/results/messaging.csv]

Every verdict has a 256 x 256 heatmap. Station, broker and MES share the machine; both databases are synchronous FULL.

    store      one verdict into the outbox, ms, paced as a line paces it
    sustained  verdicts at a fixed rate: from the call of `store` to the row committed at the MES, ms
    outage     ten minutes at 20/s with the broker away: disk used, then the time until the MES has it all
"""

from __future__ import annotations

import argparse
import csv
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from machine import describe

from agent.clock import StationClock
from agent.mqtt.publisher import MqttPublisher, MqttSettings, outbox_consumers
from agent.outbox.outbox import Outbox, OutboxSettings
from agent.publishing.messages import HeatmapPayload, Origin, heatmap_payload, new_id, verdict_message
from agent.verdict import Outcome, Reason, Region, Verdict

ROOT = "acme/plant1/hall2/line3/cell7"
ORIGIN = Origin(
    "cell7", new_id(), "flange", "d" * 64, "openvino f32, 2 threads", simulated=True, on_no_verdict="reject"
)
OUTAGE_VERDICTS = 12_000  # ten minutes at 20/s
RATES = (20, 200, 400)  # verdicts a second
PATIENCE_S = 120.0


def main() -> int:
    arguments = parsed()
    if arguments.mes is not None:
        return be_the_mes(*arguments.mes)
    print(describe())
    print(f"mosquitto: {broker_version()}; heatmap {len(some_heatmaps()[0].data)} bytes")
    rows = [*store_rows(arguments.seconds), *sustained_rows(arguments.seconds), *outage_rows()]
    width = max(len(row[0]) for row in rows)
    for name, value, unit, n in rows:
        print(f"{name:<{width}}  {value:>10.2f} {unit:<5} n = {n}")
    if arguments.out is not None:
        with arguments.out.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("what", "value", "unit", "n"))
            writer.writerows((name, f"{value:.3f}", unit, n) for name, value, unit, n in rows)
    return 0


Row = tuple[str, float, str, int]


def store_rows(seconds: float) -> list[Row]:
    """Return what one append costs, paced, and how many a second go in when nothing else limits."""
    rows: list[Row] = []
    for rate in (20, 200):
        with tempfile.TemporaryDirectory() as folder:
            station = Station(Path(folder), port=None)
            durations = []
            for _ in paced(rate, seconds / 3):
                began_ns = time.monotonic_ns()
                station.inspect()
                durations.append((time.monotonic_ns() - began_ns) / 1e6)
            station.close()
        rows += percentiles(f"store, one at a time, {rate}/s", durations)
    for batch in (1, 16):
        with tempfile.TemporaryDirectory() as folder:
            station, stored, began_s = Station(Path(folder), port=None), 0, time.monotonic()
            while time.monotonic() - began_s < seconds / 3:
                station.inspect(batch)
                stored += batch
            rows.append((f"store, batches of {batch}, flat out", stored / (time.monotonic() - began_s), "1/s", stored))
            station.close()
    return rows


def sustained_rows(seconds: float) -> list[Row]:
    """Return how long verdicts take to be committed at the MES, by rate."""
    rows: list[Row] = []
    for rate in RATES:
        count = round(rate * seconds)
        with plant() as line:
            line.wait_for_the_first()
            began_s = time.monotonic()
            for _ in paced(rate, seconds):
                line.station.inspect()
            behind = line.station.outbox.waiting
            arrivals = line.arrivals()
            ended_s = max(arrivals.values()) / 1e9
            heatmaps = line.heatmaps()
        late_ms = [(arrivals[seq] - line.station.sent_ns[seq]) / 1e6 for seq in range(2, count + 2)]
        rows += percentiles(f"sustained {rate}/s, store to MES", late_ms)
        rows += [
            (f"sustained {rate}/s, rate reached at the MES", count / (ended_s - began_s), "1/s", count),
            (f"sustained {rate}/s, waiting when the line stops", behind, "", count),
            (f"sustained {rate}/s, heatmaps at the MES", heatmaps, "", count + 1),
        ]
    return rows


def outage_rows() -> list[Row]:
    """Return what a long outage leaves on the disk, and how soon it is over."""
    with plant(broker_runs=False) as line:
        for _ in range(OUTAGE_VERDICTS // 20):
            line.station.inspect(20)
        kept = [path for path in line.station.folder.rglob("*") if not path.name.startswith("reserve")]
        used = sum(path.stat().st_blocks * 512 for path in kept)
        shed = line.station.outbox.heatmaps_shed
        line.start_broker()
        line.wait_for_the_first()
        first_ns = min(line.read_arrivals().values())
        arrivals = line.arrivals()
        took_s = (max(arrivals.values()) - first_ns) / 1e9
    return [
        ("outage, disk used", used / 1e6, "MB", OUTAGE_VERDICTS),
        ("outage, heatmaps shed", shed, "", OUTAGE_VERDICTS),
        ("outage, until the MES has it all", took_s, "s", OUTAGE_VERDICTS),
        ("outage, drain rate", OUTAGE_VERDICTS / took_s, "1/s", OUTAGE_VERDICTS),
    ]


class Station:
    """Outbox and publisher as `agent.station` joins them; `port` None: no publisher."""

    def __init__(self, folder: Path, port: int | None) -> None:
        self.folder = folder / "outbox"
        self.outbox = Outbox(OutboxSettings(self.folder), "cell7")
        self.sent_ns: dict[int, int] = {}
        self._clock = StationClock()
        self._heatmaps = some_heatmaps()
        self._publisher: MqttPublisher | None = None
        if port is not None:
            settings = MqttSettings(topic=ROOT, port=port, consumers=("mes",))
            self.outbox.set_consumers(outbox_consumers(settings))
            self._publisher = MqttPublisher(settings, ORIGIN, self.outbox)
            self._publisher.start()

    def inspect(self, count: int = 1) -> None:
        """Store so many verdicts in one go."""
        now_ns = time.monotonic_ns()
        batch = []
        for number in range(count):
            heatmap = self._heatmaps[(len(self.sent_ns) + number) % len(self._heatmaps)]
            verdict = replace(REJECT, trigger_id=len(self.sent_ns) + number + 1)
            batch.append((verdict_message(verdict, ORIGIN, self._clock.stamp(), heatmap), heatmap))
        for message in self.outbox.store(batch):
            self.sent_ns[message["seq"]] = now_ns
        if self._publisher is not None:
            self._publisher.wake()

    def close(self) -> None:
        """Stop both."""
        if self._publisher is not None:
            self._publisher.stop(1.0)
        self.outbox.close()


REJECT = Verdict(
    1,
    Outcome.REJECT,
    Reason.SCORE,
    "unlike good parts at x 124, y 88 px, 9 x 9 px",
    part_id="P000001",
    score=12.5,
    threshold=4.2,
    regions=(Region(120.0, 84.0, 9.0, 9.0, 50.0, 12.5),),
    stage_ms={"photometric": 0.01, "registration": 8.1, "preprocess": 0.28, "engine": 6.9, "regions": 0.03},
    latency_ms=15.6,
)


@dataclass
class Plant:
    """A station, its broker and its MES on one machine."""

    station: Station
    folder: Path
    port: int
    processes: list[subprocess.Popen[bytes]]

    def start_broker(self) -> None:
        """Start mosquitto, and wait until it listens."""
        config = self.folder / "mosquitto.conf"
        config.write_text(
            f"listener {self.port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\nlog_dest none\n"
        )
        self._start(["mosquitto", "-c", str(config)])
        deadline_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline_s:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.01)
        raise TimeoutError("mosquitto does not listen")

    def start_mes(self) -> None:
        """Start the subscriber."""
        self._start([sys.executable, __file__, "--mes", str(self.folder), str(self.port)])

    def wait_for_the_first(self) -> None:
        """Return once a verdict reached the MES."""
        if not self.station.sent_ns:
            self.station.inspect()
        self._wait_for(1)

    def arrivals(self) -> dict[int, int]:
        """Wait until the MES has everything; return when it had what, ns by seq."""
        self._wait_for(len(self.station.sent_ns))
        return self.read_arrivals()

    def read_arrivals(self) -> dict[int, int]:
        """Return when the MES had what, so far."""
        path = self.folder / "arrivals.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return {int(seq): int(arrived_ns) for seq, arrived_ns in map(json.loads, lines)}

    def heatmaps(self) -> int:
        """Return how many heatmaps the MES has, once no more come."""
        seen = -1
        while (found := sum(1 for _ in (self.folder / "heatmaps").rglob("*.jpg"))) != seen:
            seen = found
            time.sleep(1.0)
        return seen

    def _wait_for(self, count: int) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while len(self.read_arrivals()) < count:
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"{len(self.read_arrivals())} of {count} verdicts at the MES after {PATIENCE_S:g} s")
            time.sleep(0.2)

    def _start(self, command: list[str]) -> None:
        quiet = subprocess.DEVNULL
        self.processes.append(subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet))


@contextmanager
def plant(*, broker_runs: bool = True) -> Iterator[Plant]:
    """Yield a plant whose MES is ready to receive; without a broker nothing gets there yet."""
    with tempfile.TemporaryDirectory() as name, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
        probe.close()
        line = Plant(Station(Path(name), port), Path(name), port, [])
        try:
            if broker_runs:
                line.start_broker()
            line.start_mes()
            yield line
        finally:
            line.station.close()
            for process in line.processes:
                process.terminate()
                process.wait()


def be_the_mes(folder: str, port: str) -> int:
    """Store what comes, and write down when each verdict was committed."""
    from taktsight_subscribe import SqliteStore, Subscriber

    here = Path(folder)
    with (
        (here / "arrivals.jsonl").open("a", buffering=1) as file,
        Subscriber(
            ROOT,
            consumer="mes",
            store=SqliteStore(here / "mes.sqlite"),
            port=int(port),
            heatmaps=here / "heatmaps",
        ) as subscriber,
    ):
        for verdict in subscriber:
            file.write(f"[{verdict.seq}, {time.monotonic_ns()}]\n")
    return 0


def paced(rate: float, seconds: float) -> Iterator[int]:
    """Yield on a beat; one that comes late is made up for."""
    began_ns = time.monotonic_ns()
    for number in range(round(rate * seconds)):
        wait_s = (began_ns + number * 1e9 / rate - time.monotonic_ns()) / 1e9
        if wait_s > 0:
            time.sleep(wait_s)
        yield number


def some_heatmaps() -> list[HeatmapPayload]:
    """Return 16 heatmaps of a smooth map with a peak, as a detector makes them."""
    generator = np.random.default_rng(7)
    maps = []
    for _ in range(16):
        small = generator.gamma(2.0, 0.1, (16, 16)).astype(np.float32)
        small[generator.integers(2, 14), generator.integers(2, 14)] = 3.0
        maps.append(np.asarray(cv2.resize(small, (256, 256), interpolation=cv2.INTER_CUBIC), np.float32).clip(0))
    return [heatmap_payload(one, 1.0) for one in maps]


def percentiles(name: str, values_ms: list[float]) -> list[Row]:
    """Return p50, p99 and max."""
    p50, p99 = np.percentile(values_ms, [50, 99])
    n = len(values_ms)
    return [
        (f"{name}, p50", float(p50), "ms", n),
        (f"{name}, p99", float(p99), "ms", n),
        (f"{name}, max", max(values_ms), "ms", n),
    ]


def broker_version() -> str:
    """Return mosquitto's first line of help."""
    done = subprocess.run(["mosquitto", "-h"], capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0] if done.stdout else "not found: apt-get install mosquitto"


def parsed() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="of every paced measurement")
    parser.add_argument("--out", type=Path, help="CSV file")
    parser.add_argument("--mes", nargs=2, metavar=("FOLDER", "PORT"), help="be the MES: used by this program")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
