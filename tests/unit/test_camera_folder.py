"""The folder camera replays files in order, one per trigger, and names the file that it cannot read."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from agent.cameras.folder import FolderCamera
from agent.errors import CameraError, EndOfFrames, FrameError
from calibration.frame import Frame
from calibration.images import encode_png, image_files
from calibration.recording import RecordingWriter, recorded_frames


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Return three gray images of brightness 10, 20 and 30."""
    paths = [tmp_path / f"{number}.png" for number in (1, 2, 3)]
    for number, path in enumerate(paths, start=1):
        path.write_bytes(encode_png(np.full((6, 8), 10 * number, np.uint8)))
    return paths


def started(files: list[Path]) -> FolderCamera:
    camera = FolderCamera(files)
    camera.start()
    return camera


def test_each_trigger_gets_the_next_file(files):
    camera = started(files)
    for trigger_id in (41, 42, 43):
        camera.trigger(trigger_id)
    frames = [camera.next_frame(0.0) for _ in files]
    assert [frame.trigger_id for frame in frames] == [41, 42, 43]
    assert [frame.frame_id for frame in frames] == [1, 2, 3]
    assert [int(frame.pixels[0, 0]) for frame in frames] == [10, 20, 30]
    assert [frame.facts for frame in frames] == [{"file": str(path)} for path in files]


def test_without_a_trigger_there_is_no_frame(files):
    camera = started(files)
    before_ns = time.monotonic_ns()
    assert camera.next_frame(0.03) is None
    assert time.monotonic_ns() - before_ns >= 30_000_000


def test_after_the_last_file_a_trigger_says_that_this_is_the_end(files):
    camera = started(files[:1])
    camera.trigger(1)
    with pytest.raises(EndOfFrames, match="all 1 images"):
        camera.trigger(2)
    assert camera.next_frame(0.0).trigger_id == 1
    assert camera.next_frame(0.0) is None


@pytest.mark.parametrize("content", [b"", b"no image at all", None])
def test_an_unreadable_file_is_named_and_the_next_trigger_goes_on(files, content):
    if content is None:
        files[1].unlink()
    else:
        files[1].write_bytes(content)
    camera = started(files)
    for trigger_id in (1, 2, 3):
        camera.trigger(trigger_id)
    assert camera.next_frame(0.0).frame_id == 1
    with pytest.raises(FrameError, match=r"2\.png") as raised:
        camera.next_frame(0.0)
    assert raised.value.trigger_id == 2
    after = camera.next_frame(0.0)
    assert (after.frame_id, after.trigger_id, int(after.pixels[0, 0])) == (3, 3, 30)  # a gap in frame_id


def test_a_reconnect_goes_on_with_the_next_file(files):
    camera = started(files)
    camera.trigger(1)
    camera.trigger(2)
    camera.next_frame(0.0)
    camera.stop()
    camera.start()
    camera.trigger(3)
    frame = camera.next_frame(0.0)
    assert (frame.frame_id, frame.trigger_id) == (3, 3)


def test_sixteen_bit_and_colour_files_keep_their_kind(tmp_path):
    deep, colour = tmp_path / "1.png", tmp_path / "2.png"
    deep.write_bytes(encode_png(np.full((4, 4), 40_000, np.uint16)))
    colour.write_bytes(encode_png(np.full((4, 4, 3), (200, 100, 50), np.uint8)))
    camera = started(image_files(tmp_path))
    camera.trigger(1)
    camera.trigger(2)
    first, second = camera.next_frame(0.0), camera.next_frame(0.0)
    assert (first.bit_depth, int(first.pixels[0, 0])) == (16, 40_000)
    assert (second.bit_depth, second.pixels[0, 0].tolist()) == (8, [200, 100, 50])  # red first


def test_a_recording_is_replayed_with_the_pixels_that_were_recorded(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7), np.uint8)
    writer = RecordingWriter(tmp_path / "recording")
    writer.append(Frame(pixels=pixels, frame_id=5, trigger_id=5, exposed_ns=1, received_ns=2))
    camera = started([recorded.file for recorded in recorded_frames(tmp_path / "recording")])
    camera.trigger(1)
    np.testing.assert_array_equal(camera.next_frame(0.0).pixels, pixels)


def test_no_files_at_all_is_an_error_at_start():
    with pytest.raises(CameraError, match="0 images"):
        FolderCamera([]).start()


def test_a_camera_that_is_not_started_says_so(files):
    camera = FolderCamera(files)
    for call in (lambda: camera.trigger(1), lambda: camera.next_frame(0.0)):
        with pytest.raises(CameraError, match="call start"):
            call()


def test_stopping_twice_wakes_whoever_waits_for_a_frame(files):
    camera = started(files)
    heard: list[str] = []

    def wait() -> None:
        try:
            camera.next_frame(5.0)
        except CameraError as error:
            heard.append(str(error))

    waiter = threading.Thread(target=wait)
    waiter.start()
    camera.stop()
    camera.stop()
    waiter.join(2.0)
    assert "not started" in heard[0]
