"""The demo's parts before a GigE Vision camera get the verdicts that they get from the simulated one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from gentl import linecam_program, producer
from recipes import SIDE, write_tiny_recipe
from verdicts import archived

from agent.config import read_station
from calibration.preprocess import View

pytest.importorskip("harvesters", reason="harvesters is not installed: pip install 'taktsight[genicam]'")

sys.path.append(str(Path(__file__).resolve().parents[2] / "demo"))
import line_camera

PROJECT = Path(__file__).resolve().parents[2]
PARTS, LOST, LATE = 14, 9, 11
CAMERA = f"""\
camera:
  kind: simulated
  seed: 7
  lot: 2                     # which parts
  width_px: 96
  height_px: 96
  defect_share: 0.5
  saturated: [6]
  lost: [{LOST}]             # triggers whose frame never arrives
  late: [{LATE}]
  late_ms: 450

"""
STATION = f"""\
station: cell1
recipe: tiny.recipe
recipes: {{unsigned: allow}}
takt_ms: 400
{CAMERA}engine: {{kind: onnxruntime, threads: 1}}
archive: {{folder: archive, pictures: none}}
health: {{port: 0}}
"""


def verdicts(folder: Path, text: str) -> dict[int, dict]:
    """Return the verdicts of a run, by their triggers."""
    write_tiny_recipe(folder / "tiny.recipe", view=View(SIDE, SIDE, colour=False, reference_size=(96, 96)))
    (folder / "station.yaml").write_text(text)
    command = [sys.executable, "-m", "agent", "run", str(folder / "station.yaml"), "--count", str(PARTS)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    messages = archived(folder / "archive")
    assert [message["trigger"] for message in messages] == list(range(1, PARTS + 1))
    return {message["trigger"]: message for message in messages}


def test_each_part_gets_the_verdict_and_the_score_that_the_simulated_camera_gives_it(tmp_path):
    producer(), linecam_program()  # built, or skipped
    drawn, seen = tmp_path / "drawn", tmp_path / "seen"
    drawn.mkdir(), seen.mkdir()
    wanted = verdicts(drawn, STATION)
    line = read_station(drawn / "station.yaml").camera.line
    with line_camera.LineCamera(line, PARTS, seen / "pictures"):
        found = verdicts(seen, line_camera.before_the_camera(STATION))
    for trigger in wanted:
        told = [
            (message[trigger]["outcome"], message[trigger]["reason"], message[trigger].get("score"))
            for message in (wanted, found)
        ]
        assert told[0] == told[1], trigger
    assert [trigger for trigger in found if found[trigger]["reason"] == "frame_lost"] == [LOST, LATE]
    assert len({message.get("score") for message in found.values()}) > PARTS // 2


def test_only_the_block_of_the_camera_is_changed():
    changed = line_camera.before_the_camera(STATION)
    before, after = STATION.split(CAMERA)
    assert changed.startswith(before + "camera:\n  kind: genicam\n")
    assert changed.endswith(after)
    demo = (PROJECT / "demo" / "line.yaml").read_text()
    assert line_camera.before_the_camera(demo).partition("\n\nengine:")[2] == demo.partition("\n\nengine:")[2]


def test_what_the_producer_is_built_with_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SystemExit, match=r"make, gcc, pkg-config not found, .*: apt-get install libaravis-dev"):
        line_camera.build()
