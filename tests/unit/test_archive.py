"""What stays at the station, and what happens when the disk does not want it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import cv2
import numpy as np
import pytest
from verdicts import sent

from agent.publishing.archive import LONGEST_SIDE, PICTURES, VERDICTS, Archive, ArchiveSettings
from agent.publishing.messages import Origin
from agent.verdict import Outcome, Reason, Verdict
from calibration.errors import InputError
from calibration.frame import Frame

ORIGIN = Origin("cell7", "0123456789ab", "flange", "d" * 64, "openvino f32", False, "reject")
OUTCOMES = (Outcome.PASS, Outcome.REJECT, Outcome.NO_VERDICT)


def frame_of(pixels: np.ndarray) -> Frame:
    return Frame(pixels, 1, 1, 0, 0)


def store(
    archive: Archive, seq: int, outcome: Outcome = Outcome.REJECT, *, frame_px=(40, 60), view_px=(32, 32)
) -> None:
    """Store one verdict with a frame, and with a heatmap where it has a score."""
    if outcome is Outcome.NO_VERDICT:
        verdict = Verdict(seq, outcome, Reason.LATE)
    else:
        picture, anomaly_map = np.full(view_px, 0.5, np.float32), np.ones((4, 4), np.float32)
        verdict = Verdict(
            seq, outcome, Reason.SCORE, score=1.0, threshold=1.0, picture=picture, anomaly_map=anomaly_map
        )
    message = sent(verdict, ORIGIN, seq)
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
