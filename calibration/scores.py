"""Scores of many parts in one file: written by `taktsight-agent replay`, read by `taktsight-calibration threshold`.

JSON lines: a header that says which detector on which engine, then one line per image. Lines with the same part_id are
of one part; a line without is a part of its own. Thresholds are thereby fitted on the path that will be used, precision
and all.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from calibration.errors import InputError

FORMAT = "taktsight.scores/1"


@dataclass(frozen=True, slots=True)
class PartScore:
    """One image of a part. score and map_peak are None where nothing was scored."""

    name: str
    label: str  # folder name, "" where the images lay in one plain folder
    outcome: str
    reason: str
    score: float | None
    map_peak: float | None
    part_id: str | None = None  # images of one part share it; None: the only image of its part


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of one detector on one engine."""

    detector_digest: str
    engine: str  # "openvino f32, 2 threads"
    parts: tuple[PartScore, ...]


def write_scores(path: Path, scores: Scores) -> None:
    """Write scores in one step. Raises InputError if the file cannot be written."""
    header = {"format": FORMAT, "detector_digest": scores.detector_digest, "engine": scores.engine}
    lines = [json.dumps(header), *(json.dumps(_entry(part)) for part in scores.parts)]
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: {error.strerror}: give a file that can be written") from error


def read_scores(path: Path) -> Scores:
    """Return the scores of a file. Raises InputError naming the line that cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}: give a file that taktsight-agent replay --scores wrote") from error
    try:
        header = json.loads(lines[0]) if lines else {}
        if header.get("format") != FORMAT:
            raise InputError(f"{path}: format {header.get('format')!r} found, need {FORMAT!r}")
        parts = _parts(path, lines[1:])
        return Scores(str(header["detector_digest"]), str(header["engine"]), parts)
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: its first line is not a header of scores: {error}") from error


def _entry(part: PartScore) -> dict[str, Any]:
    """Return a line; without part_id where there is none, as older versions read it."""
    entry = asdict(part)
    if part.part_id is None:
        del entry["part_id"]
    return entry


def _parts(path: Path, lines: Sequence[str]) -> tuple[PartScore, ...]:
    parts = []
    for number, line in enumerate(lines, 2):
        try:
            parts.append(_part(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}:{number}: not a line of scores: {error}") from error
    return tuple(parts)


def _part(entry: dict[str, Any]) -> PartScore:
    part = PartScore(**entry)
    texts = (part.name, part.label, part.outcome, part.reason, *(() if part.part_id is None else (part.part_id,)))
    numbers = [value for value in (part.score, part.map_peak) if value is not None]
    if not all(isinstance(text, str) for text in texts) or not all(type(value) in (int, float) for value in numbers):
        raise TypeError(f"{entry} found, need texts, and numbers for score and map_peak")
    return part
