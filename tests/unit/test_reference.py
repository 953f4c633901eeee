"""The reference of station.yaml says what the code reads: every key, its range, its default."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from agent.config import read_station
from calibration.errors import SettingsError

sys.path.append(str(Path(__file__).parents[2] / "docs"))
import make_reference

DOCS = Path(__file__).parents[2] / "docs"

PAGE = make_reference.PAGE.read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `([\w.]+)`(?: \(([\w, ]+)\))? \| (.*?) \| (.*?) \|", PAGE, re.MULTILINE)
LIMITS = [
    (key, kind, float(limit[0]), 1 if span[: limit.start()].endswith("to ") else -1)
    for key, kind, span, _ in ROWS
    for limit in re.finditer(r"-?\d+(?:\.\d+)?(?= to | ?\w*$)", span)
]


@pytest.fixture
def shortest(tmp_path):
    """Return the page's own station.yaml, read, with more lines."""

    def read(more=""):
        text = re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1]
        (tmp_path / "station.yaml").write_text(text + more, encoding="utf-8")
        return read_station(tmp_path / "station.yaml")

    return read


def test_the_page_is_what_the_code_says():
    assert make_reference.page() == PAGE, "run `python docs/make_reference.py`"


def test_every_key_has_its_line_and_no_line_is_left_over():
    every, _ = make_reference.keys_and_kinds()
    assert sorted(every) == sorted(make_reference.WORDS)
    assert sorted(key for key, *_ in ROWS) == sorted(every)


def test_the_shortest_file_runs_on_the_defaults_that_the_page_names(shortest, tmp_path):
    station = shortest()
    assert (station.name, station.beat.deadline_ms) == ("cell7", 0.9 * 500)
    assert station.outbox.folder == tmp_path / "outbox" / "cell7"
    assert station.recipes.folder == tmp_path / "recipes" / "cell7"
    assert station.commands.captures == tmp_path / "captures" / "cell7"
    assert (station.mqtt, station.sparkplug, station.archive, station.output) == (None, None, None, None)


@pytest.mark.parametrize("missing", ["station", "recipe", "takt_ms", "camera"])
def test_what_the_shortest_file_has_is_needed(tmp_path, missing):
    lines = make_reference.SHORTEST.splitlines(keepends=True)
    (tmp_path / "station.yaml").write_text("".join(line for line in lines if not line.startswith(missing)))
    with pytest.raises(SettingsError, match=missing):
        read_station(tmp_path / "station.yaml")


@pytest.mark.parametrize(("key", "kind", "limit", "sign"), LIMITS)
def test_a_value_just_beyond_a_limit_of_the_page_is_refused_by_its_key(tmp_path, key, kind, limit, sign):
    """Read with the ordinary reader, not with the one that made the page."""
    blocks = {"station": "a", "recipe": "a", "takt_ms": 500, "recipes": {"unsigned": "allow"}}
    blocks["camera"] = {"folder": {"kind": "folder", "path": "a"}, "genicam": {"kind": "genicam"}}.get(
        kind, {"kind": "simulated"}
    )
    blocks |= {"mqtt": {"topic": "a/b"}, "archive": {"folder": "a"}}
    gates = {"modbus": {"kind": "modbus", "host": "a", "coil": 1}, "gpio": {"kind": "gpio", "line": 1}}
    if key.startswith("output."):
        blocks["output"] = gates[kind.partition(",")[0]]
    signal = {"kind": "modbus", "host": "a", "signal": "coil", "address": 1}
    if key.startswith("trigger."):
        blocks["trigger"] = {"kind": "gpio", "line": 1} if kind == "gpio" else signal
    *sections, last = key.split(".")
    block = blocks
    for section in sections:
        block = block.setdefault(section, {})
    block[last] = limit + sign
    (tmp_path / "station.yaml").write_text(json.dumps(blocks), encoding="utf-8")  # JSON is YAML
    with pytest.raises(SettingsError, match=rf"^{re.escape(key)}: "):
        read_station(tmp_path / "station.yaml")


def keys_of(block, above=""):
    """Yield the full name of every key that holds a value; what is said of one camera of several has no other names."""
    for camera in block.pop("cameras", {}).values() if not above else ():
        yield from keys_of(camera)
    for key, value in block.items():
        if isinstance(value, dict):
            yield from keys_of(value, f"{above}{key}.")
        else:
            yield f"{above}{key}"


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_every_example_of_station_yaml_names_keys_that_exist(page):
    for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        example = yaml.safe_load(block)
        if not {"scrape_configs", "groups"} & set(example):  # Prometheus
            assert [key for key in keys_of(example) if key not in make_reference.WORDS] == []


def test_limits_are_found_on_the_page_at_all():
    assert len(LIMITS) > 40
    assert ("camera.bit_depth", "folder", 16.0, 1) in LIMITS
    assert ("camera.light_drift", "simulated", 0.9, 1) in LIMITS
