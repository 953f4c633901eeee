"""What stays at the station: one JSON line per verdict, and pictures of the parts worth a second look."""

from __future__ import annotations

import json
import logging
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from agent.verdict import Outcome, Verdict
from calibration.errors import InputError
from calibration.frame import Frame, reflectance
from calibration.heatmap import overlay

log = logging.getLogger(__name__)

VERDICTS = "verdicts.jsonl"
PICTURES = "pictures"
LONGEST_SIDE = 512  # px of an archived picture
QUALITY = 88


@dataclass(frozen=True, slots=True)
class ArchiveSettings:
    """Where, of which parts, how much."""

    folder: Path
    pictures: str = "rejects"  # none | rejects (and parts without verdict) | all
    max_mb: float = 1000.0  # of pictures; the oldest go first, verdict lines never


class Archive:
    """Appends verdicts; a disk that refuses is counted and logged, and never holds up the line."""

    def __init__(self, settings: ArchiveSettings) -> None:
        """Raises InputError if the folder cannot be made."""
        self._settings = settings
        self._pictures: deque[tuple[Path, int]] = deque()
        self._bytes = 0
        self.failures = 0
        folder = settings.folder / PICTURES
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob("*.jpg"), key=lambda path: path.stat().st_mtime_ns):
                self._remember(path, path.stat().st_size)
        except OSError as error:
            raise InputError(f"{settings.folder}: {error.strerror}: give the archive a folder it can write") from error

    def store(self, message: dict[str, Any], verdict: Verdict, frame: Frame | None, map_threshold: float) -> None:
        """Append the message, with the names of its pictures under `pictures`."""
        try:
            names = self._store_pictures(message, verdict, frame, map_threshold)
            with (self._settings.folder / VERDICTS).open("a", encoding="utf-8") as file:
                file.write(json.dumps({**message, "pictures": names}) + "\n")
        except OSError as error:
            self.failures += 1
            if self.failures == 1:
                log.error("archive %s: %s: verdicts are not archived", self._settings.folder, error.strerror)

    def _store_pictures(
        self, message: dict[str, Any], verdict: Verdict, frame: Frame | None, map_threshold: float
    ) -> dict[str, str]:
        wanted = self._settings.pictures
        if wanted == "none" or (wanted == "rejects" and verdict.outcome is Outcome.PASS):
            return {}
        stem = f"{message['epoch']}-{message['seq']:08d}"
        names = {}
        if frame is not None:
            names["frame"] = self._write(f"{stem}-frame.jpg", _shown(reflectance(frame.pixels, frame.bit_depth)))
        if verdict.picture is not None and verdict.anomaly_map is not None:
            picture = overlay(_enlarged(verdict.picture), verdict.anomaly_map, map_threshold)
            names["heatmap"] = self._write(f"{stem}-heatmap.jpg", picture)
        self._shed()
        return names

    def _write(self, name: str, picture: NDArray[np.uint8]) -> str:
        stored = picture if picture.ndim == 2 else np.asarray(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        _, data = cv2.imencode(".jpg", stored, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
        path = self._settings.folder / PICTURES / name
        path.write_bytes(data.tobytes())
        self._remember(path, len(data))
        return f"{PICTURES}/{name}"

    def _remember(self, path: Path, size: int) -> None:
        self._pictures.append((path, size))
        self._bytes += size

    def _shed(self) -> None:
        while self._bytes > self._settings.max_mb * 1e6 and self._pictures:
            path, size = self._pictures.popleft()
            path.unlink(missing_ok=True)
            self._bytes -= size


def _shown(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    shrink = min(1.0, LONGEST_SIDE / max(pixels.shape[:2]))
    size = (round(pixels.shape[1] * shrink), round(pixels.shape[0] * shrink))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA) if shrink < 1.0 else pixels
    return (np.clip(small, 0.0, 1.0) * 255.0).astype(np.uint8)


def _enlarged(picture: NDArray[np.float32]) -> NDArray[np.float32]:
    grow = max(1, round(LONGEST_SIDE / max(picture.shape[:2])))
    return np.asarray(cv2.resize(picture, None, fx=grow, fy=grow, interpolation=cv2.INTER_LINEAR), dtype=np.float32)
