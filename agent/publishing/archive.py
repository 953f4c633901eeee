"""What stays at the station: one JSON line per verdict, and pictures of the parts worth a second look.

Nobody depends on a picture. So where the disk runs short none is written and the oldest ones go, before the outbox on
the same disk has to use its reserve.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from agent.publishing.verdict_files import VerdictFile
from agent.verdict import Outcome, Verdict
from calibration.errors import InputError
from calibration.frame import Frame, reflectance
from calibration.heatmap import overlay

log = logging.getLogger(__name__)

PICTURES = "pictures"
PARTIAL = ".partial"  # behind the name of a picture that is not all there yet
LONGEST_SIDE = 512  # px of an archived picture
QUALITY = 88
SHED_BYTES = 2**20  # of pictures at a time where the disk is full
FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class ArchiveSettings:
    """Where, of which parts, how much."""

    folder: Path
    pictures: str = "rejects"  # none | rejects (and parts without verdict) | all
    max_mb: float = 1000.0  # of pictures; the oldest go first
    keep_days: int = 0  # of verdict lines; 0: for ever


def free_bytes(folder: Path) -> float:
    """Return what the folder's disk has left; infinity where it does not say, as some network shares."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize if disk.f_blocks else float("inf")


class Archive:
    """Appends verdicts; a disk that refuses is counted and logged, and never holds up the line. One thread only."""

    def __init__(
        self,
        settings: ArchiveSettings,
        *,
        least_free_mb: float = 0.0,
        free_bytes: Callable[[Path], float] = free_bytes,
    ) -> None:
        """least_free_mb: what pictures leave of the disk to others. Raises InputError if the folder cannot be made."""
        self._settings = settings
        self._least_free = least_free_mb * 1e6
        self._free_bytes = free_bytes
        self._verdicts = VerdictFile(settings.folder, settings.keep_days)
        self._pictures: deque[tuple[Path, int]] = deque()
        self._bytes = 0
        self._refusing = False
        self._gives_way = False
        self.failures = 0  # verdicts that could not be stored, or not with all their pictures
        folder = settings.folder / PICTURES
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob(f"*.jpg{PARTIAL}"):  # of a process that was killed
                path.unlink(missing_ok=True)
            for path in sorted(folder.glob("*.jpg"), key=lambda path: path.stat().st_mtime_ns):
                self._remember(path, path.stat().st_size)
        except OSError as error:
            raise InputError(f"{settings.folder}: {error.strerror}: give the archive a folder it can write") from error

    def store(self, message: dict[str, Any], verdict: Verdict, frame: Frame | None, map_threshold: float) -> None:
        """Append the message, with the names of its pictures under `pictures`; the line is written without them too."""
        names: dict[str, str] = {}
        refusal: OSError | cv2.error | None = None
        try:
            try:
                self._store_pictures(names, message, verdict, frame, map_threshold)
            finally:
                self._append({**message, "pictures": names})
        except (OSError, cv2.error) as error:  # OpenCV: a frame of a shape that is no picture, as of a wrong camera
            refusal = error
        self._note(refusal)

    def make_room(self) -> None:
        """Delete the oldest pictures, as many as the disk lacks of what they leave to others."""
        with contextlib.suppress(OSError):  # a disk that is gone: `store` tells of it
            lacking = self._lacking()
            if lacking > 0 and self._shed(lacking) and not self._gives_way:
                log.warning("archive %s: the disk runs short: the oldest pictures go", self._settings.folder)
                self._gives_way = True
            elif lacking < -self._least_free:  # twice of what it should have: it is over
                self._gives_way = False

    def triggers(self, run: str, most: int) -> set[int]:
        """Return which triggers of a run are among the last `most` lines."""
        return self._verdicts.triggers(run, most)

    def _lacking(self) -> float:
        """Return how many bytes the disk lacks of what pictures leave to others, below 0 where it has more."""
        return self._least_free - self._free_bytes(self._settings.folder)

    def _store_pictures(
        self,
        names: dict[str, str],
        message: dict[str, Any],
        verdict: Verdict,
        frame: Frame | None,
        map_threshold: float,
    ) -> None:
        """Write the wanted pictures and add each to `names` once it is on the disk."""
        wanted = self._settings.pictures
        if wanted == "none" or (wanted == "rejects" and verdict.outcome is Outcome.PASS):
            return
        if self._lacking() > 0:
            raise OSError(errno.ENOSPC, f"pictures leave {self._least_free / 1e6:g} MB of the disk to others")
        stem = f"{message['epoch']}-{message['seq']:08d}"
        if verdict.picture is not None and verdict.anomaly_map is not None:
            picture = overlay(_fitted(verdict.picture, enlarge=True), verdict.anomaly_map, map_threshold)
            names["heatmap"] = self._write(f"{stem}-heatmap.jpg", picture)
        if frame is not None and frame.pixels.size:
            pixels = _fitted(reflectance(frame.pixels, frame.bit_depth), enlarge=False)
            names["frame"] = self._write(f"{stem}-frame.jpg", _gray_levels(pixels))
        self._shed_to(self._settings.max_mb * 1e6)

    def _append(self, entry: dict[str, Any]) -> None:
        try:
            self._verdicts.append(entry)
        except OSError as error:
            if error.errno not in FULL or not self._shed(SHED_BYTES):
                raise
            self._verdicts.append(entry)

    def _write(self, name: str, picture: NDArray[np.uint8]) -> str:
        stored = picture if picture.ndim == 2 else np.asarray(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        _, data = cv2.imencode(".jpg", stored, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
        path = self._settings.folder / PICTURES / name
        path.parent.mkdir(exist_ok=True)  # somebody may have deleted all pictures to make room
        partial = path.with_name(path.name + PARTIAL)
        try:
            partial.write_bytes(data.tobytes())
            partial.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            if error.errno in FULL:
                self._shed(SHED_BYTES)
            raise
        self._remember(path, len(data))
        return f"{PICTURES}/{name}"

    def _remember(self, path: Path, size: int) -> None:
        self._pictures.append((path, size))
        self._bytes += size

    def _shed(self, size: float) -> bool:
        """Delete the oldest pictures, `size` bytes of them at least or all; False if there was none."""
        return bool(self._pictures) and self._shed_to(max(0.0, self._bytes - size))

    def _shed_to(self, most_bytes: float) -> bool:
        shed = False
        while self._bytes > most_bytes and self._pictures:
            path, size = self._pictures.popleft()
            self._bytes -= size
            shed = True
            path.unlink(missing_ok=True)
        return shed

    def _note(self, refusal: OSError | cv2.error | None) -> None:
        """Count a refusal; log when refusals begin and when they are over."""
        folder = self._settings.folder
        if refusal is not None:
            self.failures += 1
            if not self._refusing:
                log.error("archive %s: %s: verdicts or pictures are not archived", folder, refusal)
        elif self._refusing:
            log.warning("archive %s: written again, %d verdicts so far were not archived whole", folder, self.failures)
        self._refusing = refusal is not None


def _fitted(pixels: NDArray[np.float32], *, enlarge: bool) -> NDArray[np.float32]:
    """Return (H, W) or (H, W, 3) with its longer side at LONGEST_SIDE, a smaller one as it is if not to enlarge."""
    height, width = pixels.shape[:2]
    scale = LONGEST_SIDE / max(height, width)
    if scale >= 1.0 and not enlarge:
        return pixels
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    way = cv2.INTER_AREA if scale < 1.0 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(pixels, size, interpolation=way), dtype=np.float32)


def _gray_levels(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return reflectance as 0..255; what is not a number is black."""
    return (np.clip(np.nan_to_num(pixels), 0.0, 1.0) * 255.0).astype(np.uint8)
