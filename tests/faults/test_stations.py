"""Several cameras under one parent: each line goes on whatever becomes of the others. Children are scripts here."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from agent.between.stations import Patience, Stations
from agent.notify import Supervisor
from calibration.preprocess import View
from tests import verdicts
from tests.broker import wait_until
from tests.plant import Process
from tests.recipes import SIDE, write_tiny_recipe

CHILD = """
import os, signal, socket, sys, time
from pathlib import Path

lives = Path(sys.argv[0] + ".lives")
with lives.open("a") as file:
    file.write(f"{os.getpid()}\\n")
life = len(lives.read_text().splitlines())

def tell(text):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        out.sendto(text.encode(), "\\0" + os.environ["NOTIFY_SOCKET"][1:])

def go_on(seconds=60):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    tell("READY=1")
    for _ in range(int(seconds * 50)):
        tell("WATCHDOG=1")
        time.sleep(0.02)
"""
QUICK = Patience(start_again_s=(0.05,), abort_s=1.0)


class Parent:
    """Stations whose programs are scripts, run in a thread, and what their service manager is told."""

    def __init__(self, folder: Path, scripts: dict[str, str], patience: Patience) -> None:
        self._folder = folder
        self._manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._manager.bind(str(folder / "manager"))
        self._manager.setblocking(False)
        self._told = ""
        paths = {name: folder / f"{name}.py" for name in scripts}
        for name, script in scripts.items():
            paths[name].write_text(CHILD + script)
        supervisor = Supervisor(str(folder / "manager"))
        self.stations = Stations(paths, supervisor, count=7, program=(sys.executable,), patience=patience)
        self.code: int | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.code = self.stations.run()

    def lives(self, name: str) -> list[int]:
        """Return the process ids of a child's lives."""
        path = self._folder / f"{name}.py.lives"
        return [int(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def told(self) -> str:
        """What the service manager was told so far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self._told += self._manager.recv(65536).decode() + "\n"
        return self._told

    def join(self) -> int:
        """Return the exit code."""
        self._thread.join(20)
        assert self.code is not None, "it does not end"
        return self.code

    def close(self) -> None:
        self.stations.stop()
        self._thread.join(20)
        self._manager.close()


@pytest.fixture
def parent(tmp_path):
    """Return a function that runs scripts under one parent; all are ended in the end."""
    made = []

    def make(patience=QUICK, **scripts):
        made.append(Parent(tmp_path, scripts, patience))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_all_end_well_and_what_they_print_has_their_names(parent, capfd):
    one = parent(top="tell('READY=1'); print(sys.argv[1:]); print('half', end='')", side="tell('READY=1')")
    assert one.join() == 0
    assert capfd.readouterr().out == "top  | ['--count', '7']\ntop  | half\n"


def test_it_is_ready_when_all_are(parent):
    one = parent(top="go_on()", side="time.sleep(0.6); go_on()")
    wait_until(lambda: one.stations.children["top"].is_ready)
    time.sleep(0.2)
    assert "READY=1" not in one.told
    wait_until(lambda: "READY=1" in one.told)
    assert one.stations.children["side"].is_ready


def test_one_that_a_person_must_mend_at_the_start_ends_all_with_its_code(parent):
    one = parent(top="go_on()", side="time.sleep(0.3); sys.exit(5)")
    assert one.join() == 5
    assert len(one.lives("side")) == 1
    assert "READY=1" not in one.told


def test_a_camera_that_is_not_there_yet_is_tried_again_while_the_other_inspects(parent):
    one = parent(top="go_on()", side="sys.exit(8) if life < 4 else go_on()")
    wait_until(lambda: one.stations.children["side"].is_ready)
    assert len(one.lives("side")) == 4
    assert len(one.lives("top")) == 1
    assert "READY=1" in one.told
    one.close()
    assert one.code == 0


def test_cameras_that_are_all_not_there_are_no_start(parent):
    one = parent(top="sys.exit(8)", side="sys.exit(8)")
    assert one.join() == 8
    assert "READY=1" not in one.told


def test_one_that_is_killed_is_started_again_and_the_other_does_not_notice(parent):
    one = parent(top="go_on()", side="go_on()")
    for life in (1, 2, 3):
        wait_until(lambda life=life: len(one.lives("side")) == life and one.stations.children["side"].is_ready)
        os.kill(one.lives("side")[-1], signal.SIGKILL)
        wait_until(lambda life=life: len(one.lives("side")) == life + 1)
    assert len(one.lives("top")) == 1
    assert one.stations.children["side"].restarts == 3


def test_settings_that_were_changed_while_it_ran_are_that_ones_end_alone(parent):
    one = parent(top="go_on()", side="tell('READY=1'); time.sleep(0.2); sys.exit(8 if life == 1 else 4)")
    wait_until(lambda: one.stations.children["side"].ended == 4)
    time.sleep(0.3)
    assert len(one.lives("side")) == 2
    assert one.stations.children["top"].process is not None
    assert "STOPPING=1" not in one.told
    one.stations.stop()
    assert one.join() == 4


def test_one_that_hangs_is_ended_and_started_again(parent):
    hangs = "tell('READY=1'); signal.signal(signal.SIGABRT, signal.SIG_IGN); time.sleep(60)"
    one = parent(
        Patience((0.05,), abort_s=0.2, watchdog_s=0.5), top="go_on()", side=f"{hangs} if life == 1 else go_on()"
    )
    wait_until(lambda: len(one.lives("side")) == 2 and one.stations.children["side"].is_ready)
    assert len(one.lives("top")) == 1
    assert not psutil.pid_exists(one.lives("side")[0])


def test_the_end_is_passed_on_and_waited_for(parent):
    slowly = "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), print('settled'), sys.exit(0)))"
    one = parent(top="go_on()", side=f"{slowly}; tell('READY=1'); time.sleep(60)")
    wait_until(lambda: "READY=1" in one.told)
    one.stations.stop()
    assert one.join() == 0
    assert not any(psutil.pid_exists(process) for name in ("top", "side") for process in one.lives(name))
    assert "STOPPING=1" in one.told


CELL = """
station: cell7
recipe: tiny.recipe
recipes: {unsigned: allow}
takt_ms: 100
engine: {kind: onnxruntime, threads: 1}
archive: {folder: archive, pictures: none}
health: {port: 0}
cameras:
  top: {camera: {kind: simulated, width_px: 64, height_px: 64, seed: 1, lost: [3]}}
  side: {takt_ms: 150, camera: {kind: simulated, width_px: 64, height_px: 64, seed: 2}}
"""


@pytest.fixture
def cell(tmp_path):
    """Return two real stations over simulated cameras as one process, started."""
    write_tiny_recipe(tmp_path / "tiny.recipe", view=View(SIDE, SIDE, colour=False, reference_size=(64, 64)))
    (tmp_path / "cell.yaml").write_text(CELL)
    process = Process(["-m", "agent", "run", str(tmp_path / "cell.yaml")], tmp_path / "log")
    process.start()
    yield process
    process.stop()


def archived(folder: Path, name: str) -> list[dict]:
    """Return the verdicts of one station, as far as they are written."""
    return verdicts.archived(folder / "archive" / name)


def child_of(process: Process, name: str) -> psutil.Process | None:
    """Return the inspect process of one camera."""
    for child in psutil.Process(process.process_id).children():
        with contextlib.suppress(psutil.Error):
            if child.cmdline()[-1].endswith(f"cell.yaml/{name}"):
                return child
    return None


def test_of_two_stations_one_that_is_killed_costs_the_other_no_verdict(cell, tmp_path):
    wait_until(lambda: min(len(archived(tmp_path, name)) for name in ("top", "side")) > 5, 60)
    killed = child_of(cell, "side")
    killed.kill()
    before = len({one["run"] for one in archived(tmp_path, "side")})
    wait_until(lambda: len({one["run"] for one in archived(tmp_path, "side")}) == before + 1, 60)
    cell.stop(60)
    for name, runs in (("top", 1), ("side", 2)):
        verdicts = archived(tmp_path, name)
        assert {one["station"] for one in verdicts} == {f"cell7-{name}"}
        assert len({one["run"] for one in verdicts}) == runs
        assert max(Counter((one["epoch"], one["seq"]) for one in verdicts).values()) == 1
        for run in {one["run"] for one in verdicts}:  # the killed one's, too: each part has its verdict, once
            triggers = [one["trigger"] for one in verdicts if one["run"] == run]
            assert triggers == list(range(1, len(triggers) + 1))
    assert "side | " in cell.output
    assert cell.output.count("killed by SIGKILL") == 1


def test_stations_end_by_themselves_when_their_parent_is_killed(cell, tmp_path):
    wait_until(lambda: min(len(archived(tmp_path, name)) for name in ("top", "side")) > 2, 60)
    children = psutil.Process(cell.process_id).children(recursive=True)
    assert len(children) == 4
    cell.kill()
    _, left = psutil.wait_procs(children, 30)
    assert left == []
