"""A settings file with a mistake is refused, and the message names the key and what it needs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from calibration.errors import SettingsError
from calibration.settings import Section, read_settings


@pytest.fixture
def given(tmp_path: Path):
    """Return a function that reads text as a settings file."""

    def read(text: str) -> Section:
        (tmp_path / "station.yaml").write_text(text, encoding="utf-8")
        return read_settings(tmp_path / "station.yaml")

    return read


def refused(message: str):
    return pytest.raises(SettingsError, match=re.escape(message))


def test_values_come_back_in_their_types(given):
    top = given("takt_ms: 500\nrate: 0.5\nname: line 3\nsave: yes\nlost: [3, 14]\nkind: folder\ncamera:\n  gain: 1.5\n")
    assert (top.number("takt_ms"), type(top.number("takt_ms"))) == (500.0, float)
    assert top.number("rate", minimum=0.5, maximum=0.5) == 0.5  # both ends are allowed
    assert (top.whole("takt_ms", minimum=0, maximum=500), type(top.whole("takt_ms", minimum=0, maximum=500))) == (
        500,
        int,
    )
    assert top.text("name") == "line 3"
    assert top.flag("save") is True
    assert top.whole_list("lost") == (3, 14)
    assert top.choice("kind", ("folder", "genicam")) == "folder"
    assert top.section("camera").number("gain") == 1.5
    top.finish()


def test_absent_keys_take_their_defaults(given):
    top = given("takt_ms: 500\n")
    assert top.number("rate", 0.25) == 0.25
    assert top.whole("queue_length", 4, minimum=1, maximum=64) == 4
    assert top.text("client_id", "") == ""
    assert top.flag("save", False) is False
    assert top.whole_list("lost") == ()
    assert top.choice("kind", ("a", "b"), "b") == "b"
    assert top.path("photometric", None) is None
    assert top.section("camera").number("gain", 1.0) == 1.0
    assert not top.has("rate")


def test_a_missing_key_is_named(given):
    with refused("camera.serial: missing: add it"):
        given("camera: {gain: 1}\n").section("camera").text("serial")


def test_an_unknown_key_is_named_with_its_path_and_the_known_ones(given):
    top = given("camera:\n  gain_dB: 3\n  lens: {}\n")
    top.section("camera").number("gain_db", 0.0)
    top.section("camera")
    with refused("camera.gain_dB: unknown key; known here: gain_db"):
        top.finish()


def test_an_unknown_key_two_sections_down_is_named_with_its_path(given):
    top = given("camera:\n  light:\n    colour: red\n    strobe: 3\n")
    top.section("camera").section("light").text("colour")
    with refused("camera.light.strobe: unknown key; known here: colour"):
        top.finish()


def test_a_section_that_nobody_asked_for_is_an_unknown_key(given):
    top = given("takt_ms: 500\ncamra: {gain: 1}\n")
    top.number("takt_ms")
    with refused("camra: unknown key; known here: takt_ms"):
        top.finish()


@pytest.mark.parametrize(("text", "line"), [("a: 1\nb: 2\na: 3\n", 3), ("camera:\n  gain: 1\n  gain: 1\n", 3)])
def test_a_key_given_twice_is_refused_with_its_line(given, text, line):
    with pytest.raises(SettingsError, match=rf"station\.yaml, line {line}: '(a|gain)' is given twice: keep one"):
        given(text)


def test_a_block_may_be_merged_into_another_and_overridden(given):
    top = given("near: &near {gain: 1, lens: wide}\nfar:\n  <<: *near\n  gain: 2\n")
    assert top.section("far").number("gain") == 2
    assert top.section("far").text("lens") == "wide"


@pytest.mark.parametrize("value", ["'500'", "yes", "[1]", "", "2001-01-01", "{a: 1}"])
def test_what_is_no_number_is_refused(given, value):
    with pytest.raises(SettingsError, match=r"^takt_ms: .* found, need a number$"):
        given(f"takt_ms: {value}\n").number("takt_ms")


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_a_number_that_is_not_finite_is_refused(given, value):
    with pytest.raises(SettingsError, match=r"^takt_ms: (nan|-?inf) found, need a finite number$"):
        given(f"takt_ms: {value}\n").number("takt_ms")
    with pytest.raises(SettingsError, match="finite"):
        given(f"takt_ms: {value}\n").whole("takt_ms", minimum=0, maximum=9)


def test_a_number_out_of_range_is_refused_with_the_range(given):
    top = given("takt_ms: 5\n")
    with refused("takt_ms: 5 found, need 10 to 600000"):
        top.number("takt_ms", minimum=10, maximum=600_000)
    with refused("takt_ms: 5 found, need 10 or more"):
        top.number("takt_ms", minimum=10)
    with refused("takt_ms: 5 found, need 4.5 or less"):
        top.number("takt_ms", maximum=4.5)


def test_a_broken_number_is_refused_where_a_whole_one_is_needed(given):
    with refused("threads: 2.5 found, need a whole number"):
        given("threads: 2.5\n").whole("threads", minimum=1, maximum=8)


@pytest.mark.parametrize("value", ["12", "yes", "''", "", "[a]"])
def test_what_is_no_text_is_refused(given, value):
    with pytest.raises(SettingsError, match=r"^topic: .* found, need text \(in quotes, if it looks like a number\)$"):
        given(f"topic: {value}\n").text("topic")


@pytest.mark.parametrize("value", ["1", "'yes'", ""])
def test_what_is_no_flag_is_refused(given, value):
    with pytest.raises(SettingsError, match=r"^save: .* found, need true or false$"):
        given(f"save: {value}\n").flag("save")


def test_another_word_than_the_choices_is_refused(given):
    with refused("kind: 'gige' found, need one of folder, genicam"):
        given("kind: gige\n").choice("kind", ("folder", "genicam"))


@pytest.mark.parametrize("value", ["3", "[a]", "[1.5]", "[true]", "{1: 2}"])
def test_what_is_no_list_of_whole_numbers_is_refused(given, value):
    with pytest.raises(SettingsError, match=r"^lost: .* found, need a list of whole numbers such as \[3, 14\]$"):
        given(f"lost: {value}\n").whole_list("lost")


@pytest.mark.parametrize("value", ["3", "[a]", "''"])
def test_what_is_no_path_is_refused(given, value):
    with pytest.raises(SettingsError, match=r"^recipe: .* found, need a path$"):
        given(f"recipe: {value}\n").path("recipe", None)


def test_a_path_left_empty_is_refused_where_one_is_needed(given):
    with refused("recipe: None found, need a path"):
        given("recipe:\n").path("recipe")
    assert given("photometric:\n").path("photometric", None) is None


def test_what_is_no_block_is_refused(given):
    with refused("camera: 'fast' found, need a block of indented keys"):
        given("camera: fast\n").section("camera")


def test_relative_paths_start_at_the_settings_file(given, tmp_path: Path):
    top = given("recipe: parts/flange.recipe\narchive: {folder: /var/parts}\n")
    assert top.path("recipe") == tmp_path / "parts" / "flange.recipe"
    assert top.section("archive").path("folder") == Path("/var/parts")
    top.finish()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: [1\n", "not YAML: while parsing a flow sequence"),
        ("a:\t1\n\tb: 2\n", "not YAML"),
        ("a: 2024-13-45\n", "not YAML: month must be in 1..12"),
        ("[x]: 1\n", "not YAML: while constructing a mapping"),
        ("a: !!python/object/apply:os.system [id]\n", "not YAML: could not determine a constructor"),
        ("", "NoneType found, need a block of `key: value` lines"),
        ("- a\n", "list found, need a block of `key: value` lines"),
    ],
)
def test_a_file_that_is_no_settings_file_is_refused(given, text, reason):
    with pytest.raises(SettingsError, match=r"station\.yaml: ") as caught:
        given(text)
    assert reason in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path):
    (tmp_path / "x.yaml").write_bytes(b"name: M\xfcller\n")
    with pytest.raises(SettingsError, match=r"x\.yaml: not YAML: 'utf-8' codec can't decode"):
        read_settings(tmp_path / "x.yaml")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(SettingsError, match=r"x\.yaml: No such file or directory: give the path of a settings file"):
        read_settings(tmp_path / "x.yaml")
