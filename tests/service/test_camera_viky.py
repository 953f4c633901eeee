"""The simulator that comes with genicam: another producer than ours, without trigger and clock, in free run."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from agent.__main__ import commands
from agent.cameras.genicam import GenicamCamera
from agent.cameras.genicam_settings import FREE_RUN, GenicamSettings, TriggerSettings
from agent.errors import CameraError

genicam = pytest.importorskip("genicam", reason="genicam is not installed: pip install 'taktsight[genicam]'")
pytest.importorskip("harvesters", reason="harvesters is not installed: pip install 'taktsight[genicam]'")

VIKY = Path(genicam.__file__).parent / "viky.cti"
SETTINGS = GenicamSettings(
    producer=VIKY,
    serial="1",
    pixel_format="Mono8",
    region=(0, 0, 320, 240),
    rate_hz=50.0,
    trigger=TriggerSettings(source=FREE_RUN),
)


def test_frames_come_by_themselves_each_a_part_of_its_own():
    camera = GenicamCamera(SETTINGS)
    camera.start()
    try:
        frames = [camera.next_frame(5.0) for _ in range(20)]
    finally:
        camera.stop()
    parts = [frame.trigger_id for frame in frames]
    assert parts == list(range(parts[0], parts[0] + 20))
    assert {(frame.size, frame.bit_depth, frame.facts["format"]) for frame in frames} == {((240, 320), 8, "Mono8")}
    assert frames[0].facts["camera"] == "1"
    assert frames[0].facts["producer"].startswith("viky.cti")
    assert len({frame.pixels.tobytes() for frame in frames}) > 10  # a ball that bounces


def test_a_camera_without_a_trigger_is_told_apart_from_a_wrong_setting():
    with pytest.raises(CameraError, match=r"camera\.trigger\.source: this camera has no TriggerSource: free_run"):
        GenicamCamera(GenicamSettings(producer=VIKY, serial="1")).start()


def test_three_cameras_of_one_producer_are_one_too_many():
    with pytest.raises(CameraError, match=r"3 cameras found \(0 .*\), need one: give camera\.serial"):
        GenicamCamera(GenicamSettings(producer=VIKY)).start()


def test_the_command_lists_cameras_shows_nodes_and_takes_a_picture(tmp_path):
    def run(*words: str) -> str:
        done = CliRunner().invoke(commands, ["camera", *words], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    station = tmp_path / "station.yaml"
    station.write_text(
        "station: a\nrecipe: a\nrecipes: {unsigned: allow}\ntakt_ms: 500\ncamera: {kind: genicam, serial: '2', "
        f"producer: {VIKY}, pixel_format: Mono8, rate_hz: 60, trigger: {{source: free_run}}}}\n"
    )
    listed = run("list", "--producer", str(VIKY))
    assert listed.count("Viky") >= 3
    assert "AcquisitionFrameRate" in run("show", str(station), "--like", "framerate")
    assert "PixelFormat = Mono8" in run("set", str(station))
    assert "400 x 400 px, Mono8, 8 bits" in run("snap", str(station), "--out", str(tmp_path / "picture.png"))
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert "frame to frame" in run("bench", str(station), "--count", "5")
