import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner
from taktsight_subscribe import SettingsError, SqliteStore, Subscriber
from taktsight_subscribe.__main__ import commands
from taktsight_subscribe.broker import Broker
from taktsight_subscribe.console import header, line
from taktsight_subscribe.heatmaps import heatmap_file
from taktsight_subscribe.messages import Key, read_verdict
from taktsight_subscribe.store import Batch, Gap, Progress

from tests.broker import free_port
from tests.scripted_station import verdict_fields

NOW = datetime(2026, 11, 20, 10, tzinfo=UTC)
EPOCH = "0123456789ab"
PACKAGE = Path(__file__).resolve().parents[2] / "subscriber" / "taktsight_subscribe"


def invoke(*arguments):
    return CliRunner().invoke(commands, [str(argument) for argument in arguments])


def verdict(seq, **changes):
    return read_verdict(json.dumps(verdict_fields("cell7", EPOCH, seq, **changes)).encode(), NOW)


def test_the_package_works_alone_without_taktsight_numpy_or_psycopg(tmp_path):
    program = """
import sys
class Fence:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"agent", "calibration", "trainer", "numpy", "cv2", "torch", "rich", "psycopg"}:
            raise ImportError(name)
sys.meta_path.insert(0, Fence())
import taktsight_subscribe, taktsight_subscribe.__main__
from taktsight_subscribe import MissingPackage, PostgresStore
try:
    PostgresStore("postgresql://db/plant")
except MissingPackage as error:
    sys.exit(0 if "taktsight-subscribe[postgresql]" in str(error) else str(error))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_a_line_is_aligned_with_its_heading_and_cannot_steer_the_terminal():
    odd = verdict(123, partId="\x1b[2J", outcome="no_verdict", reason="late", detail="x" * 99, score=None)
    for text in (line(verdict(7)), line(odd)):
        assert "\x1b[2J" not in text
    assert header().index("outcome") == header().index("part") + 16
    assert len(line(odd)) < 190


def test_gaps_lists_what_is_lost_and_what_may_still_come(tmp_path):
    store = SqliteStore(tmp_path / "v.sqlite")
    store.open()
    store.commit(
        Batch(
            verdicts=[verdict(1), verdict(9)],
            new_gaps=[Gap("cell7", EPOCH, 2, 4, "the row was damaged", NOW)],
            progress=[Progress("cell7", EPOCH, "acme/cell7", 1, 4)],
        )
    )
    store.close()
    told = invoke("gaps", "--store", store.path)
    assert told.exit_code == 1
    assert [text.split()[2:6] for text in told.output.splitlines()] == [["2", "to", "4", "3"], ["5", "to", "8", "4"]]
    as_json = [json.loads(text) for text in invoke("gaps", "--store", store.path, "--json").output.splitlines()]
    assert [(gap["first"], gap["last"], gap["is_final"]) for gap in as_json] == [(2, 4, True), (5, 8, False)]


def test_gaps_of_a_whole_store_says_so_and_one_of_a_missing_file_makes_none(tmp_path):
    store = SqliteStore(tmp_path / "v.sqlite")
    store.open()
    store.close()
    assert (invoke("gaps", "--store", store.path).exit_code, invoke("gaps", "--store", store.path).output) == (
        0,
        "nothing is missing\n",
    )
    absent = invoke("gaps", "--store", tmp_path / "absent.sqlite")
    assert isinstance(absent.exception, SettingsError)
    assert not (tmp_path / "absent.sqlite").exists()


def test_gaps_takes_the_url_of_a_sqlite_file_too(tmp_path):
    store = SqliteStore(tmp_path / "v.sqlite")
    store.open()
    store.close()
    assert invoke("gaps", "--store", f"sqlite:///{tmp_path}/v.sqlite").output == "nothing is missing\n"
    absent = invoke("gaps", "--store", f"sqlite:///{tmp_path}/absent.sqlite")
    assert f"{tmp_path}/absent.sqlite is not there" in str(absent.exception)


def test_move_takes_a_station_from_another_topic_and_keeps_all_else(tmp_path):
    store = SqliteStore(tmp_path / "v.sqlite")
    store.open()
    was = [Progress("cell7", EPOCH, "acme/cell7", 1, 4), Progress("cell8", EPOCH, "acme/cell8", None, 9)]
    store.commit(Batch(progress=was))
    moved = invoke("move", "cell7", "acme/line4/cell7", "--store", store.path)
    assert (moved.exit_code, moved.output) == (0, "cell7: was at acme/cell7, is at acme/line4/cell7\n")
    assert [epoch.progress for epoch in store.epochs()] == [replace(was[0], root="acme/line4/cell7"), was[1]]
    store.close()
    assert "not in this store" in str(invoke("move", "cell1", "acme/cell1", "--store", store.path).exception)
    assert isinstance(invoke("move", "cell7", "acme/+", "--store", store.path).exception, SettingsError)
    assert isinstance(invoke("move", "cell7", "a/b", "--store", tmp_path / "absent").exception, SettingsError)
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("score", ["nan", "inf", "-inf", "high"])
def test_a_threshold_that_is_no_number_is_a_usage_error(score):
    refused = invoke("send", "acme/cell7", "threshold", "--score", score)
    assert refused.exit_code == 2
    assert "--score" in refused.output


@pytest.mark.parametrize("option", ["--timeout", "--heatmaps-mb"])
@pytest.mark.parametrize("number", ["nan", "inf", "-1"])
def test_a_time_or_a_size_that_is_none_is_a_usage_error(tmp_path, option, number):
    refused = invoke("run", "acme/cell7", "--store", str(tmp_path / "v.sqlite"), option, number)
    assert refused.exit_code == 2 and option in refused.output
    assert not list(tmp_path.iterdir())


def test_a_subscriber_with_a_folder_for_heatmaps_may_be_used_again(tmp_path):
    folder = tmp_path / "maps"
    mes = Subscriber("a/b", consumer="mes", store=SqliteStore(tmp_path / "v.sqlite"), heatmaps=folder, port=free_port())
    keys = [Key("cell7", EPOCH, seq) for seq in (1, 2)]
    for key in keys:
        with mes:
            mes._folder.put(key, b"picture")
        assert mes.heatmap(key) is not None
    assert mes._folder._total_bytes == 2 * len(b"picture")


@pytest.mark.parametrize(
    ("topic", "options", "why"),
    [
        ("acme/#", {}, "one \\+ per level"),
        ("acme//cell", {}, "empty level"),
        ("acme/a+", {}, "whole level"),
        ("$SYS/x", {}, "printable"),
        ("acme/cell7/verdict", {}, "leave out its last level"),
        ("acme/cell7", {"consumer": "m e s"}, "1 to 32"),
        ("acme/cell7", {"port": 0}, "port"),
        ("acme/cell7", {"protocol": 4}, "3.1.1"),
        ("acme/cell7", {"password": "x"}, "username"),
        ("acme/cell7", {"cert_file": "x"}, "ca_file"),
        ("acme/cell7", {"heatmaps": "x", "heatmaps_mb": 0}, "heatmaps_mb"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(topic, options, why):
    with pytest.raises(SettingsError, match=why):
        Subscriber(topic, **{"consumer": "mes", "store": SqliteStore("unused"), **options})


def test_a_password_does_not_show_in_the_command_line_and_comes_from_its_file(tmp_path):
    assert "--password " not in invoke("run", "--help").output
    (tmp_path / "empty").write_text("", encoding="utf-8")
    store = tmp_path / "v.sqlite"
    refused = invoke("run", "a/b", "--username", "mes", "--password-file", tmp_path / "empty", "--store", store)
    assert "put the password on its first line" in str(refused.exception)
    assert Broker().address == "127.0.0.1:1883"


@pytest.mark.parametrize("station", ["..", "a/b", "C:\\x", "cell 7", "ä", "x" * 300])
def test_the_name_of_a_station_cannot_lead_a_heatmap_out_of_its_folder(station):
    path = heatmap_file(Key(station, EPOCH, 7))
    assert len(path.parts) == 2
    assert ".." not in path.parts
    assert path.name == f"{EPOCH}-7.jpg"
