from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from agent.config import read_station
from calibration.errors import SettingsError
from calibration.signing import make_key

STATION = """
station: cell1
recipe: flange.recipe
recipes: {unsigned: allow}
takt_ms: 500
camera: {kind: simulated, seed: 3, lost: [4, 9]}
"""


def station(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "station.yaml"
    path.write_text(text)
    return path


def test_the_shortest_station_takes_the_documented_defaults(tmp_path: Path) -> None:
    settings = read_station(station(tmp_path, STATION))
    assert settings.name == "cell1"
    assert settings.recipe == tmp_path / "flange.recipe"
    assert settings.beat.deadline_ms == 450.0
    assert settings.beat.on_no_verdict == "reject"
    assert settings.mqtt is None
    assert settings.archive is None
    assert settings.camera.line is not None
    assert settings.camera.line.lost == (4, 9)
    assert (settings.engine.kind, settings.engine.precision, settings.engine.threads) == ("auto", "f32", 2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("takt: 5", "takt: unknown key"),
        ("engine: {gain_dB: 3}", r"engine\.gain_dB: unknown key"),
        ("engine: {precision: int8}", r"engine\.precision: 'int8' found, need one of f32, bf16"),
        ("deadline_ms: 9000", "deadline_ms: 9000 found, need 1 to 2000"),
        ("on_no_verdict: ignore", "on_no_verdict: 'ignore' found, need one of reject, pass, stop"),
        ("mqtt: {host: broker}", r"mqtt\.topic: missing"),
        ("mqtt: {topic: a/+/c}", r"mqtt\.topic"),
        ("mqtt: {topic: a/b, port: 99999}", r"mqtt\.port: 99999 found"),
        ("archive: {folder: x, pictures: some}", r"archive\.pictures"),
        ("recipes: {unsigned: perhaps}", r"recipes\.unsigned: 'perhaps' found, need one of refuse, allow"),
        ("recipes: {key: [a]}", r"recipes: no keys found, unsigned: refuse, need whose recipes run here"),
        ("recipes: {keys: [absent.pub]}", r"recipes\.keys: .*absent\.pub: No such file or directory"),
        ("commands: {recipes: folder}", r"commands\.recipes: unknown key"),
        (r'station: "cell\a"', r"station: 'cell\\x07' found, need a name of printable characters"),
        (r'station: "a\nb"', r"station: 'a\\nb' found"),
        (r'station: "\ud800"', r"station: '\\ud800' found"),
        ("queue_length: 2.5", "queue_length: 2.5 found, need a whole number"),
    ],
)
def test_a_wrong_key_is_named_with_its_path(tmp_path: Path, line: str, message: str) -> None:
    block = line.partition(":")[0]
    others = "".join(kept + "\n" for kept in STATION.splitlines() if kept.partition(":")[0] != block)
    with pytest.raises(SettingsError, match=message):
        read_station(station(tmp_path, others + line + "\n"))


def test_a_station_that_does_not_say_whose_recipes_it_runs_is_told_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        read_station(station(tmp_path, STATION.replace("recipes: {unsigned: allow}\n", "")))
    assert str(caught.value) == (
        "recipes: not found, need whose recipes run here: write `recipes: {keys: [release.key.pub]}` with the public "
        "key of who signs them (taktsight-trainer keygen), or `recipes: {unsigned: allow}` to run recipes that nobody "
        "signed"
    )


def test_keys_lie_beside_the_settings_and_unsigned_recipes_are_refused_by_default(tmp_path: Path) -> None:
    made = make_key(tmp_path / "release.key")
    text = STATION.replace("{unsigned: allow}", "{keys: [release.key.pub]}")
    settings = read_station(station(tmp_path, text))
    assert [key.key_id for key in settings.recipes.trust.keys] == [made.key_id]
    assert not settings.recipes.trust.unsigned
    assert settings.recipes.folder == tmp_path / "recipes" / "cell1"
    assert settings.digest == hashlib.sha256(text.encode()).hexdigest()


def test_a_camera_of_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"camera\.kind: 'usb' found, need one of simulated, folder"):
        read_station(station(tmp_path, STATION.replace("simulated", "usb")))


def test_the_demo_stations_are_valid() -> None:
    demo = Path(__file__).parents[2] / "demo"
    assert read_station(demo / "line.yaml").mqtt is not None
    assert read_station(demo / "learn.yaml").mqtt is None
