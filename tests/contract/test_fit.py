"""From drawn good parts to a recipe, and everything that must be refused on the way."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from calibration.condition import glimpse, measured
from calibration.errors import CalibrationError, InputError
from calibration.photometric import Photometric
from calibration.preprocess import Rectangle
from calibration.recipe import read_recipe, write_recipe
from trainer import strangers
from trainer.catalogue import DETECTORS
from trainer.data import Pictures, read_dataset
from trainer.errors import TrainingError
from trainer.evaluate import held_out_images, scored_images
from trainer.fit import FitRequest, FitResult, fit
from trainer.learning import Learned, Options
from trainer.limits import fitted_thresholds, good_parts, suspicious_notes

SIDE = 64
OPTIONS = Options(memory_entries=60, epochs=2, latent=8)


def silent(what: str, done: int, total: int) -> None:
    pass


def draw(folder: Path, count: int, seed: int = 0, *, size: tuple[int, int] = (SIDE, SIDE)) -> Path:
    """Write `count` pictures of a gray disc with noise."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for number in range(count):
        cv2.imwrite(str(folder / f"{number}.png"), part(generator, size))
    return folder


def part(generator: np.random.Generator, size: tuple[int, int] = (SIDE, SIDE)) -> NDArray[np.uint8]:
    picture = np.full(size, 60.0)
    cv2.circle(picture, (size[1] // 2, size[0] // 2), 24, 170.0, -1)
    return np.clip(picture + generator.normal(0, 4, size), 0, 255).astype(np.uint8)


def request(tmp_path: Path, **changes: object) -> FitRequest:
    base = FitRequest(tmp_path / "part.recipe", height=SIDE, width=SIDE, registration="off", options=OPTIONS)
    return dataclasses.replace(base, **changes)


def learnt(tmp_path: Path, count: int = 20, **changes: object) -> FitResult:
    folder = draw(tmp_path / "good", count)
    return fit(read_dataset(folder), request(tmp_path, **changes), silent)


def test_good_parts_pass_and_a_hole_is_rejected_through_the_exported_graph(tmp_path: Path) -> None:
    root = tmp_path / "set"
    draw(root / "train" / "good", 20)
    draw(root / "test" / "good", 4, seed=1)
    hole = part(np.random.default_rng(2))
    hole[20:34, 20:34] = 0
    (root / "test" / "hole").mkdir()
    cv2.imwrite(str(root / "test" / "hole" / "0.png"), hole)
    dataset = read_dataset(root)
    result = fit(dataset, request(tmp_path), silent)
    images = scored_images(result.recipe, dataset.test, Pictures(dataset.photometric), silent)
    threshold = result.recipe.thresholds.score
    scores = {image.name: image.score for image in images}
    assert scores["test/hole/0.png"] > threshold
    assert sum(score > threshold for name, score in scores.items() if "good" in name) <= 1


@pytest.mark.parametrize("detector", ["patch_layout", "patch_memory", "vae+residual"])
def test_the_same_seed_and_data_give_the_same_digest(tmp_path: Path, detector: str) -> None:
    digests = []
    for attempt in range(2):
        torch.manual_seed(attempt)  # what happened before must not matter
        result = learnt(tmp_path / str(attempt), count=8, detector=detector)
        digests.append(write_recipe(tmp_path / f"{attempt}.recipe", result.recipe))
    assert digests[0] == digests[1]


def test_another_seed_gives_another_digest(tmp_path: Path, twenty_parts: FitResult) -> None:
    other = learnt(tmp_path, options=dataclasses.replace(OPTIONS, seed=1))
    first = write_recipe(tmp_path / "a.recipe", twenty_parts.recipe)
    assert write_recipe(tmp_path / "b.recipe", other.recipe) != first


@pytest.fixture(scope="module")
def twenty_parts(tmp_path_factory: pytest.TempPathFactory) -> FitResult:
    return learnt(tmp_path_factory.mktemp("twenty"))


def test_a_written_recipe_comes_back_the_same(tmp_path: Path, twenty_parts: FitResult) -> None:
    result = twenty_parts
    digest = write_recipe(tmp_path / "part.recipe", result.recipe)
    loaded = read_recipe(tmp_path / "part.recipe")
    assert loaded.digest == digest
    assert loaded.graph == result.recipe.graph
    assert loaded.view == result.recipe.view
    assert loaded.thresholds == result.recipe.thresholds


def test_every_good_image_is_scored_by_a_model_that_never_saw_it(twenty_parts: FitResult) -> None:
    result = twenty_parts
    assert sorted(item.name for item in result.good_items) == sorted(f"{number}.png" for number in range(20))
    assert len(held_out_images(result)) == 20


def test_too_few_good_parts_for_the_rate_set_the_nearest_rate_and_say_so(twenty_parts: FitResult) -> None:
    result = twenty_parts
    assert result.recipe.thresholds.false_reject_rate == pytest.approx(1 / 21)
    assert any("needs 79 more" in note for note in result.notes)


def test_the_threshold_is_the_conformal_rank_of_the_held_out_scores() -> None:
    scores = np.arange(1.0, 100.0)
    learned = Learned(torch.nn.Identity(), np.arange(99), scores, scores * 2, np.zeros((99, 1, 1), np.float32))
    thresholds, notes = fitted_thresholds(good_parts(learned), 0.05)
    assert (thresholds.score, thresholds.map) == (95.0, 190.0)
    assert (thresholds.good_median, thresholds.good_deviation) == (50.0, pytest.approx(1.4826 * 25))
    assert notes == []


def test_limits_of_light_and_focus_come_from_the_good_images_and_are_told(
    tmp_path: Path, twenty_parts: FitResult
) -> None:
    recipe = twenty_parts.recipe
    write_recipe(tmp_path / "part.recipe", recipe)
    limits = read_recipe(tmp_path / "part.recipe").condition
    assert limits == recipe.condition
    picture = part(np.random.default_rng(99))

    def cause(pixels: NDArray[np.uint8]) -> str | None:
        complaint = limits.complaint(measured(glimpse(pixels, 8, recipe.view, registered=False)))
        return None if complaint is None else complaint.cause

    assert cause(picture) is None
    assert cause((picture * 0.5).astype(np.uint8)) == "too_dark"
    assert cause(cv2.convertScaleAbs(picture, alpha=2.0)) == "saturated"
    told = recipe.training["condition_noticed"]
    assert (told["half the light"], told["twice the light"]) == (1.0, 1.0)


def test_what_the_limits_of_light_let_through_is_noted(tmp_path: Path) -> None:
    folder = draw(tmp_path / "good", 8)
    for number in range(8):
        file = str(folder / f"{number}.png")
        cv2.imwrite(file, cv2.convertScaleAbs(cv2.imread(file, cv2.IMREAD_GRAYSCALE), alpha=0.3 + 0.15 * number))
    result = fit(read_dataset(folder), request(tmp_path), silent)
    (text,) = [text for text in result.notes if text.startswith("light and focus")]
    assert "half the light (0% noticed)" in text


def test_a_recording_that_is_corrected_is_looked_at_before_and_after(tmp_path: Path) -> None:
    """What is at full scale is told of the sensor's own picture, brightness of the corrected one."""
    folder = draw(tmp_path / "good", 8)
    for file in folder.iterdir():
        cv2.imwrite(str(file), cv2.convertScaleAbs(cv2.imread(str(file), cv2.IMREAD_GRAYSCALE), alpha=1.2))
    dataset = read_dataset(folder)
    flat = np.full((SIDE, SIDE), 0.5, np.float32)
    flat[: SIDE // 2] = 1.0
    corrected = dataclasses.replace(dataset, photometric=Photometric(flat=flat))
    plain, changed = (fit(data, request(tmp_path), silent).recipe.condition for data in (dataset, corrected))
    assert changed.most_saturated_share == plain.most_saturated_share > 0.3
    assert changed.least_brightness != pytest.approx(plain.least_brightness, rel=0.02)


def test_a_good_image_that_stands_apart_is_named_and_a_long_tail_is_not() -> None:
    tail = np.geomspace(1.0, 4.0, 40)
    names = [f"{number}.png" for number in range(41)]
    (text,) = suspicious_notes(np.array([*tail, 7.0]), names)
    assert "(1): 40.png." in text
    assert suspicious_notes(np.array([*tail, 4.5]), names) == []


@pytest.fixture(scope="module")
def with_a_stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty good parts and one that was put there by mistake."""
    folder = draw(tmp_path_factory.mktemp("images") / "good", 20)
    strange = cv2.imread(str(folder / "7.png"), cv2.IMREAD_GRAYSCALE)
    strange[20:44, 10:50] = 255
    cv2.imwrite(str(folder / "stranger.png"), strange)
    return folder


def test_a_defective_part_among_the_good_is_left_out_and_does_not_lift_the_threshold(
    tmp_path: Path, with_a_stranger: Path, twenty_parts: FitResult
) -> None:
    result = fit(read_dataset(with_a_stranger), request(tmp_path), silent)
    (suspect,) = result.suspects
    assert suspect.item.name == "stranger.png"
    assert suspect.score > 2 * result.recipe.thresholds.score
    assert "stranger.png" not in [item.name for item in result.good_items]
    assert result.recipe.training["left_out"] == ["stranger.png"]
    assert result.recipe.training["good_images"] == 20
    assert result.recipe.thresholds.score == pytest.approx(twenty_parts.recipe.thresholds.score, rel=0.2)
    assert result.recipe.thresholds.rate_upper_bound > twenty_parts.recipe.thresholds.rate_upper_bound
    assert any("left out" in text and "(1): stranger.png." in text for text in result.notes)


def test_who_knows_better_keeps_the_suspects(tmp_path: Path, with_a_stranger: Path) -> None:
    kept = dataclasses.replace(request(tmp_path), keep_suspects=True)
    result = fit(read_dataset(with_a_stranger), kept, silent)
    assert result.suspects == ()
    assert result.recipe.training["good_images"] == 21
    assert any("stand apart" in text for text in result.notes)


@pytest.mark.parametrize("count", [1, 4])
def test_too_few_good_images_are_refused(tmp_path: Path, count: int) -> None:
    with pytest.raises(TrainingError, match=rf"{count} good images? found, need at least 5"):
        learnt(tmp_path, count=count)


def test_a_size_that_the_network_cannot_take_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="multiples of 32"):
        learnt(tmp_path, height=100)


def test_a_rate_that_is_none_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    def never(what: str, done: int, total: int) -> None:
        raise AssertionError(what)

    folder = draw(tmp_path / "good", 6)
    with pytest.raises(CalibrationError, match="need a share above 0 and below 1"):
        fit(read_dataset(folder), request(tmp_path, false_reject_rate=1.5), never)


def test_a_region_outside_the_view_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="inside the reference view of 64x64"):
        learnt(tmp_path, region=Rectangle(40, 0, 32, 32))


def test_an_ignore_mask_of_another_size_is_refused(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "mask.png"), np.zeros((32, 32), np.uint8))
    with pytest.raises(InputError, match="the mask is 32x32 px, the reference view 64x64"):
        learnt(tmp_path, ignore=tmp_path / "mask.png")


def never(what: str, done: int, total: int) -> None:
    raise AssertionError(f"{what} was begun")


@pytest.mark.parametrize("detector", [*DETECTORS, "noise_ae+residual", "vae+ssim"])
def test_an_ignore_mask_that_covers_all_is_refused_before_anything_is_learnt(tmp_path: Path, detector: str) -> None:
    cv2.imwrite(str(tmp_path / "mask.png"), np.full((SIDE, SIDE), 255, np.uint8))
    wanted = request(tmp_path, detector=detector, ignore=tmp_path / "mask.png")
    with pytest.raises(TrainingError, match="leave nothing to look at: white is where not to look"):
        fit(read_dataset(draw(tmp_path / "good", 6)), wanted, never)


def test_an_ignored_zone_over_the_whole_region_is_refused(tmp_path: Path) -> None:
    zone = {"name": "clamp", "ignore": True, "polygon": [[0, 0], [40, 0], [40, 64], [0, 64]]}
    drawn = {"format": "taktsight.zones/1", "zones": [zone]}
    (tmp_path / "zones.json").write_text(json.dumps(drawn), encoding="utf-8")
    wanted = request(tmp_path, region=Rectangle(0, 0, 32, 32), zones=tmp_path / "zones.json", detector="variation")
    with pytest.raises(TrainingError, match="the ignored zones leave nothing to look at"):
        fit(read_dataset(draw(tmp_path / "good", 6)), wanted, never)


@pytest.fixture
def with_labels(tmp_path: Path) -> Path:
    """Ten good parts, two images of each, and labelled defects of which one is no image and one of another size."""
    root = tmp_path / "set"
    draw(root / "train" / "good", 20)
    for number, file in enumerate(sorted((root / "train" / "good").iterdir())):
        file.rename(file.with_name(f"part{number // 2:02d}_{number % 2}.png"))
    draw(root / "train" / "crack", 6, seed=1)
    for file in (root / "train" / "crack").iterdir():
        file.rename(file.with_name(f"part9{file.name}"))
    (root / "train" / "crack" / "a.png").write_bytes(b"no image")
    cv2.imwrite(str(root / "train" / "crack" / "part97.png"), part(np.random.default_rng(2), (SIDE, 32)))
    return root


@pytest.mark.parametrize("pattern", [None, r"part\d+"])
def test_a_detector_that_needs_no_labels_never_looks_at_them(
    tmp_path: Path, with_labels: Path, pattern: str | None
) -> None:
    dataset = read_dataset(with_labels, part_pattern=pattern)
    training = fit(dataset, request(tmp_path, detector="variation"), silent).recipe.training
    assert training["defects"] == {"crack": 8}
    assert training["learnt_defects"] == "none"


@pytest.mark.parametrize(
    "changes", [{"detector": "cnn"}, {"detector": "vae+siamese"}, {"detector": "variation", "threshold": "best_f1"}]
)
def test_what_needs_labels_names_the_one_that_cannot_be_used(
    tmp_path: Path, with_labels: Path, changes: dict[str, str]
) -> None:
    with pytest.raises(InputError, match=r"crack/a\.png: not a readable image"):
        fit(read_dataset(with_labels), request(tmp_path, **changes), silent)
    dataset = read_dataset(with_labels, part_pattern=r"part\d+")
    with pytest.raises(InputError, match=r"crack/a\.png: the part pattern finds nothing in its name, and defects that"):
        fit(dataset, request(tmp_path, **changes), never)
    (with_labels / "train" / "crack" / "a.png").unlink()
    told = r"crack/part97\.png: a labelled defect of 32x64 px found, the good images have 64x64: take it"
    with pytest.raises(InputError, match=told):
        fit(read_dataset(with_labels), request(tmp_path, **changes), silent)


def test_images_of_several_sizes_are_used_with_a_note(tmp_path: Path) -> None:
    folder = draw(tmp_path / "good", 10)
    cv2.imwrite(str(folder / "wide.png"), part(np.random.default_rng(3), (SIDE, 96)))
    result = fit(read_dataset(folder), request(tmp_path), silent)
    assert any("2 sizes, from 64x64 to 96x64" in note for note in result.notes)
    assert not result.recipe.view.fixed_size


def test_a_truncated_image_stops_the_training_and_is_named(tmp_path: Path) -> None:
    folder = draw(tmp_path / "good", 8)
    whole = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"3\.png: the image is cut off"):
        fit(read_dataset(folder), request(tmp_path), silent)


def test_an_interrupted_training_goes_on_where_it_stood_with_the_same_result(tmp_path: Path) -> None:
    options = dataclasses.replace(OPTIONS, epochs=4)
    whole = learnt(tmp_path / "a", detector="vae", options=options)

    class Interrupted(Exception):
        pass

    def interrupt(what: str, done: int, total: int) -> None:
        if what.startswith("vae") and done == 2:
            raise Interrupted

    folder = draw(tmp_path / "b" / "good", 20)
    wanted = request(tmp_path / "b", detector="vae", options=options)
    with pytest.raises(Interrupted):
        fit(read_dataset(folder), wanted, interrupt)
    resumed = fit(read_dataset(folder), dataclasses.replace(wanted, resume=True), silent)
    assert resumed.recipe.graph == whole.recipe.graph
    assert not list((tmp_path / "b").glob("part.recipe.*"))


def test_a_second_training_without_a_stranger_goes_on_where_it_stood(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(strangers, "strangers", lambda scores, looks: np.array([0]))
    monkeypatch.setattr("trainer.fit.ROUNDS", 2)
    options = dataclasses.replace(OPTIONS, epochs=4)
    folder = draw(tmp_path / "good", 20)
    wanted = request(tmp_path, detector="vae", options=options)
    told: list[int] = []

    class Interrupted(Exception):
        pass

    def listen(what: str, done: int, total: int) -> None:
        if what.startswith("vae"):
            told.append(done)

    def interrupt(what: str, done: int, total: int) -> None:
        listen(what, done, total)
        if told.count(2) == 2:
            raise Interrupted

    whole = fit(read_dataset(folder), wanted, silent)
    with pytest.raises(Interrupted):
        fit(read_dataset(folder), wanted, interrupt)
    told.clear()
    resumed = fit(read_dataset(folder), dataclasses.replace(wanted, resume=True), listen)
    assert told == [4, 3, 4, 4]  # the first one was whole, the second had two epochs to go
    assert len(resumed.suspects) == 1
    assert resumed.recipe.graph == whole.recipe.graph
    assert not list(tmp_path.glob("part.recipe.*"))


def test_a_training_on_other_images_is_not_gone_on_with(tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(what: str, done: int, total: int) -> None:
        if what.startswith("vae"):
            raise Interrupted

    folder, wanted = draw(tmp_path / "good", 20), request(tmp_path, detector="vae")
    with pytest.raises(Interrupted):
        fit(read_dataset(folder), wanted, interrupt)
    draw(folder, 21, seed=5)
    with pytest.raises(TrainingError, match="learnt from other images: start without --resume"):
        fit(read_dataset(folder), dataclasses.replace(wanted, resume=True), silent)


def test_the_recipe_tells_what_was_asked_and_what_was_done(tmp_path: Path) -> None:
    changes = {"keep_suspects": True, "false_reject_rate": 0.1, "most_images": 50}
    training = learnt(tmp_path, **changes).recipe.training
    assert training["asked"] == {**changes, "threshold": "false_reject_rate", "takt_ms": None, "ignore": None}


def test_parts_photographed_twice_never_stand_on_both_sides(tmp_path: Path) -> None:
    folder = tmp_path / "good"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(10):
        for view in "ab":
            cv2.imwrite(str(folder / f"part{number}_{view}.png"), part(generator))
    dataset = read_dataset(folder, part_pattern=r"part\d+")
    result = fit(dataset, request(tmp_path), silent)
    assert result.recipe.training["folds"] == 5
    assert result.recipe.thresholds.n_good == 10  # parts, not images


def test_the_takt_picks_how_long_dcgan_searches_and_is_told(tmp_path: Path) -> None:
    result = learnt(tmp_path, detector="dcgan+residual", takt_ms=1e-3, height=32, width=32)
    assert result.module.reconstructor.inversion.steps == 0, "the default is 4"
    (decided,) = result.recipe.training["decided"]
    assert "search steps: 0," in decided and decided not in result.notes, "a decision is no warning"
    assert any(note.startswith("frame to score") and "more than 0.0009 ms" in note for note in result.notes)
    assert result.recipe.training["asked"]["takt_ms"] == 1e-3


def test_a_takt_is_told_of_any_detector_and_changes_no_recipe(tmp_path: Path, twenty_parts: FitResult) -> None:
    result = learnt(tmp_path, takt_ms=1e6)
    assert "the deadline of a takt of 1e+06 ms" in result.recipe.training["frame_to_score"]
    assert not any("deadline" in note for note in result.notes), "a takt that is kept is no warning"
    assert result.recipe.graph == twenty_parts.recipe.graph
    assert result.recipe.training["options"] == twenty_parts.recipe.training["options"]
