"""A recording: lossless frames in a folder, one JSON line of metadata per frame in `frames.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.errors import InputError
from calibration.frame import Frame
from calibration.images import encode_png, read_image

INDEX = "frames.jsonl"
FORMAT = "taktsight.recording/1"


@dataclass(frozen=True, slots=True)
class RecordedFrame:
    """One line of the index: where the pixels are and what was known at capture."""

    file: Path
    frame_id: int
    trigger_id: int
    exposed_ns: int
    bit_depth: int
    facts: dict[str, Any]

    @property
    def part_id(self) -> str | None:
        """The part's own number, where the line gave one."""
        part_id = self.facts.get("part_id")
        return None if part_id is None else str(part_id)


class RecordingWriter:
    """Writes frames as they come; whatever was written before a crash can be read."""

    def __init__(self, folder: Path) -> None:
        """Raises InputError if the folder holds anything already or cannot be made."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held = sum(1 for _ in folder.iterdir())
        except OSError as error:
            raise InputError(f"{folder}: {error.strerror}: give a folder that can be written") from error
        if held:
            raise InputError(f"{folder}: holds {held} files already: give a new folder, recordings are never mixed")
        self._folder = folder
        self._count = 0

    def append(self, frame: Frame) -> Path:
        """Store one frame and return its image file. Raises InputError if the disk refuses."""
        pixels: NDArray[Any] = frame.pixels
        if pixels.dtype == np.float32:
            raise InputError("a recording holds the sensor's own 8 or 16 bits, found float32: record before correction")
        self._count += 1
        name = f"{self._count:06d}.png"
        line = {
            "format": FORMAT,
            "file": name,
            "frame_id": frame.frame_id,
            "trigger_id": frame.trigger_id,
            "exposed_ns": frame.exposed_ns,
            "bit_depth": frame.bit_depth,
            "facts": dict(frame.facts),
        }
        try:
            (self._folder / name).write_bytes(encode_png(pixels))
            with (self._folder / INDEX).open("a", encoding="utf-8") as index:
                index.write(json.dumps(line) + "\n")
        except OSError as error:
            raise InputError(f"{self._folder / name}: {error.strerror}: free space, then capture again") from error
        return self._folder / name


def is_recording(folder: Path) -> bool:
    """Return True if the folder holds a recording's index."""
    return (folder / INDEX).is_file()


def recorded_frames(folder: Path) -> list[RecordedFrame]:
    """Return what the index lists, in order. Raises InputError naming the line that cannot be read."""
    frames = []
    try:
        lines = (folder / INDEX).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{folder / INDEX}: {error.strerror}: give a recording that you can read") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{folder / INDEX}: not text in UTF-8 ({error.reason}): copy the recording again") from error
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            if entry["format"] != FORMAT:
                raise InputError(f"{folder / INDEX}:{number}: format {entry['format']!r} found, need {FORMAT!r}")
            frames.append(_from_entry(folder, entry))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{folder / INDEX}:{number}: not a line of a recording ({error}): remove the line if a crash cut it"
            ) from error
    return frames


def read_recording(folder: Path) -> Iterator[Frame]:
    """Yield the frames of a recording, pixels as captured."""
    for entry in recorded_frames(folder):
        yield Frame(
            pixels=read_image(entry.file),
            frame_id=entry.frame_id,
            trigger_id=entry.trigger_id,
            exposed_ns=entry.exposed_ns,
            received_ns=0,
            bit_depth=entry.bit_depth,
            facts=entry.facts,
        )


def _from_entry(folder: Path, entry: dict[str, Any]) -> RecordedFrame:
    name = str(entry["file"])
    if Path(name).name != name or name == "..":
        raise ValueError(f"{name!r} points out of the recording, need a file name")
    return RecordedFrame(
        file=folder / name,
        frame_id=int(entry["frame_id"]),
        trigger_id=int(entry["trigger_id"]),
        exposed_ns=int(entry["exposed_ns"]),
        bit_depth=int(entry["bit_depth"]),
        facts=dict(entry["facts"]),
    )
