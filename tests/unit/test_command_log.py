import sqlite3
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from agent.commands import log as command_log
from agent.commands.log import FILE_NAME, KEPT_COMMANDS, KEPT_REFUSALS, MOST_ISSUERS, CommandLog, Entry
from agent.errors import StorageError

NOON = "2026-11-22T12:00:00.000Z"


def intent(command_id=1, issuer="mes", **fields):
    values = {"run": "0123456789ab", "began_utc": NOON, "command": "capture", "arguments": {"count": 3}, **fields}
    return Entry(issuer=issuer, command_id=command_id, **values)


def refusal(number=0):
    return intent(None, None, command="unknown", arguments=None, result="refused", detail=f"refusal {number}")


@pytest.fixture
def log(tmp_path):
    log = CommandLog(tmp_path, "cell7")
    yield log
    log.close()


def reopened(log, tmp_path):
    log.close()
    return CommandLog(tmp_path, "cell7")


def change_by_hand(tmp_path, statement):
    database = sqlite3.connect(tmp_path / FILE_NAME)
    with database:
        database.execute(statement)
    database.close()


def test_an_unknown_issuer_has_no_last_id(log):
    assert log.last_id("mes") is None
    assert log.find("mes", 1) is None


def test_ids_and_lines_are_there_after_the_file_was_opened_again(log, tmp_path):
    log.add(intent(7))
    log = reopened(log, tmp_path)
    assert (log.last_id("mes"), log.last_id("scada")) == (7, None)
    assert log.find("mes", 7) == intent(7)
    log.close()


def test_a_finished_command_keeps_its_before_and_after(log):
    log.add(intent(7))
    done = replace(intent(7), ended_utc=NOON, before={"a": [1, None]}, after="b", result="done", detail="well")
    log.finish(done)
    assert log.find("mes", 7) == done
    assert log.trail() == [done]


@pytest.mark.parametrize("command_id", [6, 7])
def test_an_id_that_is_not_larger_is_not_written(log, command_id):
    log.add(intent(7))
    with pytest.raises(StorageError, match="used up"):
        log.add(intent(command_id))
    assert log.last_id("mes") == 7
    assert len(log.trail()) == 1


def test_issuers_count_apart(log):
    log.add(intent(7))
    log.add(intent(3, "scada"))
    assert (log.last_id("mes"), log.last_id("scada")) == (7, 3)


def test_the_number_of_issuers_is_bounded(log):
    for number in range(MOST_ISSUERS):
        assert not log.is_full()
        log.add(intent(1, f"client{number}"))
    assert log.is_full()
    with pytest.raises(StorageError, match="no room"):
        log.add(intent(1, "one-more"))
    log.add(intent(2, "client0"))
    assert len(log.trail()) == MOST_ISSUERS + 1


def test_a_refusal_uses_up_no_id(log):
    log.add(replace(intent(None), result="refused"))
    assert log.last_id("mes") is None


def test_the_trail_keeps_the_newest_commands_and_refusals_apart(log, monkeypatch):
    monkeypatch.setattr(command_log, "KEPT_COMMANDS", 20)
    monkeypatch.setattr(command_log, "KEPT_REFUSALS", 5)
    for number in range(1, 31):
        log.add(intent(number))
        log.add(refusal(number))
    trail = log.trail()
    assert [entry.command_id for entry in trail if entry.result is None] == list(range(30, 10, -1))
    assert [entry.detail for entry in trail if entry.result] == [f"refusal {number}" for number in range(30, 25, -1)]
    assert log.last_id("mes") == 30
    assert KEPT_COMMANDS > KEPT_REFUSALS


def test_the_trail_can_be_asked_for_its_newest_lines_only(log):
    for number in range(1, 6):
        log.add(intent(number))
    assert [entry.command_id for entry in log.trail(2)] == [5, 4]


def test_a_file_of_before_that_kept_choices_too_is_read(log, tmp_path):
    log.add(intent(7))
    change_by_hand(tmp_path, "CREATE TABLE choices (name TEXT PRIMARY KEY, value TEXT, checksum INTEGER)")
    log = reopened(log, tmp_path)
    assert log.last_id("mes") == 7
    log.close()


@pytest.mark.parametrize(
    ("statement", "ask"),
    [
        ("UPDATE issuers SET last_id = 3", lambda log: log.last_id("mes")),
        ("UPDATE audit SET arguments = '{'", lambda log: log.find("mes", 7)),
    ],
    ids=["last-id", "audit"],
)
def test_a_changed_value_is_noticed(log, tmp_path, statement, ask):
    log.add(intent(7))
    change_by_hand(tmp_path, statement)
    with pytest.raises(StorageError, match="is damaged"):
        ask(log)


def test_a_file_of_another_station_is_refused(log, tmp_path):
    with pytest.raises(StorageError, match="folder of its own"):
        CommandLog(tmp_path, "cell8")


def test_a_file_that_is_no_database_is_refused_and_left_as_it_was(tmp_path):
    (tmp_path / FILE_NAME).write_bytes(b"no database at all, " * 500)
    with pytest.raises(StorageError, match="is damaged"):
        CommandLog(tmp_path, "cell7")
    assert (tmp_path / FILE_NAME).read_bytes().startswith(b"no database at all, ")


def test_a_torn_file_is_refused(log, tmp_path):
    for number in range(1, 100):
        log.add(intent(number))
    log.close()
    file = tmp_path / FILE_NAME
    file.write_bytes(file.read_bytes()[:8192])
    with pytest.raises(StorageError, match="is damaged"):
        CommandLog(tmp_path, "cell7")


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(StorageError, match="may write to"):
        CommandLog(tmp_path / "file", "cell7")


def test_what_cannot_be_written_leaves_nothing_behind(log):
    log.add(intent(1))
    pages = log._database.execute("PRAGMA page_count").fetchone()[0]
    log._database.execute(f"PRAGMA max_page_count = {pages}")  # as on a full disk
    with pytest.raises(StorageError, match="full"):
        log.add(intent(2, arguments={"count": 3, "filler": "x" * 100_000}))
    assert log.last_id("mes") == 1
    log._database.execute("PRAGMA max_page_count = 1000000")
    log.add(intent(2))
    assert log.last_id("mes") == 2


def test_what_was_added_is_on_the_disk_before_the_call_returns(log):
    assert log._database.execute("PRAGMA synchronous").fetchone()[0] == 2
    assert log._database.execute("PRAGMA journal_mode").fetchone()[0] == "wal"


def test_commands_may_come_from_several_threads(log):
    def work(thread):
        for number in range(1, 21):
            log.add(intent(number, f"client{thread}"))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert [log.last_id(f"client{thread}") for thread in range(4)] == [20] * 4
    assert len(log.trail()) == 80
