"""What station.yaml says of a GenICam camera is read, checked, and handed to the camera's process unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.cameras.genicam import GenicamCamera
from agent.cameras.genicam_settings import GenicamSettings
from agent.config import read_station
from calibration.errors import SettingsError

STATION = "station: a\nrecipe: a\nrecipes: {unsigned: allow}\ntakt_ms: 500\ncamera: "


def read(tmp_path: Path, camera: str):
    (tmp_path / "station.yaml").write_text(STATION + camera)
    return read_station(tmp_path / "station.yaml")


def test_the_settings_are_read_and_reach_the_process_unchanged(tmp_path):
    text = (
        "{kind: genicam, producer: x.cti, serial: S1, pixel_format: Mono12p, region: [0, 8, 640, 480],"
        " exposure_us: 500, white_balance: {red: 1.5}, chunks: [Gain], nodes: [BlackLevel=4],"
        " trigger: {source: Line1, activation: RisingEdge, delay_us: 100, counter: Counter0, transfer_ms: 8}}"
    )
    station = read(tmp_path, text)
    settings = station.camera.genicam
    assert settings == GenicamSettings.from_dict(settings.as_dict())
    assert settings.producer == tmp_path / "x.cti" == station.camera.producer
    assert (settings.region, settings.white_balance) == ((0, 8, 640, 480), {"red": 1.5})
    assert not station.camera.simulated
    assert station.beat.by_camera
    camera = station.camera.open()
    assert isinstance(camera, GenicamCamera)
    assert camera.lag_ns == 8_000_000


def test_a_camera_that_the_agent_triggers_does_not_open_parts(tmp_path):
    assert not read(tmp_path, "{kind: genicam}").beat.by_camera
    assert read(tmp_path, "{kind: genicam, trigger: {source: free_run}}").beat.by_camera
    assert not read(tmp_path, "{kind: simulated}").beat.by_camera


@pytest.mark.parametrize(
    ("camera", "message"),
    [
        ("{kind: genicam, region: [0, 0, 640]}", r"camera\.region: \[0, 0, 640\] found, need \[x, y, width, height\]"),
        ("{kind: genicam, nodes: [Gamma]}", r"camera\.nodes: .* need Name=value"),
        (
            "{kind: genicam, trigger: {activation: Up}}",
            r"camera\.trigger\.activation: 'Up' found, need one of RisingEdge",
        ),
        ("{kind: genicam, gain: 3}", r"camera\.gain: unknown key"),
        ("{kind: genicam, seed: 3}", r"camera\.seed: unknown key"),
    ],
)
def test_a_wrong_key_of_the_camera_is_named(tmp_path, camera, message):
    with pytest.raises(SettingsError, match=message):
        read(tmp_path, camera)
