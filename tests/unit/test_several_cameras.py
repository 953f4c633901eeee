"""One station.yaml with several cameras: what each station's settings are, and what cannot be meant."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from agent.config import read_station, read_stations
from agent.doctor.doctor import _settings
from agent.doctor.machine import Case, Machine
from agent.engines.command import _is_recipe
from agent.health.top import _told_by
from calibration.errors import SettingsError

CELL = """
station: cell7
recipe: flange.recipe
recipes: {unsigned: allow, folder: state/recipes}
takt_ms: 500
mqtt: {topic: acme/plant1/hall2/line3/cell7, consumers: [mes]}
sparkplug: {group: plant1, edge_node: line3}
outbox: {folder: state/outbox}
archive: {folder: state/archive, pictures: none}
cameras:
  top:
    camera: {kind: genicam, serial: "1"}
  side:
    recipe: side.recipe
    takt_ms: 1000
    camera: {kind: genicam, serial: "2"}
    archive: {pictures: all}
    health: {port: 9700}
    output: {kind: file, file: gate}
"""
DOCS = Path(__file__).parents[2] / "docs" / "camera.md"


@pytest.fixture
def cell(tmp_path):
    """Return a function that writes a file of several cameras, with a text in it replaced, and returns its path."""

    def write(old="", new="", text=CELL):
        assert old in text
        path = tmp_path / "cell.yaml"
        path.write_text(text.replace(old, new, 1) if old else text)
        return path

    return write


def test_each_camera_is_a_station_with_what_is_said_of_all_told_apart_by_its_name(cell, tmp_path):
    top, side = read_stations(cell()).values()
    assert (top.name, side.name) == ("cell7-top", "cell7-side")
    assert [one.mqtt.topic for one in (top, side)] == [f"acme/plant1/hall2/line3/{one.name}" for one in (top, side)]
    assert [one.sparkplug.edge_node for one in (top, side)] == ["line3-top", "line3-side"]
    for one, name in ((top, "top"), (side, "side")):
        state = tmp_path / "state"
        folders = (one.outbox.folder, one.archive.folder, one.recipes.folder)
        assert folders == (state / "outbox" / name, state / "archive" / name, state / "recipes" / name)
        assert one.commands.captures == tmp_path / "captures" / one.name  # not given
    assert (top.health.port, top.output) == (9464, None)


def test_what_is_said_of_one_camera_goes_before_and_is_taken_as_it_is(cell, tmp_path):
    top, side = read_stations(cell()).values()
    assert (top.recipe, side.recipe) == (tmp_path / "flange.recipe", tmp_path / "side.recipe")
    assert (top.beat.takt_ms, side.beat.takt_ms, side.beat.deadline_ms) == (500, 1000, 900)
    assert (top.archive.pictures, side.archive.pictures) == ("none", "all")
    assert side.health.port == 9700
    assert side.mqtt.consumers == top.mqtt.consumers == ("mes",)
    assert side.output.file == tmp_path / "gate"


def test_ports_are_counted_from_the_one_of_all_and_none_stays_none(cell):
    other = "    health: {port: 9700}\n"
    assert [one.health.port for one in read_stations(cell(other)).values()] == [9464, 9465]
    for port, ports in ((7000, [7000, 7001]), (0, [0, 0])):
        text = CELL.replace(other, "") + f"health: {{port: {port}}}\n"
        assert [one.health.port for one in read_stations(cell(text=text)).values()] == ports


def test_the_path_of_one_camera_is_its_station_and_the_files_own_is_none(cell):
    path = cell()
    assert read_station(path / "side") == read_stations(path)["side"]
    assert read_stations(path / "side") == {}
    assert read_station(path / "side", path.read_bytes()).data == path.read_bytes()
    with pytest.raises(SettingsError, match=r"cameras: 2 found, need one here: name it, cell.yaml/top, cell.yaml/side"):
        read_station(path)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("takt_ms: 1000", "takt: 1000", r"cameras\.side: takt: unknown key"),
        ("takt_ms: 500", "takt_ms: 5", r"cameras\.top: takt_ms: 5 found, need 10 to"),
        ("takt_ms: 500", "takt_ms: 500\ncamera: {kind: genicam}", "camera: found for all cameras, need one for each"),
        ("takt_ms: 500", "takt_ms: 500\noutput: {}", r"output: .* move it below cameras\.top"),
        ("  side:", "  a side:", "cameras: 'a side' found, need names of letters"),
        ("9700", "9464", r"cameras\.side: health\.port: 9464 is that of top, too: give it its own"),
        ('serial: "2"', 'serial: "1"', r"cameras\.side: camera\.serial: 1 is that of top, too"),
        (', serial: "2"', "", r"cameras\.side: camera\.serial: missing: add it, to tell the cameras apart"),
        ("pictures: all", "folder: state/archive/top", r"cameras\.side: archive\.folder: .* is that of top, too"),
        ("health: {port: 9700}", "station: cell7-top", r"cameras\.side: station: cell7-top is that of top, too"),
        ("    health: {port: 9700}", "    outbox: 5", r"cameras\.side: outbox: 5 found, need a block"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_camera_and_the_key(cell, old, new, told):
    with pytest.raises(SettingsError, match=f"^{told}"):
        read_stations(cell(old, new))


COILS = "output: {kind: modbus, host: plc, coil: 3, heartbeat_coil: 4}"
PIN, PIN_TRIGGER = "output: {kind: gpio, line: 17}", "trigger: {kind: gpio, line: 17}"


@pytest.mark.parametrize(
    ("top", "side", "told"),
    [
        (COILS, COILS, r"output\.coil: coil 3 of plc:502 unit 1 is output\.coil of top, too: give it its own"),
        (
            COILS,
            "output: {kind: modbus, host: PLC, coil: 4}",
            r"output\.coil: .* is output\.heartbeat_coil of top",
        ),
        (COILS, "output: {kind: modbus, host: plc, unit: 2, coil: 3}", None),
        (PIN, PIN, r"output\.line: /dev/gpiochip0 17 is output\.line of top, too"),
        (PIN, "output: {kind: gpio, line: 17, chip: /dev/gpiochip1}", None),
        (PIN_TRIGGER, PIN, r"output\.line: /dev/gpiochip0 17 is trigger\.line of top, too"),
        (PIN_TRIGGER, PIN_TRIGGER, r"trigger\.line: /dev/gpiochip0 17 is trigger\.line of top, too"),
    ],
)
def test_no_two_cameras_have_the_same_coil_or_pin(cell, top, side, told):
    text = CELL.replace('serial: "1"}', f'serial: "1"}}\n    {top}').replace("output: {kind: file, file: gate}", side)
    if told is None:
        assert len(read_stations(cell(text=text))) == 2
        return
    with pytest.raises(SettingsError, match=rf"^cameras\.side: {told}"):
        read_stations(cell(text=text))


@pytest.mark.parametrize("cameras", ["cameras: 3", "cameras: {}", "cameras: {top: 5}", "cameras: [top]"])
def test_a_block_of_cameras_that_is_none_is_refused(cell, cameras):
    with pytest.raises(SettingsError, match=r"cameras.* found, need a block"):
        read_stations(cell(text=CELL.partition("cameras:")[0] + cameras))


def test_a_camera_that_the_file_does_not_have_is_told(cell, tmp_path):
    with pytest.raises(SettingsError, match=r"cell.yaml/nose: no such camera: need one of cell.yaml/top, cell.yaml/si"):
        read_station(cell() / "nose")
    alone = tmp_path / "alone.yaml"
    lines = "station: a\nrecipe: a\nrecipes: {unsigned: allow}\ntakt_ms: 500\ncamera: {kind: simulated}\n"
    alone.write_text(lines)
    assert read_stations(alone) == {}
    with pytest.raises(SettingsError, match=r"alone.yaml/top: no such camera: need .*alone.yaml: it has no cameras"):
        read_station(alone / "top")


def test_the_example_of_the_docs_is_one(tmp_path):
    section = DOCS.read_text().partition("## Several cameras")[2]
    example = re.search(r"^```yaml\n(.*?)^```", section, re.MULTILINE | re.DOTALL)[1]
    (tmp_path / "cell.yaml").write_text(example.replace("keys: [release.key.pub]", "unsigned: allow"))
    stations = read_stations(tmp_path / "cell.yaml")
    assert list(stations) == list(yaml.safe_load(example)["cameras"])
    for name, station in stations.items():
        assert station.name in section, name


def test_a_block_that_is_endless_by_aliases_is_refused_at_once(cell):
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    with pytest.raises(SettingsError, match=r"cameras: .* found, need a block with one name per camera"):
        read_stations(cell(text=bomb + "cameras: *a39\n"))


# ---- the commands that take a station.yaml ---------------------------------------------------------------------------


def test_the_doctor_looks_at_every_camera_of_the_file(cell):
    cases = []
    found = list(_settings(cell(), Machine(Path("/")), cases))
    assert [finding.found for finding in found] == [
        "cell7-top: takt 500 ms, deadline 450 ms",
        "cell7-side: takt 1000 ms, deadline 900 ms",
    ]
    assert [(case.station.name, case.file.name) for case in cases] == [("cell7-top", "top"), ("cell7-side", "side")]


def test_one_unit_runs_all_cameras_of_its_file(tmp_path):
    (tmp_path / "etc/taktsight").mkdir(parents=True)
    file = tmp_path / "etc/taktsight/cell7.yaml"
    file.write_text(CELL)
    stations = read_stations(file)
    assert {Case(Machine(tmp_path), stations[name], file / name).unit for name in stations} == {
        "taktsight-agent@cell7.service"
    }


def test_top_asks_the_camera_that_was_named(cell):
    assert _told_by(cell() / "side") == ("cell7-side", 9700)
    with pytest.raises(SettingsError, match=r"cameras: 2 found, need one here: name it, cell.yaml/top"):
        _told_by(cell())


def test_an_engine_is_made_for_the_camera_that_was_named(cell, tmp_path):
    (tmp_path / "flange.recipe").touch()
    sources = (cell(), cell() / "top", tmp_path / "flange.recipe")
    assert [_is_recipe(source) for source in sources] == [False, False, True]
