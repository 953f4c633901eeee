"""Two GigE Vision cameras in one agent: one is killed and comes back, the other inspects every part meanwhile."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from broker import wait_until
from gentl import Linecam, producer, write_picture
from plant import Process
from recipes import SIDE, write_tiny_recipe
from verdicts import archived

from calibration.preprocess import View

pytest.importorskip("harvesters", reason="harvesters is not installed: pip install 'taktsight[genicam]'")

CELL = """
station: cell7
recipe: tiny.recipe
recipes: {{unsigned: allow}}
takt_ms: 250
engine: {{kind: onnxruntime, threads: 1}}
archive: {{folder: archive, pictures: none}}
health: {{port: 0}}
cameras:
  top: {{camera: {{kind: genicam, producer: {producer}, serial: {top}, pixel_format: Mono8}}}}
  side: {{camera: {{kind: genicam, producer: {producer}, serial: {side}, pixel_format: Mono8}}}}
"""


def reasons(folder: Path, name: str) -> list[str]:
    """Return the reasons of one camera's verdicts in order, as far as they are written: each trigger once."""
    messages = archived(folder / "archive" / name)
    assert [message["trigger"] for message in messages] == list(range(1, len(messages) + 1))
    assert {message["run"] for message in messages} == {message["run"] for message in messages[:1]}
    return [message["reason"] for message in messages]


def test_a_camera_that_dies_and_comes_back_costs_the_other_no_part(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(4):
        write_picture(pictures / f"{number}.pgm", np.full((SIDE, SIDE), 120 + number, np.uint8))
    write_tiny_recipe(tmp_path / "tiny.recipe", view=View(SIDE, SIDE, colour=False, reference_size=(SIDE, SIDE)))
    agent = Process(["-m", "agent", "run", str(tmp_path / "cell.yaml")], tmp_path / "log")
    with Linecam(pictures) as top, Linecam(pictures) as side:
        text = CELL.format(producer=producer(), top=top.serial, side=side.serial)
        (tmp_path / "cell.yaml").write_text(text)
        agent.start()
        try:
            for name in ("top", "side"):
                wait_until(lambda name=name: reasons(tmp_path, name)[-4:] == ["score"] * 4, 90)
            side.kill()
            before = len(reasons(tmp_path, "top"))
            wait_until(lambda: "camera_down" in reasons(tmp_path, "side"), 30)
            assert reasons(tmp_path, "top")[before:].count("camera_down") == 0
            side.start()
            wait_until(lambda: reasons(tmp_path, "side")[-4:] == ["score"] * 4, 60)
        finally:
            agent.stop(60)
    found = {name: reasons(tmp_path, name) for name in ("top", "side")}
    lost = [reason for reason in found["top"] if reason not in ("score", "late", "stopping")]
    assert lost == [], agent.output
    assert set(found["side"]) >= {"score", "camera_down"}
