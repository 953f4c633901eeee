"""A camera that replays stored images: one file per trigger, in the order given."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from agent.errors import CameraError, EndOfFrames, FrameError
from calibration.errors import InputError
from calibration.frame import Frame
from calibration.images import read_image


class FolderCamera:
    """Camera over image files (a folder, or the frames of a recording).

    A file is decoded when its frame is fetched, so that memory holds one frame. `start` after `stop` goes on with
    the next file and does not rewind: a reconnect after an unreadable file would replay it for ever.
    """

    def __init__(self, files: Sequence[Path], *, bit_depth: int | None = None) -> None:
        """bit_depth: of the sensor that took the files; None: the files' own 8 or 16."""
        self._files = tuple(files)
        self._bit_depth = bit_depth
        self._next_index = 0
        self._triggered: deque[tuple[int, int]] = deque()  # (trigger_id, index of its file)
        self._running = False
        self._changed = threading.Condition()

    def start(self) -> None:
        """Arm. Raises CameraError if there is no file at all."""
        if not self._files:
            raise CameraError("0 images to replay, need at least 1: check the folder name and the file suffixes")
        with self._changed:
            self._running = True

    def trigger(self, trigger_id: int, until_ns: int | None = None) -> None:  # noqa: ARG002 - a file does not go by
        """Assign the next file to trigger_id; returns at once.

        Raises EndOfFrames after the last file, CameraError if not started.
        """
        with self._changed:
            self._require_running()
            if self._next_index == len(self._files):
                raise EndOfFrames(f"all {len(self._files)} images are replayed: nothing is left for part {trigger_id}")
            self._triggered.append((trigger_id, self._next_index))
            self._next_index += 1
            self._changed.notify()

    def next_frame(self, timeout_s: float) -> Frame | None:
        """Return the frame of the oldest trigger that has none yet, or None if there was no trigger within timeout_s.

        frame_id counts files from 1, so that an unreadable one leaves a gap. exposed_ns is 0: a file does not tell.

        Raises FrameError naming the file if it cannot be read; the next call goes on with the next trigger.
        """
        with self._changed:
            self._require_running()
            self._changed.wait_for(lambda: self._triggered or not self._running, timeout_s)
            self._require_running()
            if not self._triggered:
                return None
            trigger_id, index = self._triggered.popleft()
        frame = _read_frame(self._files[index], frame_id=index + 1, trigger_id=trigger_id)
        return frame if self._bit_depth is None else replace(frame, bit_depth=self._bit_depth)

    def stop(self) -> None:
        """Disarm and forget triggers whose frame was not fetched; wakes a waiting `next_frame`."""
        with self._changed:
            self._running = False
            self._triggered.clear()
            self._changed.notify_all()

    def _require_running(self) -> None:
        if not self._running:
            raise CameraError("the folder camera is not started: call start() first")


def _read_frame(path: Path, *, frame_id: int, trigger_id: int) -> Frame:
    try:
        pixels = read_image(path)
    except InputError as error:
        raise FrameError(str(error), trigger_id) from error  # its text begins with the path
    return Frame(
        pixels=pixels,
        frame_id=frame_id,
        trigger_id=trigger_id,
        exposed_ns=0,
        received_ns=time.monotonic_ns(),
        bit_depth=8 * pixels.dtype.itemsize,
        facts={"file": str(path)},
    )
