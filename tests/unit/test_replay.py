"""What replay writes of a recording: which part each image is of."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from agent.engines.engine import EngineSettings, open_engine
from agent.line.pipeline import Pipeline
from agent.replay import part_score, replay, replay_items
from calibration.frame import Frame
from calibration.recording import RecordingWriter
from tests.recipes import SIDE, tiny_recipe


def silent(what: str, done: int, total: int) -> None:
    pass


def test_the_score_of_a_recorded_image_names_its_part(tmp_path: Path) -> None:
    writer = RecordingWriter(tmp_path / "rec")
    for number, part_id in enumerate(["A1", "A1", None], 1):
        facts = {} if part_id is None else {"part_id": part_id}
        writer.append(Frame(np.full((SIDE, SIDE), 128, np.uint8), number, number, 0, 0, 8, facts))
    recipe = tiny_recipe()
    items, photometric = replay_items(tmp_path / "rec")
    pipeline = Pipeline(recipe, open_engine(recipe, EngineSettings("onnxruntime")), photometric)
    found = [part_score(*judged) for judged in replay(items, pipeline, recipe.view, silent)]
    assert [part.part_id for part in found] == ["A1", "A1", None]
    assert all(part.score is not None for part in found)
