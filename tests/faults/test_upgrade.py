"""A station's folder as an earlier version left it, with everything in it that outlives the agent: nothing is lost.

`earlier_station.tar.gz` was written by commit 7da6c34 (recipes of format 1, no shared memory, one process): two recipes
added, both activated, two runs of 12 and 8 parts without a broker, one rollback between them. No picture is in it, and
the path of the station's recipe was changed to /etc/taktsight.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from broker import Mosquitto, wait_until
from click.testing import CliRunner
from mes import Mes
from plant import Process

from agent.__main__ import commands
from agent.audit import NOTHING, AuditLog
from agent.config import read_station
from agent.outbox.folder import kept_rows
from agent.recipes.store import RecipeStore
from agent.shift.report import write_shift_report
from calibration.recipe_file import canonical, sha256

LEFT = Path(__file__).with_name("earlier_station.tar.gz")
PARTS, LINES = 20, 9  # of the trail: 4 changes of the recipe, a rollback, start and stop of each run
TOPIC = "a/b/c/d/cell7"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with tarfile.open(LEFT) as left:
        left.extractall(tmp_path, filter="data")
    choice = tmp_path / "state" / "recipes" / "active.json"
    fields = json.loads(choice.read_text())
    del fields["sha256"]
    fields["instead_of"] = str(tmp_path / "own.recipe")
    choice.write_bytes(canonical({**fields, "sha256": sha256(canonical(fields))}))
    return tmp_path


def typed(*words: object) -> str:
    done = CliRunner().invoke(commands, [str(word) for word in words])
    assert done.exit_code == 0, done.exception
    return " ".join(done.output.split())


def test_what_an_earlier_version_left_is_read_whole(folder: Path) -> None:
    station = read_station(folder / "station.yaml")
    rows = list(kept_rows(station.outbox.folder))
    assert [(row.state, row.seq, row.intact) for row in rows] == [("waiting", seq, True) for seq in range(1, PARTS + 1)]
    assert "20 messages; waiting: 20 for mes" in typed("outbox", folder / "station.yaml")
    chain = AuditLog(station.outbox.folder).verify()
    assert (chain.lines, chain.first, chain.torn_bytes) == (LINES, NOTHING, 0)
    store = RecipeStore(station.recipes.folder, station.recipes.trust, station.recipes.recipe)
    assert [(one.name, one.trouble) for one in store.listed()] == [("one", ""), ("two", "")]
    assert store.current()[0] == "one"
    assert "ok to judge: one: flange" in typed("recipes", "verify", folder / "station.yaml")
    assert write_shift_report(station.archive.folder, folder / "report.html").parts == PARTS


@pytest.mark.broker
def test_this_version_delivers_it_and_goes_on_in_the_same_epoch(folder: Path, tmp_path: Path) -> None:
    (place := tmp_path / "broker").mkdir()
    broker = Mosquitto(place).start()
    left = list(kept_rows(folder / "state" / "outbox"))
    mes = Mes(broker.port, TOPIC)
    settings = folder / "station.yaml"
    settings.write_text(settings.read_text().replace("port: 1,", f"port: {broker.port},") + "health: {port: 0}\n")
    agent = Process(["-m", "agent", "run", str(settings), "--count", "5"], folder / "agent.log")
    try:
        agent.start()
        wait_until(lambda: len(mes.stored) == PARTS + 5, 60.0)
        wait_until(lambda: not agent.is_running, 60.0)
    finally:
        agent.kill()
        mes.go()
        broker.kill()
    assert mes.seqs == list(range(1, PARTS + 6))
    assert {epoch for epoch, _ in mes.stored} == {left[0].epoch}
    for row in left:
        assert mes.stored[row.epoch, row.seq] == json.loads(row.payload)
    assert list(kept_rows(folder / "state" / "outbox")) == []
    lines = list(AuditLog(folder / "state" / "outbox").lines())
    assert [line["what"] for line in lines[LINES:]] == ["agent start", "agent stop"]
    assert AuditLog(folder / "state" / "outbox").verify().lines == LINES + 2
