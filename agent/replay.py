"""Images through the production path, without a line: for thresholds, for regression, for "what if"."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from agent.line.pipeline import Pipeline
from agent.verdict import Outcome, Reason, Verdict
from calibration.errors import InputError
from calibration.frame import Frame
from calibration.heatmap import overlay
from calibration.images import labelled_images, read_image
from calibration.photometric import Photometric, recorded_photometric
from calibration.preprocess import View
from calibration.recording import is_recording, recorded_frames
from calibration.scores import PartScore


@dataclass(frozen=True, slots=True)
class ReplayItem:
    """One image file to be inspected."""

    file: Path
    label: str  # folder name, "" in a plain folder or a recording
    part_id: str | None
    bit_depth: int | None

    @property
    def name(self) -> str:
        """The file's name below what was replayed."""
        return f"{self.label}/{self.file.name}" if self.label else self.file.name


def replay_items(source: Path) -> tuple[list[ReplayItem], Photometric]:
    """Return the images of a folder, of folders by label, or of a recording, with its photometric correction.

    Raises InputError if there are none.
    """
    if is_recording(source):
        frames = recorded_frames(source)
        items = [ReplayItem(frame.file, "", frame.part_id, frame.bit_depth) for frame in frames]
        return items, recorded_photometric(source)
    return [ReplayItem(file, label, None, None) for file, label in labelled_images(source)], Photometric()


def replay(
    items: list[ReplayItem], pipeline: Pipeline, view: View, progress: Callable[[str, int, int], None]
) -> Iterator[tuple[ReplayItem, Verdict]]:
    """Yield each item's verdict; a file that cannot be read is a no_verdict that says so, never left out."""
    for count, item in enumerate(items, 1):
        yield item, _verdict(item, count, pipeline, view)
        progress("replay", count, len(items))


def part_score(item: ReplayItem, verdict: Verdict) -> PartScore:
    """Return the line that a score file holds of one image of a part."""
    peak = None if verdict.anomaly_map is None else float(verdict.anomaly_map.max())
    outcome, reason = str(verdict.outcome), str(verdict.reason)
    return PartScore(item.name, item.label, outcome, reason, verdict.score, peak, item.part_id)


def write_heatmap(folder: Path, item: ReplayItem, verdict: Verdict, map_threshold: float) -> None:
    """Write the part with its map over it as folder/label/name.png; nothing where nothing was scored."""
    if verdict.picture is None or verdict.anomaly_map is None:
        return
    path = folder / item.label / f"{item.file.stem}.png"
    picture = overlay(verdict.picture, verdict.anomaly_map, map_threshold)
    _, data = cv2.imencode(".png", np.ascontiguousarray(picture[:, :, ::-1]))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.tobytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: give a folder that can be written") from error


def _verdict(item: ReplayItem, number: int, pipeline: Pipeline, view: View) -> Verdict:
    try:
        pixels = read_image(item.file)
    except InputError as error:
        return Verdict(number, Outcome.NO_VERDICT, Reason.BAD_FRAME, str(error), part_id=item.part_id)
    depth = item.bit_depth or (8 if pixels.dtype == np.uint8 else max(9, view.bit_depth))  # a file does not tell
    facts = {} if item.part_id is None else {"part_id": item.part_id}
    return pipeline.inspect(Frame(pixels, number, number, 0, 0, depth, facts))
