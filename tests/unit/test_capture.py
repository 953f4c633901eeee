"""Frames of a running line, kept on demand."""

from __future__ import annotations

import numpy as np
import pytest

from agent.errors import StorageError
from agent.line.capture import FrameCapture
from calibration.frame import Frame
from calibration.photometric import Photometric
from calibration.recording import recorded_frames


def frame(number):
    return Frame(np.full((4, 6), number, np.uint8), number, number, 0, 0)


def test_nothing_is_kept_before_a_capture_begins_and_after_it_ends(tmp_path):
    capture = FrameCapture(tmp_path, Photometric())
    capture.take(frame(1))
    folder = capture.begin(2)
    for number in (2, 3, 4):
        capture.take(frame(number))
    assert [one.trigger_id for one in recorded_frames(folder)] == [2, 3]
    assert capture.left == 0


def test_a_second_capture_waits_for_the_end_of_the_first(tmp_path):
    capture = FrameCapture(tmp_path, Photometric())
    capture.begin(2)
    with pytest.raises(StorageError, match="2 frames to come"):
        capture.begin(1)
    capture.take(frame(1))
    capture.take(frame(2))
    assert capture.begin(1).is_dir()


def test_a_disk_that_refuses_ends_the_capture_and_nothing_else(tmp_path, caplog):
    capture = FrameCapture(tmp_path, Photometric())
    folder = capture.begin(3)
    (folder / "000001.png").mkdir()
    capture.take(frame(1))
    capture.take(frame(2))
    assert capture.left == 0
    assert "capture ended with 3 frames to come" in caplog.text


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"commands\.captures"):
        FrameCapture(tmp_path / "file", Photometric()).begin(1)
