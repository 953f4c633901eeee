"""Scores survive their file, and a file of something else is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from calibration.errors import InputError
from calibration.scores import PartScore, Scores, read_scores, write_scores

SCORES = Scores(
    detector_digest="ab" * 32,
    engine="openvino f32, 2 threads",
    parts=(
        PartScore("good/1.png", "good", "pass", "", 0.1 + 0.2, 1e-17),
        PartScore("good/Ölfleck\n\u2028.png", "good", "reject", "score", 3.5, 7.0),
        PartScore("2.png", "", "no_verdict", "bad_frame", None, None),
        PartScore("3.png", "", "pass", "", 0.5, 0.5, "A 17"),
    ),
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return a file of three scores."""
    write_scores(tmp_path / "good.scores", SCORES)
    return tmp_path / "good.scores"


def test_every_digit_and_every_name_survives_the_file(file: Path):
    assert read_scores(file) == SCORES
    assert [path.name for path in file.parent.iterdir()] == ["good.scores"]


def test_a_line_names_its_part_only_where_it_is_known(file: Path):
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[1:]]
    assert [line.get("part_id", "none") for line in lines] == ["none", "none", "none", "A 17"]


def test_an_older_file_is_replaced(file: Path):
    write_scores(file, Scores("cd", "onnxruntime f32", ()))
    assert read_scores(file) == Scores("cd", "onnxruntime f32", ())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "format None found, need 'taktsight.scores/1'"),
        ('{"format": "taktsight.recording/1"}', "format 'taktsight.recording/1' found, need 'taktsight.scores/1'"),
        ("name,score\n1.png,0.5", "its first line is not a header of scores"),
        ("[1, 2]", "its first line is not a header of scores"),
        ('{"format": "taktsight.scores/1"}', "its first line is not a header of scores: 'detector_digest'"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path: Path, text, reason):
    (tmp_path / "x").write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_scores(tmp_path / "x")
    assert str(caught.value).startswith(f"{tmp_path / 'x'}: {reason}")


@pytest.mark.parametrize(
    "change",
    [
        {"score": "0.5"},
        {"score": True},
        {"map_peak": [1]},
        {"label": None},
        {"name": 3},
        {"colour": "red"},
        {"part_id": 7},
    ],
)
def test_a_foreign_line_is_refused_with_file_and_line(file: Path, change):
    lines = file.read_text(encoding="utf-8").splitlines()
    lines[2] = json.dumps({**json.loads(lines[2]), **change})
    file.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(InputError, match=r"good\.scores:3: not a line of scores: "):
        read_scores(file)


def test_a_cut_last_line_is_named_with_file_and_line(file: Path):
    text = file.read_text(encoding="utf-8")
    file.write_text(text[:-20], encoding="utf-8")
    with pytest.raises(InputError, match=r"good\.scores:5: not a line of scores"):
        read_scores(file)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path):
    (tmp_path / "x").write_bytes(b"\x89PNG")
    with pytest.raises(InputError, match="give a file that taktsight-agent replay --scores wrote"):
        read_scores(tmp_path / "x")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"No such file or directory.*: give a file that taktsight-agent replay"):
        read_scores(tmp_path / "none")


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="No such file or directory: give a file that can be written"):
        write_scores(tmp_path / "none" / "x", SCORES)
