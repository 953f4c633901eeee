"""A recording gives back what the camera saw, and a damaged one names the line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from calibration.errors import InputError
from calibration.frame import Frame
from calibration.recording import INDEX, RecordingWriter, is_recording, read_recording, recorded_frames


def frame(pixels: np.ndarray, number: int = 1, bit_depth: int = 8, **facts) -> Frame:
    return Frame(pixels, 10 * number, number, 1_000_000_007 * number, 5, bit_depth, facts)


def noise(shape: tuple[int, ...], bit_depth: int) -> np.ndarray:
    dtype = np.uint8 if bit_depth == 8 else np.uint16
    return np.random.default_rng(4).integers(0, 2**bit_depth, shape, dtype)


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    """Return a folder with three gray frames."""
    writer = RecordingWriter(tmp_path / "recording")
    for number in (1, 2, 3):
        writer.append(frame(noise((6, 8), 8), number))
    return tmp_path / "recording"


def index_lines(recording: Path) -> list[str]:
    return (recording / INDEX).read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(("shape", "bit_depth"), [((6, 8), 8), ((6, 8), 12), ((6, 8, 3), 8), ((6, 8, 3), 16)])
def test_pixels_and_facts_survive_without_loss(tmp_path: Path, shape, bit_depth):
    captured = frame(noise(shape, bit_depth), 7, bit_depth, part_id="A-7", exposure_us=120.5, truth={"kind": None})
    RecordingWriter(tmp_path / "new" / "recording").append(captured)
    (found,) = read_recording(tmp_path / "new" / "recording")
    assert found.pixels.dtype == captured.pixels.dtype
    np.testing.assert_array_equal(found.pixels, captured.pixels)
    assert (found.frame_id, found.trigger_id, found.exposed_ns) == (70, 7, 7_000_000_049)
    assert found.bit_depth == bit_depth
    assert found.facts == captured.facts


def test_frames_come_in_the_order_of_their_capture(recording: Path):
    assert is_recording(recording)
    assert [found.trigger_id for found in read_recording(recording)] == [1, 2, 3]


def test_the_part_id_is_text_whatever_the_line_counts_with(tmp_path: Path):
    writer = RecordingWriter(tmp_path)
    for number, facts in enumerate(({"part_id": 17}, {"part_id": "17"}, {}), 1):
        writer.append(frame(noise((6, 8), 8), number, **facts))
    assert [found.part_id for found in recorded_frames(tmp_path)] == ["17", "17", None]


def test_a_folder_that_holds_anything_is_refused(tmp_path: Path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="holds 1 files already: give a new folder, recordings are never mixed"):
        RecordingWriter(tmp_path)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="Not a directory: give a folder that can be written"):
        RecordingWriter(tmp_path / "file" / "recording")


def test_corrected_pixels_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="the sensor's own 8 or 16 bits, found float32: record before correction"):
        RecordingWriter(tmp_path).append(frame(np.zeros((6, 8), np.float32)))


def test_a_disk_that_refuses_is_reported(tmp_path: Path):
    writer = RecordingWriter(tmp_path / "recording")
    (tmp_path / "recording").rmdir()
    with pytest.raises(InputError, match=r"000001\.png: No such file or directory: free space, then capture again"):
        writer.append(frame(noise((6, 8), 8)))


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_a_cut_last_line_is_named_with_file_and_line(recording: Path, kept):
    *lines, last = index_lines(recording)
    (recording / INDEX).write_text("\n".join([*lines, last[: int(kept * len(last))]]), encoding="utf-8")
    wanted = rf"recording/{INDEX}:3: not a line of a recording \(.*\): remove the line if a crash cut it"
    with pytest.raises(InputError, match=wanted):
        recorded_frames(recording)


def test_what_was_written_before_a_crash_can_be_read(recording: Path):
    (recording / "000004.png").write_bytes(b"\x89PNG half a frame")  # its line was never written
    assert len(list(read_recording(recording))) == 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "taktsight.recording/9"}, "format 'taktsight.recording/9' found, need 'taktsight.recording/1'"),
        ({"frame_id": None}, "not a line of a recording"),
        ({"facts": 3}, "not a line of a recording"),
        ({"file": "../../etc/x.png"}, r"'\.\./\.\./etc/x\.png' points out of the recording, need a file name"),
        ({"file": "/etc/x.png"}, r"points out of the recording"),
        ({"file": ".."}, r"points out of the recording"),
    ],
)
def test_a_foreign_line_is_refused_with_file_and_line(recording: Path, change, reason):
    first, second, third = index_lines(recording)
    second = json.dumps({**json.loads(second), **change})
    (recording / INDEX).write_text("\n".join([first, second, third]), encoding="utf-8")
    with pytest.raises(InputError, match=rf"{INDEX}:2: .*{reason}"):
        recorded_frames(recording)


@pytest.mark.parametrize("line", ["[]", "3", "null", '"format"', "{}"])
def test_json_that_is_no_frame_is_refused(recording: Path, line):
    (recording / INDEX).write_text(line + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=f"{INDEX}:1: not a line of a recording"):
        recorded_frames(recording)


def test_bytes_that_are_no_text_are_refused(recording: Path):
    (recording / INDEX).write_bytes(b"\xff\xfe{")
    with pytest.raises(InputError, match=r"not text in UTF-8 \(invalid start byte\): copy the recording again"):
        recorded_frames(recording)


def test_a_missing_frame_file_is_named(recording: Path):
    (recording / "000002.png").unlink()
    with pytest.raises(InputError, match=r"000002\.png: No such file or directory"):
        list(read_recording(recording))


def test_a_folder_without_index_is_no_recording(tmp_path: Path):
    assert not is_recording(tmp_path)
    with pytest.raises(InputError, match="No such file or directory: give a recording that you can read"):
        recorded_frames(tmp_path)
