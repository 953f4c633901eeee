"""The account of who changed what: complete, in order, and whoever touches it is found out."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
from pathlib import Path

import pytest

from agent.audit import NOTHING, TORN, AuditLog
from agent.commands.log import Entry
from agent.errors import StorageError
from calibration.recipe_file import sha256


@pytest.fixture
def trail(tmp_path: Path) -> AuditLog:
    trail = AuditLog(tmp_path / "outbox")
    for number in range(6):
        trail.append("recipe activate", old=number, new=number + 1, who=f"user {number}")
    return trail


def test_each_line_holds_the_digest_of_the_line_before(trail: AuditLog) -> None:
    before = NOTHING
    for line in trail.path.read_bytes().splitlines(keepends=True):
        assert json.loads(line)["before"] == before
        before = sha256(line)
    chain = trail.verify()
    assert (chain.lines, chain.first, chain.last, chain.torn_bytes) == (6, NOTHING, before, 0)


def test_a_line_says_when_who_what_old_and_new(trail: AuditLog) -> None:
    trail.append("recipe add", new={"name": "flange"})
    *_, fields = trail.lines()
    assert fields["who"].startswith("user ")
    assert (fields["what"], fields["old"], fields["new"]) == ("recipe add", None, {"name": "flange"})
    assert fields["utc"].endswith("Z")


def test_who_became_root_is_named(trail: AuditLog, monkeypatch) -> None:
    monkeypatch.setenv("SUDO_USER", "anna")
    trail.append("x")
    monkeypatch.setenv("SUDO_USER", "anna\nuser root")
    trail.append("x")
    *_, first, second = trail.lines()
    assert first["who"].startswith("user anna as ")
    assert "anna" not in second["who"]


def test_the_outcome_of_a_command_is_told_with_its_issuer(trail: AuditLog) -> None:
    trail.command(Entry("r", "t", "recipe", "mes", 7, {"name": "b"}, before="a", after="b", result="done", detail="ok"))
    *_, fields = trail.lines()
    assert (fields["who"], fields["what"], fields["old"]) == ("issuer mes", "command recipe", "a")
    assert fields["new"] == {"id": 7, "result": "done", "detail": "ok", "after": "b"}


def test_a_trail_that_never_began_is_whole(tmp_path: Path) -> None:
    assert AuditLog(tmp_path / "none").verify().lines == 0
    assert not (tmp_path / "none").exists()


def test_any_flipped_bit_is_found_in_its_line_or_the_next(trail: AuditLog) -> None:
    data = trail.path.read_bytes()
    ends = [place for place, byte in enumerate(data) if byte == 10]
    for place in random.Random(4).sample(range(ends[-2]), 120):
        damaged = bytearray(data)
        damaged[place] ^= 2
        trail.path.write_bytes(damaged)
        line = sum(end < place for end in ends) + 1
        with pytest.raises(StorageError, match=rf"line ({line}|{line + 1}): the audit trail is broken"):
            trail.verify()


@pytest.mark.parametrize("removed", [1, 3, 5])
def test_a_removed_line_is_found_where_it_was(trail: AuditLog, removed: int) -> None:
    lines = trail.path.read_bytes().splitlines(keepends=True)
    trail.path.write_bytes(b"".join(lines[: removed - 1] + lines[removed:]))
    with pytest.raises(StorageError, match=rf"line {removed}: the audit trail is broken"):
        trail.verify()


def test_inserted_exchanged_and_repeated_lines_are_found(trail: AuditLog) -> None:
    lines = trail.path.read_bytes().splitlines(keepends=True)
    forged = lines[2].replace(b"user 2", b"user 9")
    for changed, first in (
        ([*lines[:2], forged, *lines[3:]], 4),
        ([*lines[:2], forged, *lines[2:]], 4),
        ([*lines[:2], lines[3], lines[2], *lines[4:]], 3),
        (lines[:3] + lines[2:], 4),
        ([*lines[:3], b"hello\n", *lines[3:]], 4),
    ):
        trail.path.write_bytes(b"".join(changed))
        with pytest.raises(StorageError, match=rf"line {first}: the audit trail is broken"):
            trail.verify()


def test_removed_newest_lines_are_found_by_a_digest_that_was_noted_down(trail: AuditLog) -> None:
    noted = trail.verify().last
    trail.append("later")
    trail.verify(noted)
    lines = trail.path.read_bytes().splitlines(keepends=True)
    trail.path.write_bytes(b"".join(lines[:4]))
    assert trail.verify().lines == 4
    with pytest.raises(StorageError, match="the newest lines were removed"):
        trail.verify(noted)


def test_a_line_torn_anywhere_by_a_power_cut_costs_nothing_else(trail: AuditLog) -> None:
    data = trail.path.read_bytes()
    start = data[:-1].rfind(b"\n") + 1
    for length in (start + 1, start + 20, len(data) - 1):
        for tail in (b"", b"\0" * 300, b"\0" * 300 + b'"x"}\n'):
            trail.path.write_bytes(data[:length] + tail)
            chain = trail.verify()
            assert (chain.lines, chain.torn_bytes) == (5, length - start + len(tail))
            trail.append("after the power cut")
            assert trail.verify().lines == 7
            *_, torn, after = trail.lines()
            assert (torn["what"], torn["old"]["bytes"]) == (TORN, chain.torn_bytes)
            assert after["what"] == "after the power cut"


def test_the_first_line_may_be_torn_too(tmp_path: Path) -> None:
    trail = AuditLog(tmp_path)
    trail.path.write_bytes(b'{"utc": "20')
    trail.append("x")
    assert [fields["what"] for fields in trail.lines()] == [TORN, "x"]
    assert trail.verify().first == NOTHING


def _append(folder: Path, number: int) -> None:
    for _ in range(20):
        AuditLog(folder).append("x", who=f"process {number}")


def test_several_processes_write_one_chain(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_append, args=(tmp_path, number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert AuditLog(tmp_path).verify().lines == 60


def test_a_trail_that_became_too_long_goes_on_in_a_new_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("agent.audit.MOST_BYTES", 2000)
    trail = AuditLog(tmp_path)
    for number in range(30):
        trail.append("x", new=number)
        trail.verify()
    chain = trail.verify()
    assert 10 < chain.lines < 30
    assert chain.first != NOTHING
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audit.1.jsonl", "audit.jsonl"]
    (tmp_path / "audit.1.jsonl").unlink()
    with pytest.raises(StorageError, match="lines before it were removed"):
        trail.verify()


def test_values_of_any_size_and_kind_make_one_line_of_bounded_size(trail: AuditLog) -> None:
    trail.append("x" * 100, old="ä\n\u2028" * 100_000, new={"path": Path("a"), "n": float("inf")}, who="u" * 50_000)
    assert trail.verify().lines == 7
    assert max(map(len, trail.path.read_bytes().splitlines())) < 16 * 1024


def test_a_disk_that_refuses_is_said_and_told_of_in_the_log(trail: AuditLog, monkeypatch, caplog) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        trail.append("x")
    trail.tell("agent stop", new=1)
    assert "not in the audit trail: agent stop by user" in caplog.text


def test_a_link_in_place_of_the_trail_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("")
    (tmp_path / "audit.jsonl").symlink_to(tmp_path / "target")
    with pytest.raises(StorageError):
        AuditLog(tmp_path).append("x")
    assert (tmp_path / "target").read_text() == ""
