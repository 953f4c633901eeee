"""What fit and report leave on the disk and say, when something goes wrong after the training too."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from recipes import write_tiny_recipe
from rich.console import Console

from calibration.errors import InputError, RecipeError
from calibration.recipe import read_recipe, write_recipe
from trainer import race_session, session
from trainer.fit import FitRequest
from trainer.learning import Options
from trainer.race import RaceRequest

SIDE = 64


def draw(folder: Path, count: int, seed: int) -> Path:
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for number in range(count):
        picture = np.full((SIDE, SIDE), 60.0)
        cv2.circle(picture, (32, 32), 24, 170.0, -1)
        noisy = np.clip(picture + generator.normal(0, 4, picture.shape), 0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / f"{number}.png"), noisy)
    return folder


def learn(data: Path, recipe: Path) -> None:
    options = Options(memory_entries=60, epochs=2, latent=8)
    request = FitRequest(recipe, detector="vae", height=SIDE, width=SIDE, registration="off", options=options)
    session.learn(data, request, part_pattern=None, bit_depth=None, product=None)


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """Return what was printed, in one line."""
    return " ".join("".join(capsys.readouterr()).split())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a set with a test image that is cut off."""
    root = tmp_path_factory.mktemp("set") / "flange"
    draw(root / "train" / "good", 12, 0)
    draw(root / "test" / "good", 2, 1)
    draw(root / "test" / "crack", 2, 2)
    whole = (root / "test" / "crack" / "1.png").read_bytes()
    (root / "test" / "crack" / "1.png").write_bytes(whole[: len(whole) // 2])
    return root


def test_a_test_image_that_cannot_be_read_does_not_cost_the_training(data: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(InputError, match=r"crack.1\.png: the image is cut off"):
        learn(data, tmp_path / "a.recipe")
    recipe = read_recipe(tmp_path / "a.recipe")
    assert recipe.metrics["evaluation"] is None
    assert len(recipe.metrics["good_scores"]) > 0
    assert recipe.report == (tmp_path / "a.recipe.html").read_text(encoding="utf-8")
    assert not list(tmp_path.glob("*checkpoint*"))
    told = " ".join("".join(capsys.readouterr()).split())
    assert "is written, without figures of the test images" in told


def test_a_decision_is_told_plainly_and_is_no_warning(tmp_path: Path, capsys) -> None:
    folder = draw(tmp_path / "flange", 12, 0)
    request = FitRequest(
        tmp_path / "a.recipe",
        height=SIDE,
        width=SIDE,
        registration="off",
        options=Options(memory_entries=60, turned="on"),
        takt_ms=1e6,
    )
    session.learn(folder, request, part_pattern=None, bit_depth=None, product=None)
    printed = "".join(capsys.readouterr())
    learnt = read_recipe(request.recipe)
    copies, weight = learnt.training["decided"]
    took = learnt.training["frame_to_score"]
    assert "turned copies" in copies and "the layout counts" in weight and "99 of 100 within" in took
    for label, text in (("decided", copies), ("decided", weight), ("frame to score", took)):
        first_words = text[:16]
        (line,) = [line for line in printed.splitlines() if first_words in line]
        assert label in line and "note:" not in line
    warnings = re.search(r'<ul class="notes">(.*?)</ul>', learnt.report, re.DOTALL)
    assert warnings is not None
    assert not any(word in warnings[1] for word in ("copies", "layout", "deadline"))
    assert f"<dt>frame to score</dt><dd>{took}</dd>" in learnt.report

    session.measure(request.recipe, _measured(tmp_path), json_file=None, report=tmp_path / "r.html", bit_depth=None)
    assert weight in (tmp_path / "r.html").read_text(encoding="utf-8")


def _measured(root: Path) -> Path:
    """Return a folder of test images."""
    draw(root / "set" / "train" / "good", 5, 3)
    draw(root / "set" / "test" / "good", 2, 4)
    return root / "set"


def test_what_is_left_out_of_a_training_is_named_and_shown(tmp_path: Path, capsys) -> None:
    folder = draw(tmp_path / "flange", 20, 0)
    strange = cv2.imread(str(folder / "7.png"), cv2.IMREAD_GRAYSCALE)
    strange[20:44, 10:50] = 255
    cv2.imwrite(str(folder / "stranger.png"), strange)
    options = Options(memory_entries=60)
    request = FitRequest(tmp_path / "a.recipe", height=SIDE, width=SIDE, registration="off", options=options)
    session.learn(folder, request, part_pattern=None, bit_depth=None, product=None)
    report = (tmp_path / "a.recipe.html").read_text(encoding="utf-8")
    assert report.count("stranger.png") > 1 and "left out of the training" in report
    assert "(1): stranger.png." in " ".join("".join(capsys.readouterr()).split())


def test_a_product_that_is_not_utf8_is_refused_before_the_training(data: Path, tmp_path: Path) -> None:
    product = os.fsdecode(b"pr\xe9cis")
    with pytest.raises(InputError, match=r"product 'pr\ufffdcis' is not UTF-8, need a name that is: set the terminal"):
        session.learn(data, FitRequest(tmp_path / "a.recipe"), part_pattern=None, bit_depth=None, product=product)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("product", ["", "x" * 201, "a\nb"])
def test_a_product_that_no_recipe_holds_is_refused_before_the_training(data: Path, tmp_path: Path, product) -> None:
    with pytest.raises(InputError, match="characters found, need 1 to 200, none of them a control character"):
        session.learn(data, FitRequest(tmp_path / "a.recipe"), part_pattern=None, bit_depth=None, product=product)
    assert not list(tmp_path.iterdir())


def test_a_folder_whose_name_is_no_products_is_refused_before_the_training(tmp_path: Path) -> None:
    folder = draw(tmp_path / ("x" * 201), 6, 0)
    with pytest.raises(InputError, match=r"of 201 characters found, .*: give another with --product"):
        learn(folder, tmp_path / "a.recipe")
    assert not (tmp_path / "a.recipe").exists()


def test_a_folder_in_the_place_of_the_recipe_is_refused_before_the_training(data: Path, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    with pytest.raises(InputError, match=r"recipes: a folder, need a file's path .*recipes/NAME\.recipe"):
        learn(data, tmp_path / "recipes")


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_read(data: Path, tmp_path: Path, monkeypatch):
    def refused(**where: Path) -> None:
        raise OSError(30, "Read-only file system", str(where["dir"]))

    monkeypatch.setattr(session.tempfile, "TemporaryFile", refused)
    monkeypatch.setattr(session, "read_dataset", None)
    with pytest.raises(InputError, match=rf"{tmp_path.name}: Read-only file system: give a folder that can be written"):
        learn(data, tmp_path / "a.recipe")


def test_a_second_fit_of_a_recipe_is_refused_and_the_first_leaves_no_lock(data: Path, tmp_path: Path, monkeypatch):
    def second(*_: object) -> None:
        monkeypatch.setattr(session, "fit", None)
        learn(data, tmp_path / "a.recipe")

    monkeypatch.setattr(session, "fit", second)
    with pytest.raises(InputError, match=r"another fit makes .*a\.recipe \(process \d+\): wait for its end"):
        learn(data, tmp_path / "a.recipe")
    assert not list(tmp_path.iterdir())


def test_a_report_of_another_threshold_than_the_recipe_has_now_says_so(data: Path, tmp_path: Path, capsys) -> None:
    file = tmp_path / "a.recipe"
    with pytest.raises(InputError):
        learn(data, file)
    capsys.readouterr()
    session.taken_out(file, tmp_path / "first.html")
    assert "threshold" not in "".join(capsys.readouterr())
    recipe = read_recipe(file)
    moved = replace(recipe.thresholds, score=2.0 * recipe.thresholds.score, fitted_on="onnxruntime f32, 2 threads")
    write_recipe(file, replace(recipe, thresholds=moved))
    session.taken_out(file, tmp_path / "second.html")
    told = " ".join("".join(capsys.readouterr()).split())
    assert f"was made with the threshold {recipe.thresholds.score:.4g}, the recipe's is now {moved.score:.4g}" in told


def test_only_the_fits_own_thresholds_count_what_the_fit_left_out(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        learn(data, tmp_path / "a.recipe")
    recipe = read_recipe(tmp_path / "a.recipe")
    recipe = replace(recipe, training={**recipe.training, "left_out": ["1.png", "2.png"]})
    assert "the 2 left out counted as good" in session.rate_told(recipe)
    afterwards = replace(recipe.thresholds, fitted_on="onnxruntime f32, 2 threads")
    assert "left out" not in session.rate_told(replace(recipe, thresholds=afterwards))


def test_a_recipe_without_a_report_gives_none(tmp_path: Path) -> None:
    write_tiny_recipe(tmp_path / "a.recipe", report="")
    with pytest.raises(RecipeError, match="holds no report: make one with taktsight-trainer evaluate --report"):
        session.taken_out(tmp_path / "a.recipe", tmp_path / "a.html")
    assert not (tmp_path / "a.html").exists()


@pytest.mark.parametrize("checkpoint", [True, False])
def test_an_interrupted_training_says_that_it_can_be_gone_on_with(
    data: Path, tmp_path: Path, monkeypatch, capsys, checkpoint: bool
) -> None:
    def interrupted(*_: object) -> None:
        if checkpoint:
            (tmp_path / "a.recipe.checkpoint").write_bytes(b"state")
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        learn(data, tmp_path / "a.recipe")
    assert ("a.recipe.checkpoint holds what was trained so far: go on with --resume" in told(capsys)) == checkpoint


@pytest.mark.parametrize("mark", ["[blue]", "[/]", "[tief]"])
def test_square_brackets_are_shown_as_they_are(tmp_path: Path, monkeypatch, capsys, mark: str) -> None:
    """They are neither taken for a style nor end a fit whose recipe is written."""
    root = tmp_path / "flange"
    draw(root / "train" / "good", 8, 0)
    kind = mark.replace("/", "-")
    draw(root / "test" / f"loch {kind}", 2, 1)
    draw(root / "test" / "good", 2, 2)
    file = tmp_path / f"out {kind}.recipe"
    monkeypatch.setattr(session, "console", Console(width=500, highlight=False, emoji=False))
    wanted = FitRequest(file, detector="variation", height=SIDE, width=SIDE, registration="off")
    session.learn(root, wanted, part_pattern=None, bit_depth=None, product=f"flange {mark}")
    shown = told(capsys)
    assert f"flange {mark}: variation" in shown
    assert f"loch {kind} " in shown
    assert f"out {kind}.recipe (" in shown


def test_a_race_for_a_recipe_that_no_product_of_such_a_name_has_is_refused_before_the_first_heat(
    tmp_path: Path, monkeypatch
) -> None:
    folder = draw(tmp_path / ("x" * 201), 6, 0)
    wanted = RaceRequest(data=folder, out=tmp_path / "race", takt_ms=50.0)
    monkeypatch.setattr(race_session.race, "carried_out", lambda *_: pytest.fail("a heat was run"))
    with pytest.raises(InputError, match="of 201 characters found"):
        race_session.run(wanted, tmp_path / "a.recipe", None)
