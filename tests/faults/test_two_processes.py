"""The inspect and the publish process, each killed, stopped and hurried while parts go by: one verdict per trigger."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
from broker import Mosquitto, wait_until
from plant import mes_process, station_process
from verdicts import archived

pytestmark = pytest.mark.broker

TAKT_MS = 40


class Plant:
    """A station, a broker and a MES; the station's gate writes down what it is told."""

    def __init__(self, folder, *, camera="", takt_ms=TAKT_MS, environment=None, **settings):
        self.folder = folder
        (folder / "broker").mkdir()
        self.broker = Mosquitto(folder / "broker", lines=("set_tcp_nodelay true",)).start()
        self.agent = station_process(folder, self.broker.port, takt_ms=takt_ms)
        self.agent.environment = environment
        path = folder / "station.yaml"
        text = path.read_text().replace("lost: [3]", camera or "lost: [3]").replace("pictures: none", "pictures: all")
        extra = {"output": {"kind": "file", "file": "gate"}, **settings}
        path.write_text(text + "".join(f"{key}: {json.dumps(value)}\n" for key, value in extra.items()))
        self.mes = mes_process(folder, self.broker.port)
        self.mes.start()
        self.agent.start()
        wait_until(lambda: len(self.verdicts()) > 3, 30)

    def verdicts(self):
        """Return what the MES has, as (run, trigger, message), in the order of the station."""
        path = self.folder / "mes.sqlite"
        if not path.exists():
            return []
        with sqlite3.connect(path, timeout=5) as database:
            try:
                rows = database.execute("SELECT run, trigger, message FROM verdict ORDER BY epoch, seq").fetchall()
            except sqlite3.OperationalError:
                return []
        return [(run, trigger, json.loads(message)) for run, trigger, message in rows]

    def publish_process(self):
        """Return the station's child, once there is one."""
        wait_until(lambda: self._child() is not None, 30)
        return self._child() or self.publish_process()

    def _child(self):
        for child in psutil.Process(self.agent.process_id).children():
            with contextlib.suppress(psutil.Error):  # just dead
                if "agent.publishing.process" in child.cmdline():
                    return child
        return None

    def gate(self):
        """Return what the gate was told, as (trigger, action, ms after the trigger)."""
        lines = (self.folder / "gate").read_text().splitlines()
        return [(int(trigger), action, float(ms)) for trigger, action, ms in map(str.split, lines)]

    def settle(self):
        """End the agent in peace and return all verdicts once the MES has them."""
        self.agent.stop(120.0)
        stored = archived(self.folder / "archive")
        found = Counter((one["run"], one["trigger"]) for one in stored)
        assert set(found.values()) == {1}
        ends = {run: max(trigger for other, trigger in found if other == run) for run, _ in found}
        assert set(found) == {(run, trigger) for run, last in ends.items() for trigger in range(1, last + 1)}
        wait_until(lambda: len(self.verdicts()) >= len({(one["epoch"], one["seq"]) for one in stored}), 30)
        return self.verdicts()

    def close(self):
        for process in (self.agent, self.mes):
            process.stop()
        self.broker.stop()


@pytest.fixture
def plant(tmp_path):
    made = []

    def make(**settings):
        made.append(Plant(tmp_path, **settings))
        return made[0]

    yield make
    for one in made:
        one.close()


def balance(verdicts):
    """Check that each run has each of its triggers once, and return the verdicts by (run, trigger)."""
    found = {(run, trigger): message for run, trigger, message in verdicts}
    assert len(found) == len(verdicts)
    for run in {run for run, _ in found}:
        triggers = sorted(trigger for other, trigger in found if other == run)
        assert triggers == list(range(1, triggers[-1] + 1))
    return found


def test_a_publish_process_that_is_killed_again_and_again_costs_no_verdict_and_none_comes_twice(plant, request):
    station = plant()
    dice = random.Random(3)
    for _ in range(20 if request.config.getoption("--long") else 5):
        before = len(station.verdicts())
        wait_until(lambda before=before: len(station.verdicts()) > before + 5, 30)
        time.sleep(dice.uniform(0, 0.1))
        station.publish_process().kill()
    assert station.publish_process().is_running()
    found = balance(station.settle())
    assert len({run for run, _ in found}) == 1  # the inspection went on all the time
    moments_ms = [message["monotonicMs"] for message in found.values()]  # so its clock did, too
    assert moments_ms[0] >= 0
    assert all(later_ms > earlier_ms - TAKT_MS for earlier_ms, later_ms in pairwise(moments_ms))
    assert len(found) == len(station.gate())
    for (_, trigger), message in found.items():
        assert (trigger, message["lineAction"]) in [(told, action) for told, action, _ in station.gate()]


def test_parts_under_way_when_the_inspect_process_is_killed_get_their_no_verdict(plant):
    camera = "late: " + json.dumps(list(range(1, 2000))) + ", late_ms: 150"  # so that one or two are under way
    station = plant(camera=camera, takt_ms=100, deadline_ms=380)
    for _ in range(3):
        before = len(station.verdicts())
        wait_until(lambda before=before: len(station.verdicts()) > before + 5, 30)
        station.agent.kill()
        station.agent.start()
    wait_until(lambda: len({run for run, _, _ in station.verdicts()}) == 4, 30)
    found = balance(station.settle())
    reasons = [message["reason"] for message in found.values()]
    assert 3 <= reasons.count("crashed") <= 12
    ends = {run: max(trigger for other, trigger in found if other == run) for run, _ in found}
    assert sum(found[run, last]["reason"] == "crashed" for run, last in ends.items()) == 3
    assert {found[key]["outcome"] for key in found if found[key]["reason"] == "crashed"} == {"no_verdict"}


def test_a_publish_process_that_stands_still_does_not_make_one_part_late(plant):
    station = plant(takt_ms=20)
    child = station.publish_process()
    child.send_signal(signal.SIGSTOP)
    before = len(station.gate())
    wait_until(lambda: len(station.gate()) > before + 100, 30)
    child.send_signal(signal.SIGCONT)
    found = balance(station.settle())
    assert len(found) == len(station.gate())
    told = {trigger: action for trigger, action, _ in station.gate()}
    assert all(told[trigger] == message["lineAction"] for (_, trigger), message in found.items())


def test_a_signal_for_the_whole_group_as_systemd_sends_it_loses_nothing(plant):
    station = plant()
    for process in (station.publish_process(), psutil.Process(station.agent.process_id)):
        process.terminate()
    wait_until(lambda: not station.agent.is_running, 30)
    found = balance(station.settle())
    assert len(found) == len(station.gate())
    assert "stopping" not in {message["reason"] for message in found.values()}


def test_a_station_whose_outbox_is_in_use_does_not_start(plant):
    station = plant()
    command = [*station.agent.command, "--count", "1"]
    second = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert second.returncode == 13
    assert "used by another process" in second.stderr


@pytest.mark.skipif(shutil.which("faketime") is None, reason="needs faketime")
def test_a_wall_clock_that_is_set_changes_no_deadline_and_no_order(plant, tmp_path):
    clock = tmp_path / "clock"
    clock.write_text("+0")
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    environment = {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    station = plant(environment=environment, takt_ms=100)
    for change in ("+3600", "-3600", "+365d", "+0"):
        before = len(station.verdicts())
        clock.write_text(change)
        wait_until(lambda before=before: len(station.verdicts()) > before + 20, 30)
    verdicts = station.settle()
    found = balance(verdicts)
    assert [trigger for _, trigger, _ in verdicts] == sorted(trigger for _, trigger, _ in verdicts)
    steps = [round(message["clockStepMs"] / 1e3) for message in found.values() if message["clockStepMs"]]
    assert len(steps) >= 4
    assert any(step > 3e7 for step in steps)
    monotonic = [message["monotonicMs"] for _, _, message in verdicts]
    assert monotonic == sorted(monotonic)
    after = [place for place, message in enumerate(found.values()) if message["clockStepMs"]]
    scored = [place for place, message in enumerate(found.values()) if message["reason"] == "score"]
    assert all(any(step < place < step + 20 for place in scored) for step in after)
    assert max(message["latencyMs"] for message in found.values()) < 10_000
