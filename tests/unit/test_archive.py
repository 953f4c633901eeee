"""What stays at the station, and what happens when the disk does not want it."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import signal
from datetime import datetime, timedelta
from pathlib import Path

import cv2
import numpy as np
import pytest
from verdicts import NOON, archived, sent

from agent.publishing.archive import LONGEST_SIDE, PICTURES, Archive, ArchiveSettings
from agent.publishing.messages import Origin
from agent.publishing.verdict_files import VERDICTS, newest_lines, verdict_files
from agent.verdict import Outcome, Reason, Verdict
from calibration.errors import InputError
from calibration.frame import Frame

ORIGIN = Origin("cell7", "0123456789ab", "flange", "d" * 64, "openvino f32", False, "reject")
OUTCOMES = (Outcome.PASS, Outcome.REJECT, Outcome.NO_VERDICT)


def frame_of(pixels: np.ndarray) -> Frame:
    return Frame(pixels, 1, 1, 0, 0)


def store(
    archive: Archive,
    seq: int,
    outcome: Outcome = Outcome.REJECT,
    *,
    frame_px=(40, 60),
    view_px=(32, 32),
    created_utc: datetime = NOON,
) -> None:
    """Store one verdict with a frame, and with a heatmap where it has a score."""
    if outcome is Outcome.NO_VERDICT:
        verdict = Verdict(seq, outcome, Reason.LATE)
    else:
        picture, anomaly_map = np.full(view_px, 0.5, np.float32), np.ones((4, 4), np.float32)
        verdict = Verdict(
            seq, outcome, Reason.SCORE, score=1.0, threshold=1.0, picture=picture, anomaly_map=anomaly_map
        )
    message = sent(verdict, ORIGIN, seq, created_utc=created_utc)
    archive.store(message, verdict, frame_of(np.full(frame_px, 90, np.uint8)), 1.0)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / VERDICTS).read_text().splitlines()]


def pictures(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / PICTURES).iterdir())


def test_every_verdict_has_its_line_in_the_order_of_the_verdicts(tmp_path):
    archive = Archive(ArchiveSettings(tmp_path))
    for seq in range(1, 10):
        store(archive, seq, OUTCOMES[seq % 3])
    assert [line["seq"] for line in lines(tmp_path)] == list(range(1, 10))
    assert archive.failures == 0


def test_pictures_are_kept_of_rejects_and_of_parts_without_verdict_only(tmp_path):
    archive = Archive(ArchiveSettings(tmp_path))
    for seq, outcome in enumerate(OUTCOMES, 1):
        store(archive, seq, outcome)
    assert [sorted(line["pictures"]) for line in lines(tmp_path)] == [[], ["frame", "heatmap"], ["frame"]]
    assert len(pictures(tmp_path)) == 3


@pytest.mark.parametrize(("wanted", "count"), [("none", 0), ("rejects", 3), ("all", 5)])
def test_the_settings_say_of_which_parts_pictures_are_kept(tmp_path, wanted, count):
    archive = Archive(ArchiveSettings(tmp_path, wanted))
    for seq, outcome in enumerate(OUTCOMES, 1):
        store(archive, seq, outcome)
    assert len(pictures(tmp_path)) == count
    assert len(lines(tmp_path)) == 3


def test_a_line_names_pictures_that_are_there(tmp_path):
    store(Archive(ArchiveSettings(tmp_path)), 1)
    for name in lines(tmp_path)[0]["pictures"].values():
        assert cv2.imread(str(tmp_path / name)) is not None


@pytest.mark.parametrize("side_px", [16, 300, 512, 1000])
def test_no_picture_is_larger_than_promised(tmp_path, side_px):
    store(Archive(ArchiveSettings(tmp_path)), 1, frame_px=(side_px, 2 * side_px), view_px=(side_px, side_px))
    sides = {kind: max(cv2.imread(str(tmp_path / name)).shape) for kind, name in lines(tmp_path)[0]["pictures"].items()}
    assert sides == {"frame": min(2 * side_px, LONGEST_SIDE), "heatmap": LONGEST_SIDE}


def test_the_size_limit_sheds_the_oldest_pictures_and_never_a_line(tmp_path):
    store(Archive(ArchiveSettings(tmp_path / "one")), 1)
    pair_bytes = sum(path.stat().st_size for path in (tmp_path / "one" / PICTURES).iterdir())
    folder = tmp_path / "many"
    archive = Archive(ArchiveSettings(folder, max_mb=3.5 * pair_bytes / 1e6))
    for seq in range(1, 21):
        store(archive, seq)
    assert len(lines(folder)) == 20
    assert {name.split("-")[1] for name in pictures(folder)} >= {"00000018", "00000019", "00000020"}
    assert sum(path.stat().st_size for path in (folder / PICTURES).iterdir()) <= 3.5 * pair_bytes


def test_pictures_of_an_earlier_run_count_and_go_first(tmp_path):
    store(Archive(ArchiveSettings(tmp_path)), 1)
    kept = sum(path.stat().st_size for path in (tmp_path / PICTURES).iterdir())
    later = Archive(ArchiveSettings(tmp_path, max_mb=1.5 * kept / 1e6))
    store(later, 2)
    assert {"00112233aabb-00000002-frame.jpg", "00112233aabb-00000002-heatmap.jpg"} <= set(pictures(tmp_path))
    assert len(pictures(tmp_path)) < 4
    assert len(lines(tmp_path)) == 2


def test_a_disk_that_refuses_the_lines_is_counted_and_never_raises(tmp_path, caplog):
    archive = Archive(ArchiveSettings(tmp_path))
    (tmp_path / VERDICTS).mkdir()
    with caplog.at_level(logging.WARNING, "agent.publishing.archive"):
        for seq in range(1, 6):
            store(archive, seq)
        (tmp_path / VERDICTS).rmdir()
        store(archive, 6)
    assert archive.failures == 5
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]  # once it began, once it was over
    assert [line["seq"] for line in lines(tmp_path)] == [6]


def test_a_full_disk_is_counted_and_never_raises(tmp_path):
    archive = Archive(ArchiveSettings(tmp_path))
    (tmp_path / VERDICTS).symlink_to("/dev/full")
    store(archive, 1)
    assert archive.failures == 1


def test_a_disk_that_refuses_the_pictures_still_gets_the_lines(tmp_path):
    archive = Archive(ArchiveSettings(tmp_path))
    (tmp_path / PICTURES).rmdir()
    (tmp_path / PICTURES).write_text("a file in the way")
    store(archive, 1)
    assert archive.failures == 1
    assert [(line["seq"], line["pictures"]) for line in lines(tmp_path)] == [(1, {})]


def test_a_removed_archive_is_counted_and_not_made_anew_on_another_disk(tmp_path):
    folder = tmp_path / "mounted"
    archive = Archive(ArchiveSettings(folder))
    (folder / PICTURES).rmdir()
    folder.rmdir()
    store(archive, 1)
    assert archive.failures == 1
    assert not folder.exists()


def test_pictures_deleted_to_make_room_do_not_stop_new_ones(tmp_path):
    archive = Archive(ArchiveSettings(tmp_path))
    store(archive, 1)
    for path in (tmp_path / PICTURES).iterdir():
        path.unlink()
    (tmp_path / PICTURES).rmdir()
    store(archive, 2)
    assert archive.failures == 0
    assert len(pictures(tmp_path)) == 2


@pytest.mark.parametrize("shape", [(8, 8, 2), (0, 8), (0, 0), (8, 0, 3)])
def test_a_frame_that_is_no_picture_costs_its_picture_and_not_the_line(tmp_path, shape):
    archive = Archive(ArchiveSettings(tmp_path))
    verdict = Verdict(1, Outcome.NO_VERDICT, Reason.BAD_FRAME)
    archive.store(sent(verdict, ORIGIN, 1), verdict, frame_of(np.zeros(shape, np.uint8)), 1.0)
    assert [line["pictures"] for line in lines(tmp_path)] == [{}]


def test_what_is_not_a_number_in_a_frame_is_drawn_black(tmp_path):
    archive = Archive(ArchiveSettings(tmp_path))
    verdict = Verdict(1, Outcome.NO_VERDICT, Reason.BAD_FRAME)
    archive.store(
        sent(verdict, ORIGIN, 1),
        verdict,
        frame_of(np.full((8, 8), np.nan, np.float32)),
        1.0,
    )
    assert cv2.imread(str(tmp_path / lines(tmp_path)[0]["pictures"]["frame"])).max() == 0


def test_a_line_cut_off_by_a_power_cut_spoils_no_other_line(tmp_path):
    store(Archive(ArchiveSettings(tmp_path)), 1)
    whole = (tmp_path / VERDICTS).read_bytes()
    (tmp_path / VERDICTS).write_bytes(whole + whole[:50])
    store(Archive(ArchiveSettings(tmp_path)), 2)
    first, cut, second = (tmp_path / VERDICTS).read_bytes().splitlines()
    assert (json.loads(first)["seq"], cut, json.loads(second)["seq"]) == (1, whole[:50], 2)


def test_a_folder_that_cannot_be_made_stops_the_start_with_an_input_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="give the archive a folder"):
        Archive(ArchiveSettings(tmp_path / "file" / "archive"))


# A disk that runs short


class ShortDisk:
    """A disk of which pictures take `used`, and all else leaves so much."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self.size = size

    def free(self, _: Path) -> float:
        return self.size - sum(path.stat().st_size for path in (self.folder / PICTURES).iterdir())


@pytest.fixture
def disk(tmp_path):
    """Return a disk with room for five pairs of pictures, with which the archive leaves two to others."""
    folder = tmp_path / "one"
    store(Archive(ArchiveSettings(folder)), 1)
    pair = sum(path.stat().st_size for path in (folder / PICTURES).iterdir())
    short = ShortDisk(tmp_path / "archive", 5 * pair)
    short.pair = pair
    short.archive = Archive(ArchiveSettings(short.folder), least_free_mb=2 * pair / 1e6, free_bytes=short.free)
    return short


def test_pictures_leave_to_others_what_they_need_of_the_disk(disk):
    for seq in range(1, 11):
        disk.archive.make_room()
        store(disk.archive, seq)
    assert [line["seq"] for line in archived(disk.folder)] == list(range(1, 11))
    assert disk.free(disk.folder) >= disk.pair  # one part's pictures below it, until there is room again
    disk.archive.make_room()
    assert disk.free(disk.folder) >= 2 * disk.pair


def test_where_the_disk_runs_short_the_oldest_pictures_go_and_no_new_one_is_written(disk, caplog):
    for seq in (1, 2, 3):
        store(disk.archive, seq)
    disk.size -= 2 * disk.pair  # something else fills it
    store(disk.archive, 4)
    assert archived(disk.folder)[-1]["pictures"] == {}
    assert disk.archive.failures == 1
    with caplog.at_level(logging.WARNING, "agent.publishing.archive"):
        disk.archive.make_room()
        disk.archive.make_room()
    assert [record.getMessage() for record in caplog.records].count(
        f"archive {disk.folder}: the disk runs short: the oldest pictures go"
    ) == 1
    assert {name.split("-")[1] for name in pictures(disk.folder)} == {"00000003"}
    disk.size = 0
    disk.archive.make_room()
    assert pictures(disk.folder) == []
    disk.size = 10 * disk.pair
    store(disk.archive, 5)
    assert len(archived(disk.folder)[-1]["pictures"]) == 2


def test_a_disk_that_does_not_say_how_full_it_is_gets_its_pictures(tmp_path, monkeypatch):
    said = os.statvfs(tmp_path)
    nothing = os.statvfs_result((*said[:2], 0, 0, 0, *said[5:]))
    monkeypatch.setattr("agent.publishing.archive.os.statvfs", lambda _: nothing)
    store(Archive(ArchiveSettings(tmp_path), least_free_mb=8.0), 1)
    assert len(pictures(tmp_path)) == 2


def test_a_picture_that_cannot_be_written_whole_leaves_no_file_and_the_oldest_make_room(tmp_path, monkeypatch):
    archive = Archive(ArchiveSettings(tmp_path))
    store(archive, 1)
    honest = Path.write_bytes

    def half(path: Path, data: bytes) -> int:
        honest(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    store(archive, 2)
    assert pictures(tmp_path) == []
    assert [len(line["pictures"]) for line in lines(tmp_path)] == [2, 0]
    assert archive.failures == 1


def test_what_a_killed_process_left_half_written_is_removed_at_the_start(tmp_path):
    (tmp_path / PICTURES).mkdir()
    (tmp_path / PICTURES / "00112233aabb-00000001-frame.jpg.partial").write_bytes(b"half")
    (tmp_path / PICTURES / "notes.partial").write_text("of a person")
    Archive(ArchiveSettings(tmp_path))
    assert pictures(tmp_path) == ["notes.partial"]


def test_pictures_go_so_that_the_line_can_be_written(tmp_path, monkeypatch):
    archive = Archive(ArchiveSettings(tmp_path))
    store(archive, 1)
    honest = archive._verdicts.append

    def append(message: dict) -> None:
        if pictures(tmp_path):
            raise OSError(errno.ENOSPC, "No space left on device")
        honest(message)

    monkeypatch.setattr(archive._verdicts, "append", append)
    store(archive, 2, Outcome.PASS)
    assert [line["seq"] for line in lines(tmp_path)] == [1, 2]
    assert (pictures(tmp_path), archive.failures) == ([], 0)


# Days


def test_each_day_has_a_file_of_its_own(tmp_path):
    archive = Archive(ArchiveSettings(tmp_path, "none"))
    for hours in (0, 11, 12, 20, 36):
        store(archive, hours, created_utc=NOON + timedelta(hours=hours))
    held = {path.name: path.read_bytes().count(b"\n") for path in verdict_files(tmp_path)}
    assert held == {VERDICTS: 1, "verdicts-2025-03-05.jsonl": 2, "verdicts-2025-03-04.jsonl": 2}
    assert [message["seq"] for message in archived(tmp_path)] == [0, 11, 12, 20, 36]


def test_a_new_run_goes_on_with_the_file_of_its_day_and_sets_that_of_another_aside(tmp_path):
    for seq, hours in enumerate((0, 1, 24), 1):
        store(Archive(ArchiveSettings(tmp_path, "none")), seq, created_utc=NOON + timedelta(hours=hours))
    assert [path.name for path in verdict_files(tmp_path)] == [VERDICTS, "verdicts-2025-03-04.jsonl"]
    assert [line["seq"] for line in lines(tmp_path)] == [3]


def test_verdicts_round_midnight_may_come_in_another_order(tmp_path):
    archive = Archive(ArchiveSettings(tmp_path, "none"))
    midnight = NOON + timedelta(hours=12)
    for seq in range(1, 7):
        store(archive, seq, created_utc=midnight + timedelta(milliseconds=seq * (-1) ** seq))
    assert [path.name for path in verdict_files(tmp_path)] == [VERDICTS, "verdicts-2025-03-04.jsonl"]
    assert [message["seq"] for message in archived(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_day_that_comes_again_gets_another_file_behind_the_first(tmp_path):
    archive = Archive(ArchiveSettings(tmp_path, "none"))
    for seq, days in enumerate((0, 1, 400, 1, 400, 1), 1):
        store(archive, seq, created_utc=NOON + timedelta(days=days))
    assert [path.name for path in reversed(verdict_files(tmp_path))] == [
        "verdicts-2025-03-04.jsonl",
        "verdicts-2025-03-05.jsonl",
        "verdicts-2025-03-05-2.jsonl",
        "verdicts-2026-04-08.jsonl",
        "verdicts-2026-04-08-2.jsonl",
        VERDICTS,
    ]


@pytest.mark.parametrize(("keep_days", "left"), [(0, 10), (1, 2), (3, 4), (30, 10)])
def test_days_that_were_over_longer_ago_are_deleted(tmp_path, keep_days, left):
    (tmp_path / "verdicts-of-mine.jsonl").write_text("a person's own")
    archive = Archive(ArchiveSettings(tmp_path, "none", keep_days=keep_days))
    for day in range(11):
        store(archive, day, created_utc=NOON + timedelta(days=day))
    assert len(verdict_files(tmp_path)) == left + 1
    assert (tmp_path / "verdicts-of-mine.jsonl").exists()


def test_a_clock_that_is_years_ahead_for_a_moment_deletes_nothing(tmp_path):
    archive = Archive(ArchiveSettings(tmp_path, "none", keep_days=5))
    for seq, days in enumerate((0, 1, 2, 9999, 2, 3), 1):
        store(archive, seq, created_utc=NOON + timedelta(days=days))
    assert len(archived(tmp_path)) == 6


def test_a_file_without_a_verdict_is_of_the_day_of_its_last_change(tmp_path):
    (tmp_path / VERDICTS).write_text("nonsense\n")
    os.utime(tmp_path / VERDICTS, (0, (NOON - timedelta(days=3)).timestamp()))
    store(Archive(ArchiveSettings(tmp_path, "none")), 1)
    assert (tmp_path / "verdicts-2025-03-01.jsonl").read_text() == "nonsense\n"


def test_a_file_that_cannot_be_set_aside_goes_on(tmp_path, monkeypatch, caplog):
    archive = Archive(ArchiveSettings(tmp_path, "none"))
    store(archive, 1)

    def refuse(path: Path, target: Path) -> Path:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with caplog.at_level(logging.WARNING, "agent.publishing.verdict_files"):
        for seq in (2, 3):
            store(archive, seq, created_utc=NOON + timedelta(days=1))
    assert [line["seq"] for line in lines(tmp_path)] == [1, 2, 3]
    assert len(caplog.records) == 1
    assert archive.failures == 0


def test_lines_are_read_from_the_end_whatever_their_length(tmp_path, monkeypatch):
    monkeypatch.setattr("agent.publishing.verdict_files.READ_BYTES", 7)
    (tmp_path / "verdicts-2025-03-04.jsonl").write_bytes(b"a\n\nbb\n")
    (tmp_path / VERDICTS).write_bytes(b"c" * 20 + b"\nddddddd\nhalf")
    assert list(newest_lines(tmp_path)) == [b"half", b"ddddddd", b"c" * 20, b"", b"bb", b"", b"a"]


def test_a_line_that_the_disk_takes_half_of_is_taken_back(tmp_path):
    store(Archive(ArchiveSettings(tmp_path, "none")), 1)
    whole = (tmp_path / VERDICTS).read_bytes()
    limited = Archive(ArchiveSettings(tmp_path, "none"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 100, hard))
    try:
        store(limited, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert (tmp_path / VERDICTS).read_bytes() == whole
    assert limited.failures == 1
