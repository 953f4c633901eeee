"""What `taktsight-agent outbox` shows to a person."""

import json
import tracemalloc
from pathlib import Path

import pytest
from click.testing import CliRunner

from agent.__main__ import commands
from agent.errors import InUse
from agent.outbox.database import FILE
from agent.outbox.outbox import Outbox, OutboxSettings
from calibration.errors import InputError

STATION = """
station: cell7
recipe: own.recipe
recipes: {unsigned: allow}
takt_ms: 500
camera: {kind: simulated}
mqtt: {topic: a/b/c/d/cell7, consumers: [mes, erp]}
outbox: {folder: outbox, reserve_mb: 0}
"""


@pytest.fixture
def outbox(tmp_path: Path):
    (tmp_path / "station.yaml").write_text(STATION)
    opened = Outbox(OutboxSettings(tmp_path / "outbox", reserve_mb=0.0), "cell7")
    opened.set_consumers(["mes", "erp"])
    opened.store([({"station": "cell7", "trigger": number, "heatmap": None}, None) for number in (1, 2, 3)])
    yield opened
    opened.close()


def shown(folder: Path, *more: str):
    return CliRunner().invoke(commands, ["outbox", str(folder / "station.yaml"), *more])


def test_it_says_for_whom_verdicts_wait_also_beside_a_running_agent(outbox: Outbox, tmp_path: Path) -> None:
    beside = shown(tmp_path)
    assert beside.exit_code == 0
    assert "in use by the agent that runs; waiting: 3 for erp, 3 for mes" in " ".join(beside.output.split())
    assert isinstance(shown(tmp_path, "--export", str(tmp_path / "kept.jsonl")).exception, InUse)
    outbox.read(0, 3)
    outbox.acknowledge("erp", 2)
    outbox.close()
    assert "3 messages; waiting: 1 for erp, 3 for mes" in " ".join(shown(tmp_path).output.split())


def test_a_database_that_cannot_be_read_is_told_and_does_not_hide_the_rest(outbox: Outbox, tmp_path: Path) -> None:
    (tmp_path / "outbox" / f"{FILE}-wal").unlink()
    (tmp_path / "outbox" / FILE).write_bytes(b"no database at all" * 300)
    assert "what is waiting cannot be read: file is not a database" in " ".join(shown(tmp_path).output.split())


def test_a_large_outbox_is_exported_one_message_at_a_time(outbox: Outbox, tmp_path: Path) -> None:
    for number in range(4, 204):
        outbox.store([({"station": "cell7", "trigger": number, "heatmap": None, "detail": "x" * 50_000}, None)])
    outbox.close()
    shown(tmp_path)  # imports
    export = tmp_path / "kept.jsonl"
    for more in ((), ("--export", str(export))):
        tracemalloc.start()
        assert "203 messages" in shown(tmp_path, *more).output
        _, most_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most_bytes < 3_000_000  # of 10 MB
    lines = [json.loads(line) for line in export.read_text(encoding="utf-8").splitlines()]
    assert [line["seq"] for line in lines] == list(range(1, 204))
    assert all(line["intact"] for line in lines)


def test_an_export_that_cannot_be_written_leaves_the_outbox_free(outbox: Outbox, tmp_path: Path) -> None:
    outbox.close()
    refused = shown(tmp_path, "--export", str(tmp_path / "absent" / "kept.jsonl"))
    assert isinstance(refused.exception, InputError)
    assert "3 messages" in " ".join(shown(tmp_path).output.split())
