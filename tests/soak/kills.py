"""What is killed how often, and what of it is lost: agent, broker and MES as processes, at 50 verdicts a second.

    python tests/soak/kills.py [--rounds 20] [--out benchmarks/results/kills.csv]

`stored` are the verdicts that the station's archive lists (the outbox had them on the disk before); `lost` those of
them that the MES has not in the end; `twice` rows of the MES with the same key; `copies` what travelled more than once.
`no consumers` is the weaker mode without application acknowledgements: its losses are what the mode does not promise.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from broker import Consumer, Mosquitto, wait_until
from machine import describe
from plant import ROOT, Process, balance, mes_process, station_process

HEADINGS = ("what happens", "agent", "broker", "mes", "stored", "received", "lost", "holes", "twice", "copies", "s")
PATIENCE_S = 60.0


@dataclass
class Plant:
    """Everything that can be killed."""

    folder: Path
    agent: Process
    mes: Process
    broker: Mosquitto
    broker_kills: int = 0

    def restart_broker(self) -> None:
        """Kill the broker, and start it again."""
        self.broker.kill()
        self.broker_kills += 1
        time.sleep(0.3)
        self.broker.start()

    def count(self) -> int:
        """Return how many verdicts the MES has."""
        path = self.folder / "mes.sqlite"
        if not path.exists():
            return 0
        with sqlite3.connect(path, timeout=5) as database:
            try:
                return int(database.execute("SELECT count(*) FROM verdict").fetchone()[0])
            except sqlite3.OperationalError:
                return 0

    def wait_for_more(self, number: int = 5) -> None:
        """Return once so many new verdicts reached the MES."""
        wanted = self.count() + number
        wait_until(lambda: self.count() >= wanted, PATIENCE_S)


def kill_agent(plant: Plant, dice: random.Random) -> None:
    """Kill the agent in mid-stream."""
    plant.wait_for_more()
    time.sleep(dice.uniform(0, 0.4))
    plant.agent.kill()
    plant.agent.start()


def kill_mes(plant: Plant, dice: random.Random) -> None:
    """Kill the MES in mid-stream."""
    plant.wait_for_more()
    time.sleep(dice.uniform(0, 0.4))
    plant.mes.kill()
    plant.mes.start()


def kill_broker_with_the_mes_away(plant: Plant, dice: random.Random) -> None:
    """Kill the broker while it holds messages for a MES that is away."""
    plant.wait_for_more()
    plant.mes.kill()
    time.sleep(dice.uniform(0.3, 1.0))
    plant.restart_broker()
    plant.mes.start()


def kill_all(plant: Plant, dice: random.Random) -> None:
    """Kill one after the other, without waiting for any to recover."""
    plant.wait_for_more(1)
    kills: list[Callable[[], None]] = [
        lambda: (plant.agent.kill(), plant.agent.start())[0],
        lambda: (plant.mes.kill(), plant.mes.start())[0],
        plant.restart_broker,
    ]
    dice.shuffle(kills)
    for kill in kills:
        kill()
        time.sleep(dice.uniform(0, 0.5))


def stay_away(plant: Plant, dice: random.Random) -> None:
    """Let the MES be away for longer than the broker's queue lasts (100 messages)."""
    plant.wait_for_more()
    plant.mes.kill()
    time.sleep(8.0 + dice.uniform(0, 1))
    plant.mes.start()


SCENARIOS: tuple[tuple[str, Callable[[Plant, random.Random], None], float], ...] = (
    ("agent killed under load", kill_agent, 1.0),
    ("MES killed under load", kill_mes, 1.0),
    ("broker killed while the MES is away", kill_broker_with_the_mes_away, 0.5),
    ("all three killed in turn", kill_all, 0.5),
    ("MES away past the broker's queue limit", stay_away, 0.2),
)


def main() -> int:
    """Run every scenario with consumers, then without; 0 if nothing was lost with consumers."""
    arguments = parsed()
    print(describe())
    rows = []
    for consumers in (("mes",), ()):
        for name, event, share in SCENARIOS:
            rounds = max(2, round(arguments.rounds * share))
            label = name if consumers else f"{name}, no consumers"
            rows.append((label, *outcome(event, rounds, consumers, arguments.seed)))
            print(
                "  ".join(f"{heading} {value}" for heading, value in zip(HEADINGS, rows[-1], strict=True)), flush=True
            )
    if arguments.out is not None:
        with arguments.out.open("w", newline="") as file:
            csv.writer(file).writerows([HEADINGS, *rows])
    with_consumers = rows[: len(SCENARIOS)]
    return int(any(row[6] or row[7] or row[8] for row in with_consumers))


def outcome(
    event: Callable[[Plant, random.Random], None], rounds: int, consumers: tuple[str, ...], seed: int
) -> tuple[int, ...]:
    """Return the figures of one scenario."""
    dice, began_s = random.Random(seed), time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "broker").mkdir()
        broker = Mosquitto(folder / "broker", lines=("set_tcp_nodelay true", "max_queued_messages 100")).start()
        agent = station_process(folder, broker.port, consumers=consumers)
        plant = Plant(folder, agent, mes_process(folder, broker.port), broker)
        listener = Consumer(broker.port, f"{ROOT}/verdict")
        plant.mes.start()
        plant.agent.start()
        try:
            for _ in range(rounds):
                event(plant, dice)
            plant.wait_for_more()
            plant.agent.stop()
            settle(plant)
            found = balance(folder)
            seen = Counter(key(item.payload) for item in listener.on("/verdict"))
            twice = duplicates(folder)
        finally:
            for process in (plant.agent, plant.mes):
                process.stop()
            listener.stop()
            broker.stop()
    copies = sum(seen.values()) - len(seen)
    kills = (plant.agent.kills, plant.broker_kills, plant.mes.kills)
    figures = (found.stored, found.received, found.lost, found.holes, twice, copies)
    return (*kills, *figures, round(time.monotonic() - began_s))


def settle(plant: Plant) -> None:
    """Wait until the MES has all, or nothing more has come for 10 s."""
    last, since_s = -1, time.monotonic()
    while balance(plant.folder).lost and time.monotonic() - since_s < 10.0:
        if (count := plant.count()) != last:
            last, since_s = count, time.monotonic()
        time.sleep(0.2)


def key(payload: bytes) -> tuple[str, int]:
    """Return epoch and seq."""
    message = json.loads(payload)
    return message["epoch"], message["seq"]


def duplicates(folder: Path) -> int:
    """Return how many rows of the MES have a key that another one has."""
    with sqlite3.connect(folder / "mes.sqlite") as database:
        rows = database.execute(
            "SELECT count(*) FROM verdict GROUP BY station, epoch, seq HAVING count(*) > 1"
        ).fetchall()
    return sum(count - 1 for (count,) in rows)


def parsed() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="kills of the agent; the others in proportion")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="CSV file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
