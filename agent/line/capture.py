"""The next N frames of a running line as a recording: to train from, or to look into a fault."""

from __future__ import annotations

import logging
import threading
from datetime import UTC, datetime
from pathlib import Path

from agent.errors import StorageError
from calibration.errors import InputError
from calibration.frame import Frame
from calibration.photometric import PHOTOMETRIC_FILE, Photometric, write_photometric
from calibration.recording import RecordingWriter

log = logging.getLogger(__name__)


class FrameCapture:
    """Takes frames from the delivery thread until it has enough; another thread starts it."""

    def __init__(self, folder: Path, photometric: Photometric) -> None:
        self._folder = folder
        self._photometric = photometric
        self._lock = threading.Lock()
        self._writer: RecordingWriter | None = None
        self.left = 0  # frames still to come

    def begin(self, count: int) -> Path:
        """Record the next `count` frames into a new folder and return it.

        Raises StorageError while another capture goes on, or if the folder cannot be made.
        """
        with self._lock:
            if self.left:
                raise StorageError(f"a capture with {self.left} frames to come goes on: wait for its end")
            folder = self._folder / datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
            try:
                self._writer = RecordingWriter(folder)
                if not self._photometric.is_identity:
                    write_photometric(folder / PHOTOMETRIC_FILE, self._photometric)
            except InputError as error:
                raise StorageError(f"{folder}: {error}: give commands.captures a folder that can be written") from error
            self.left = count
            return folder

    def take(self, frame: Frame) -> None:
        """Record the frame if one is wanted; a disk that refuses ends the capture and nothing else."""
        if not self.left:
            return
        with self._lock:
            if self._writer is None or not self.left:
                return
            try:
                self._writer.append(frame)
            except InputError as error:
                log.error("capture ended with %d frames to come: %s", self.left, error)
                self.left, self._writer = 0, None
                return
            self.left -= 1
            if not self.left:
                log.info("capture complete")
                self._writer = None
