"""What `taktsight-agent run` says at its end, and how it exits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from recipes import write_tiny_station

from agent import __main__ as command
from agent.between.publish_process import Ended
from agent.errors import StorageError
from agent.line.tally import Tally
from agent.publishing.publisher import Undelivered
from calibration.errors import InputError


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Return a function that ends a run with so many verdicts lost and returns what was printed."""
    write_tiny_station(tmp_path, "archive: {folder: archive}")
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    monkeypatch.setattr(command, "log_to_journal", lambda **_: None)

    def ended_with(lost: int) -> str:
        origin = SimpleNamespace(recipe="tiny", engine="onnxruntime f32")
        inspection = SimpleNamespace(origin=origin, run=lambda _: (Tally(), Ended(Undelivered(0, 0), lost)))
        monkeypatch.setattr(command, "Inspection", lambda *_: inspection)
        command.run_command_line.callback(tmp_path / "station.yaml", 2)
        return capsys.readouterr().out

    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "verdicts.jsonl").write_text("")
    return ended_with


def refused(*_: object, **__: object) -> None:
    raise InputError("archive/report.html: report not written (No space left on device)")


def test_verdicts_that_are_lost_decide_the_exit_code_whatever_becomes_of_the_report(run, monkeypatch) -> None:
    monkeypatch.setattr(command, "write_shift_report", refused)
    with pytest.raises(StorageError, match="5 verdicts could not be stored and are lost") as raised:
        run(lost=5)
    assert raised.value.exit_code == 13


def test_a_report_that_cannot_be_written_is_a_note(run, monkeypatch) -> None:
    monkeypatch.setattr(command, "write_shift_report", refused)
    assert "note: no report: archive/report.html: report not written (No space" in run(lost=0)


def test_a_report_is_made_where_only_days_that_are_over_are_archived(run, tmp_path, monkeypatch) -> None:
    (tmp_path / "archive" / "verdicts.jsonl").rename(tmp_path / "archive" / "verdicts-2025-03-04.jsonl")
    monkeypatch.setattr(command, "write_shift_report", lambda *_, **__: None)
    assert "report: " in run(lost=0)
