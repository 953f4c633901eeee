"""The commands as a user types them: what they print, what they leave behind, how they exit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from broker import free_port
from recipes import LEVEL, SIDE, write_tiny_recipe

from calibration.preprocess import View
from calibration.recipe import read_recipe
from calibration.recording import read_recording, recorded_frames
from calibration.scores import read_scores
from tests import verdicts
from tests.plc import Plc

STATION = """
station: test-cell
recipe: tiny.recipe
recipes: {{unsigned: allow}}
takt_ms: {takt_ms}
camera: {{kind: simulated, width_px: 64, height_px: 64, seed: 1, lost: [2]}}
engine: {{kind: onnxruntime, threads: 1}}
archive: {{folder: archive, pictures: all}}
"""


def call(package: str, *arguments: object, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", package, *(str(argument) for argument in arguments)]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, check=False
    )


def picture(level: float, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 2, (SIDE, SIDE))
    return np.clip(level * 255 + noise, 0, 255).astype(np.uint8)


def images(folder: Path, count: int, level: float = LEVEL) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        cv2.imwrite(str(folder / f"{number:03d}.png"), picture(level, number))
    return folder


def station(tmp_path: Path, extra: str = "", takt_ms: int = 300) -> Path:
    view = View(SIDE, SIDE, colour=False, reference_size=(64, 64))
    write_tiny_recipe(tmp_path / "tiny.recipe", view=view)
    path = tmp_path / "station.yaml"
    path.write_text(STATION.format(takt_ms=takt_ms) + extra)
    return path


def archived(tmp_path: Path) -> list[dict]:
    return verdicts.archived(tmp_path / "archive")


@pytest.mark.parametrize("package", ["agent", "calibration"])
def test_every_command_has_help_with_an_example(package: str) -> None:
    overview = call(package, "--help")
    assert overview.returncode == 0
    listed = overview.stdout.partition("Commands:\n")[2].partition("\n\n")[0]
    names = [line.split()[0] for line in listed.splitlines() if line[:2] == "  " and line[2] != " "]
    assert len(names) >= 2
    for name in names:
        assert f"Example: taktsight-{package} {name}" in " ".join(call(package, name, "--help").stdout.split())


def test_replay_scores_then_threshold_sets_the_recipe(tmp_path: Path) -> None:
    write_tiny_recipe(tmp_path / "tiny.recipe")
    good = images(tmp_path / "good", 40)
    done = call(
        "agent",
        "replay",
        tmp_path / "tiny.recipe",
        good,
        "--scores",
        tmp_path / "good.scores",
        "--engine",
        "onnxruntime",
    )
    assert done.returncode == 0, done.stderr
    scores = read_scores(tmp_path / "good.scores")
    assert scores.engine == "onnxruntime f32, 2 threads"
    assert len(scores.parts) == 40

    before = read_recipe(tmp_path / "tiny.recipe")
    done = call(
        "calibration", "threshold", tmp_path / "tiny.recipe", tmp_path / "good.scores", "--false-reject-rate", 0.05
    )
    assert done.returncode == 0, done.stderr
    after = read_recipe(tmp_path / "tiny.recipe")
    assert after.digest != before.digest
    assert after.detector_digest == before.detector_digest
    expected = np.sort([part.score for part in scores.parts])[38]  # rank ceil(41 * 0.95) = 39
    assert after.thresholds.score == pytest.approx(expected)
    assert after.thresholds.fitted_on == scores.engine


def test_replay_writes_a_heatmap_per_part_and_tells_labels_apart(tmp_path: Path) -> None:
    write_tiny_recipe(tmp_path / "tiny.recipe")
    images(tmp_path / "test" / "good", 3)
    images(tmp_path / "test" / "dark", 2, level=0.1)
    done = call("agent", "replay", tmp_path / "tiny.recipe", tmp_path / "test", "--heatmaps", tmp_path / "heat")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "heat" / "good").glob("*.png"))) == 3
    assert len(list((tmp_path / "heat" / "dark").glob("*.png"))) == 2
    rows = {
        line.split()[1]: line.split()[3::2]
        for line in done.stdout.splitlines()
        if line.startswith("│ ") and len(line.split()) == 11
    }
    assert rows["good"] == ["3", "3", "0", "0"]
    assert rows["dark"] == ["2", "0", "2", "0"]


def test_replay_counts_an_unreadable_image_as_no_verdict(tmp_path: Path) -> None:
    write_tiny_recipe(tmp_path / "tiny.recipe")
    good = images(tmp_path / "good", 3)
    (good / "001.png").write_bytes(b"")
    done = call("agent", "replay", tmp_path / "tiny.recipe", good, "--scores", tmp_path / "s")
    assert done.returncode == 0
    assert [part.outcome for part in read_scores(tmp_path / "s").parts] == ["pass", "no_verdict", "pass"]
    assert "1 part without verdict: bad_frame" in done.stdout


def test_replay_reads_files_of_a_12_bit_camera_at_the_depth_that_was_trained(tmp_path: Path) -> None:
    view = View(SIDE, SIDE, colour=False, reference_size=(SIDE, SIDE), bit_depth=12)
    write_tiny_recipe(tmp_path / "tiny.recipe", view=view)
    (tmp_path / "good").mkdir()
    cv2.imwrite(str(tmp_path / "good" / "0.png"), np.full((SIDE, SIDE), round(LEVEL * 4095), np.uint16))
    done = call("agent", "replay", tmp_path / "tiny.recipe", tmp_path / "good", "--scores", tmp_path / "s")
    assert done.returncode == 0, done.stderr
    (part,) = read_scores(tmp_path / "s").parts
    assert part.score == pytest.approx(0.0, abs=1e-3)


def test_run_gives_each_trigger_a_verdict_and_leaves_a_report(tmp_path: Path) -> None:
    done = call("agent", "run", station(tmp_path), "--count", 5)
    assert done.returncode == 0, done.stderr
    verdicts = archived(tmp_path)
    assert [verdict["trigger"] for verdict in verdicts] == [1, 2, 3, 4, 5]
    assert verdicts[1]["reason"] == "frame_lost"
    assert (tmp_path / "archive" / "report.html").is_file()
    assert "5 triggers, 5 verdicts" in done.stdout


def test_run_goes_on_without_a_broker_and_what_waits_can_be_exported(tmp_path: Path) -> None:
    mqtt = f"mqtt: {{topic: a/b/c/d/e, port: {free_port()}}}\n"
    done = call("agent", "run", station(tmp_path, mqtt), "--count", 4)
    assert done.returncode == 0, done.stderr
    assert len(archived(tmp_path)) == 4
    assert "4 verdicts" in done.stdout
    assert "4 verdicts and 3 heatmaps wait in the outbox" in " ".join(done.stdout.split())

    done = call("agent", "outbox", tmp_path / "station.yaml", "--export", tmp_path / "waiting.jsonl")
    assert done.returncode == 0, done.stderr
    assert "4 messages" in done.stdout
    exported = [json.loads(line) for line in (tmp_path / "waiting.jsonl").read_text().splitlines()]
    assert [(row["state"], row["intact"]) for row in exported] == [("waiting", True)] * 4
    assert [{**row["message"], "pictures": {}} for row in exported] == [
        {**message, "pictures": {}} for message in archived(tmp_path)
    ]
    assert call("agent", "outbox", tmp_path / "station.yaml", "--discard").returncode == 2


def test_verdicts_of_two_runs_are_numbered_in_one_go(tmp_path: Path) -> None:
    settings = station(tmp_path, f"mqtt: {{topic: a/b/c/d/e, port: {free_port()}}}\n")
    for _ in range(2):
        assert call("agent", "run", settings, "--count", 3).returncode == 0
    verdicts = archived(tmp_path)
    assert [verdict["seq"] for verdict in verdicts] == [1, 2, 3, 4, 5, 6]
    triggers = [verdict["trigger"] for verdict in verdicts]  # one that is late at once overtakes one that is waited for
    assert sorted(triggers[:3]) == sorted(triggers[3:]) == [1, 2, 3]
    assert len({verdict["epoch"] for verdict in verdicts}) == 1
    assert len({verdict["run"] for verdict in verdicts}) == 2


def test_a_station_that_was_never_commanded_says_so(tmp_path: Path) -> None:
    done = call("agent", "commands", station(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "no command was ever given" in done.stdout
    done = call("agent", "outbox", tmp_path / "station.yaml")
    assert done.returncode == 13
    assert "Traceback" not in done.stderr


def test_a_stop_signal_ends_run_with_every_trigger_answered(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "agent", "run", str(station(tmp_path))]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    end = time.monotonic() + 30
    while not archived(tmp_path) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output
    triggers = [verdict["trigger"] for verdict in archived(tmp_path)]
    assert sorted(triggers) == list(range(1, len(triggers) + 1))
    assert f"{len(triggers)} triggers, {len(triggers)} verdicts".encode() in output


def test_a_run_that_ends_before_its_first_part_is_no_error(tmp_path: Path) -> None:
    plc = Plc(free_port()).start()  # of which no part is heard
    trigger = f"kind: modbus, host: 127.0.0.1, port: {plc.port}, signal: coil, address: 5"
    path = station(tmp_path, f"trigger: {{{trigger}, within_ms: 3000, answer_ms: 3000}}\n")
    command = [sys.executable, "-m", "agent", "run", str(path)]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    said = ""
    while "ready: " not in said and (line := process.stdout.readline()):
        said += line
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    plc.kill()
    assert (process.returncode, "0 triggers, 0 verdicts" in rest) == (0, True), said + rest


def test_capture_makes_a_recording_that_replay_reads(tmp_path: Path) -> None:
    done = call("agent", "capture", station(tmp_path), tmp_path / "rec", "--count", 3)
    assert done.returncode == 0, done.stderr
    assert [frame.trigger_id for frame in recorded_frames(tmp_path / "rec")] == [1, 3, 4]
    assert "1 of 4 triggers brought no frame" in done.stdout
    done = call("agent", "replay", tmp_path / "tiny.recipe", tmp_path / "rec", "--scores", tmp_path / "s")
    assert done.returncode == 0, done.stderr
    assert len(read_scores(tmp_path / "s").parts) == 3


def test_ctrl_c_ends_a_capture_with_what_was_recorded_and_it_needs_no_recipe(tmp_path: Path) -> None:
    path = station(tmp_path)
    path.write_text(path.read_text().replace("{unsigned: allow}", "{keys: [not-yet.key.pub]}"))
    (tmp_path / "tiny.recipe").unlink()
    command = [sys.executable, "-m", "agent", "capture", str(path), str(tmp_path / "rec"), "--count", "100000"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    end = time.monotonic() + 30
    while len(list((tmp_path / "rec").glob("*.png"))) < 3 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    recorded = list(read_recording(tmp_path / "rec"))
    assert len(recorded) == len(list((tmp_path / "rec").glob("*.png"))) >= 3
    assert f"{len(recorded)} of 100000 parts recorded: stopped by Ctrl-C".encode() in output


def test_stored_images_that_end_before_the_count_are_recorded(tmp_path: Path) -> None:
    images(tmp_path / "stored", 2)
    path = tmp_path / "station.yaml"
    path.write_text("station: test-cell\ntakt_ms: 60\ncamera: {kind: folder, path: stored}\n")
    done = call("agent", "capture", path, tmp_path / "rec", "--count", 5)
    assert done.returncode == 0, done.stderr
    assert "2 of 5 parts recorded: the camera has no more frames" in done.stdout
    assert len(recorded_frames(tmp_path / "rec")) == 2


def test_doctor_finds_a_good_station_good_and_a_bad_one_bad(tmp_path: Path) -> None:
    done = call("agent", "doctor", station(tmp_path), "--json")
    graded = {finding["name"]: finding["grade"] for finding in json.loads(done.stdout)["findings"]}
    assert {graded[name] for name in ("station", "recipe", "engine", "outbox.folder", "audit", "broker")} == {"ok"}
    assert graded["recipe.trust"] == "warn"
    done = call("agent", "doctor", tmp_path / "station.yaml")
    assert "reproduces the trainer's answers" in done.stdout
    assert not list(tmp_path.glob("outbox*"))  # it only looks
    (tmp_path / "tiny.recipe").write_bytes(b"something else")
    done = call("agent", "doctor", tmp_path / "station.yaml")
    assert done.returncode == 1
    assert "not a recipe" in done.stdout
    path = tmp_path / "station.yaml"
    path.write_text(path.read_text().replace("recipes: {unsigned: allow}\n", ""))
    done = call("agent", "doctor", path)
    assert "recipes: {keys: [release.key.pub]}" in " ".join(done.stdout.split())  # nothing was taken for markup


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("replay", "absent.recipe", "."), 5, "give the path of a recipe"),
        (("run", "absent.yaml"), 4, "give the path of a settings file"),
        (("replay", "tiny.recipe", "nowhere"), 3, "not found: give a folder of images"),
        (("replay",), 2, "Missing argument"),
    ],
)
def test_exit_codes_mean_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int, message: str
) -> None:
    write_tiny_recipe(tmp_path / "tiny.recipe")
    monkeypatch.chdir(tmp_path)
    done = call("agent", *arguments)
    assert done.returncode == code
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_trainer_commands_have_help_and_exit_codes(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from trainer.__main__ import commands

    for name in ("fit", "evaluate", "report"):
        page = CliRunner().invoke(commands, [name, "--help"]).output
        assert f"Example: taktsight-trainer {name}" in " ".join(page.split())
    (tmp_path / "empty").mkdir()
    done = call("trainer", "fit", tmp_path / "empty", "--recipe", tmp_path / "x.recipe")
    assert done.returncode == 3
    assert "no good images found" in done.stderr


def test_an_interrupted_training_exits_130_and_leaves_no_recipe(tmp_path: Path) -> None:
    good = tmp_path / "good"
    good.mkdir()
    for number in range(40):
        cv2.imwrite(str(good / f"{number}.png"), picture(LEVEL, number))
    recipe = tmp_path / "x.recipe"
    arguments = [
        "fit",
        str(good),
        "--recipe",
        str(recipe),
        "--detector",
        "vae",
        "--size",
        "64",
        "--patience",
        "10000",
        "--epochs",
        "100000",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    checkpoint, end = tmp_path / "x.recipe.checkpoint", time.monotonic() + 60
    while not checkpoint.exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    try:
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert b"interrupted" in output
    assert b"Traceback" not in output
    assert not recipe.exists()
