"""A whole plant in processes, for tests and benchmarks: agents, a broker, a MES, each of which can be killed."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from recipes import SIDE, write_tiny_recipe
from verdicts import archived

from calibration.preprocess import View

ROOT = "acme/plant1/hall2/line3/cell7"
STATION = """
station: cell7
recipe: tiny.recipe
recipes: {{unsigned: allow}}
takt_ms: {takt_ms}
camera: {{kind: simulated, width_px: 64, height_px: 64, seed: 1, lost: [3]}}
engine: {{kind: onnxruntime, threads: 1}}
mqtt: {{topic: {root}, port: {port}, consumers: {consumers}}}
archive: {{folder: archive, pictures: none}}
health: {{port: 0}}
"""


class Process:
    """A command as a process of its own; what it prints goes to a file."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.command = [sys.executable, *command]
        self.environment: dict[str, str] | None = None  # beside our own
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self.kills = 0

    def start(self) -> None:
        """Start it."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **(self.environment or {})},
            )

    def kill(self) -> None:
        """End it as a power cut would."""
        self._send(signal.SIGKILL)
        self.kills += 1

    def stop(self, timeout_s: float = 30.0) -> None:
        """Ask it to end, and wait until it has."""
        self._send(signal.SIGTERM, timeout_s)

    @property
    def process_id(self) -> int:
        """Of its present life."""
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """True until it ended."""
        return self._process is not None and self._process.poll() is None

    @property
    def output(self) -> str:
        """All that it printed, over all its lives."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def _send(self, number: int, timeout_s: float = 10.0) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(number)
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)


def station_process(folder: Path, port: int, *, takt_ms: int = 20, consumers: tuple[str, ...] = ("mes",)) -> Process:
    """Return an agent whose parts are drawn and judged by a recipe without training."""
    write_tiny_recipe(folder / "tiny.recipe", view=View(SIDE, SIDE, colour=False, reference_size=(64, 64)))
    settings = STATION.format(takt_ms=takt_ms, root=ROOT, port=port, consumers=json.dumps(list(consumers)))
    (folder / "station.yaml").write_text(settings)
    return Process(["-m", "agent", "run", str(folder / "station.yaml")], folder / "agent.log")


def mes_process(folder: Path, port: int, consumer: str = "mes") -> Process:
    """Return a subscriber that stores what comes in `{consumer}.sqlite`."""
    store = folder / f"{consumer}.sqlite"
    arguments = ["run", ROOT, "--consumer", consumer, "--store", str(store), "--port", str(port)]
    return Process(["-m", "taktsight_subscribe", *arguments], folder / f"{consumer}.log")


@dataclass(frozen=True, slots=True)
class Balance:
    """What the station stored against what the MES has."""

    stored: int  # verdicts that the station's archive lists: the outbox had them before
    received: int  # different verdicts at the MES
    lost: int  # stored, not received
    holes: int  # seqs between the first and the last of an epoch that the MES has not
    missing_triggers: int  # parts of a run whose verdict nobody stored: the agent was killed with them under way


def balance(folder: Path, consumer: str = "mes") -> Balance:
    """Compare the station's archive with the subscriber's database."""
    stored = {(message["epoch"], message["seq"]) for message in archived(folder / "archive")}
    with sqlite3.connect(folder / f"{consumer}.sqlite") as database:
        rows = database.execute("SELECT epoch, seq, run, trigger FROM verdict").fetchall()
    received = {(epoch, seq) for epoch, seq, _, _ in rows}
    epochs = {epoch: [seq for other, seq in received if other == epoch] for epoch, _ in received}
    triggers: dict[str, set[int]] = {}
    for _, _, run, trigger in rows:
        triggers.setdefault(run, set()).add(trigger)
    assert max(Counter((run, trigger) for _, _, run, trigger in rows).values(), default=0) <= 1
    return Balance(
        stored=len(stored),
        received=len(received),
        lost=len(stored - received),
        holes=sum(max(seqs) - len(seqs) for seqs in epochs.values()),
        missing_triggers=sum(max(seen) - len(seen) for seen in triggers.values()),
    )
