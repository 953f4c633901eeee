"""One run at a time, and no process that outlives the run that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from calibration.errors import InputError
from trainer import race_heat
from trainer.alone import alone, lock_of
from trainer.race_process import run_heat

PROJECT = Path(__file__).resolve().parents[2]
HEAT = """
import sys, time
from trainer.race_process import end_with_race
end_with_race()
with open(sys.argv[1], "w") as told:
    print("running", file=told, flush=True)
    time.sleep(20)
    print("outlived the race", file=told, flush=True)
"""
RACE = f"import sys; from trainer.race_process import run_heat; run_heat([sys.executable, '-c', {HEAT!r}, sys.argv[1]])"


def test_a_lock_keeps_others_out_while_it_is_held_and_leaves_nothing(tmp_path):
    lock = lock_of(tmp_path / "flange.recipe")
    assert lock.name.startswith(".")
    with alone(lock, "another fit makes flange.recipe", "wait"):
        with pytest.raises(InputError, match=rf"^another fit makes flange\.recipe \(process {os.getpid()}\): wait$"):
            alone(lock, "another fit makes flange.recipe", "wait").__enter__()
        assert lock.exists()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_leaves_keeps_nobody_out(tmp_path):
    lock = lock_of(tmp_path / "flange.recipe")
    lock.write_text("999999999")
    with alone(lock, "another fit", "wait"):
        assert lock.read_text() == str(os.getpid())
    assert not lock.exists()


def test_a_lock_that_its_holder_took_away_meanwhile_is_asked_for_again(tmp_path, monkeypatch):
    lock, opened = tmp_path / ".lock", []
    real = os.open

    def late(path, *rest):
        handle = real(path, *rest)
        opened.append(handle)
        if len(opened) == 1:
            lock.unlink()  # between the opening and the locking
        return handle

    monkeypatch.setattr(os, "open", late)
    with alone(lock, "another race", "wait"):
        assert len(opened) == 2 and lock.exists()


def test_a_place_where_no_lock_can_be_made_is_named(tmp_path):
    with pytest.raises(InputError, match=r"\.lock: No such file or directory: give a folder"):
        alone(tmp_path / "gone" / ".lock", "another race", "wait").__enter__()


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_a_race_that_is_killed_leaves_no_heat_running(tmp_path, sign):
    os.mkfifo(tmp_path / "told")
    race = subprocess.Popen([sys.executable, "-c", RACE, str(tmp_path / "told")], cwd=PROJECT)
    with (tmp_path / "told").open() as told:  # the heat alone holds the other end
        assert told.readline() == "running\n"
        race.send_signal(sign)
        assert told.read() == ""
    assert race.wait() == -sign


def test_what_a_heat_prints_is_in_its_log(tmp_path):
    run_heat([sys.executable, "-c", "import sys; print('said'); print(sys.stdin.isatty())", str(tmp_path / "a.json")])
    assert (tmp_path / "a.log").read_text() == "said\nFalse\n"


def test_every_heat_ends_with_its_race(monkeypatch, tmp_path):
    told = []
    monkeypatch.setattr(race_heat, "end_with_race", lambda: told.append("watching"))
    monkeypatch.setattr(sys, "argv", ["race_heat", str(tmp_path / "none.json")])
    with pytest.raises(FileNotFoundError):
        race_heat.main()
    assert told == ["watching"]
