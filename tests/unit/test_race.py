"""Who wins a race, what is not run twice, and what the page shows."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import math
import os
import re
import sys
import types
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner

from calibration.errors import InputError, MissingPackage
from trainer import race, race_heat, race_session
from trainer.__main__ import commands
from trainer.data import read_dataset
from trainer.errors import TrainingError
from trainer.race import Entry, RaceRequest, carried_out, heats, ranked, winning_request
from trainer.race_heat import Heat, Result, figures, split
from trainer.race_page import page, table_of, write_table
from trainer.race_ray import on_ray

HEAT = Heat("data", "stamp", "patch_layout", 256, 256, "auto", 0.02, 0, None, None)


def entry(name, *, failed="", synthetic=0.9, escape=None, p50=5.0, p99=10.0):
    auroc = None if escape is None else 1.0 - escape / 2
    result = Result(failed, synthetic, 0.1, auroc, escape, p50, p99, "openvino f32, 2 threads", 12.0, 900.0, 18.0)
    return Entry(replace(HEAT, detector=name), result)


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "flange"
    folder.mkdir()
    for number in range(10):
        picture = np.random.default_rng(number).integers(90, 110, (32, 32), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{number}.png"), picture)
    return folder


def names(entries):
    return [one.heat.detector for one in entries]


def test_without_labels_the_best_against_synthetic_defects_that_keeps_the_takt_wins():
    field = [
        entry("blunt", synthetic=0.7),
        entry("slow", synthetic=1.0, p99=45.1),
        entry("broken", failed="no weights", synthetic=None),
        entry("best", synthetic=0.99),
        entry("just in time", synthetic=0.8, p99=45.0),
    ]
    assert names(ranked(field, 50.0)) == ["best", "just in time", "blunt"]


def test_labels_go_before_synthetic_defects_and_the_quicker_of_equals_first():
    field = [
        entry("fools the labels", synthetic=1.0, escape=0.5),
        entry("equal, slower", synthetic=0.8, escape=0.1, p50=9.0),
        entry("equal", synthetic=0.7, escape=0.1, p50=4.0),
    ]
    assert names(ranked(field, 50.0)) == ["equal", "equal, slower", "fools the labels"]


def test_escape_is_counted_where_the_stated_share_of_good_parts_is_rejected():
    good, defective = np.arange(100.0), np.array([50.0, 97.0, 98.0, 99.0, 150.0])
    assert figures(good, defective, 0.02) == (pytest.approx(np.mean([50.5, 97.5, 98.5, 99.5, 100]) / 100), 0.6)
    assert figures(good, defective, 0.0)[1] == 0.8


def test_a_part_without_verdict_never_passes():
    auroc, escape = figures(np.array([1.0, 2.0, np.inf]), np.array([np.inf, 0.0]), 0.4)
    assert auroc == pytest.approx((2.5 + 0) / 6)
    assert escape == 0.5


@pytest.mark.parametrize(("good", "defective"), [([], [1.0]), ([1.0], [])])
def test_nothing_is_said_without_both_kinds(good, defective):
    assert figures(np.array(good), np.array(defective), 0.02) == (None, None)


def test_the_judges_are_never_learnt_from(images):
    items = read_dataset(images).good
    learn, judge = split(items, seed=3)
    assert (len(learn), len(judge)) == (8, 2)
    assert sorted(item.name for item in [*learn, *judge]) == sorted(item.name for item in items)


def test_every_detector_that_needs_no_labels_runs_at_every_size(images):
    found = heats(RaceRequest(images, images, 50.0, sizes=((256, 256), (384, 320))), read_dataset(images))
    assert {(heat.height, heat.width) for heat in found} == {(256, 256), (384, 320)}
    assert {"patch_layout", "vae+residual"} <= {heat.detector for heat in found}
    assert not {"cnn", "vgg16"} & {heat.detector for heat in found}


def test_an_unknown_detector_is_refused_with_those_there_are(images):
    with pytest.raises(TrainingError, match="detectors vea: unknown; there are patch_layout, "):
        heats(RaceRequest(images, images, 50.0, detectors=("vea",)), read_dataset(images))


def answering(results):
    """Run heats by writing their answer; one whose answer is None dies."""

    def run(commands):
        for index, command in enumerate(commands):
            file = Path(command[-1])
            asked = json.loads(file.read_text())
            answer = results[asked["heat"]["detector"]]
            if answer is not None:
                file.write_text(json.dumps({**asked, "result": answer}))
            yield index

    return run


def test_a_race_goes_on_where_it_stopped_and_a_dead_heat_is_a_row(images, tmp_path):
    request = RaceRequest(images, tmp_path / "race", 50.0, detectors=("patch_layout", "variation"))
    asked = heats(request, read_dataset(images))
    told = []
    answers = {"patch_layout": {"synthetic_auroc": 0.9}, "variation": None}
    first = carried_out(asked, request.out, answering(answers), lambda *given: told.append(given))
    assert [one.result.synthetic_auroc for one in first] == [0.9, None]
    assert first[1].result.failed.startswith("ended without an answer")
    assert told[-1][1:] == (2, 2)
    mended = {"variation": {"synthetic_auroc": 0.8}}  # what has answered is not asked again, what died is
    again = carried_out(asked, request.out, answering(mended), lambda *_: None)
    assert [one.result.synthetic_auroc for one in again] == [0.9, 0.8]
    assert carried_out(asked, request.out, answering({}), lambda *_: None) == again
    cv2.imwrite(str(images / "10.png"), np.full((32, 32), 100, np.uint8))
    others = heats(request, read_dataset(images))
    assert others[0] != asked[0]  # an image more: the answers do not hold


def test_what_failed_is_asked_again_and_a_mended_cause_is_a_mended_row(images, tmp_path):
    request = RaceRequest(images, tmp_path / "race", 50.0, detectors=("patch_layout", "variation"))
    asked = heats(request, read_dataset(images))
    failing = {"patch_layout": {"synthetic_auroc": 0.9}, "variation": {"failed": "weights: No such file"}}
    first = carried_out(asked, request.out, answering(failing), lambda *_: None)
    assert [one.result.failed for one in first] == ["", "weights: No such file"]
    mended = {"variation": {"synthetic_auroc": 0.8}}  # the other is not asked: it would be a KeyError
    again = carried_out(asked, request.out, answering(mended), lambda *_: None)
    assert [(one.result.failed, one.result.synthetic_auroc) for one in again] == [("", 0.9), ("", 0.8)]


@pytest.mark.parametrize(
    "changed",
    [{"version": "0.0.1"}, {"bit_depth": 12}, {"part_pattern": r"\d+"}],
    ids=lambda changed: next(iter(changed)),
)
def test_an_answer_of_another_version_or_other_parts_does_not_hold(images, tmp_path, changed):
    request = RaceRequest(images, tmp_path / "race", 50.0, detectors=("patch_layout",))
    asked = heats(request, read_dataset(images))
    assert asked[0].version == importlib.metadata.version("taktsight")
    carried_out(asked, request.out, answering({"patch_layout": {"synthetic_auroc": 0.9}}), lambda *_: None)
    others = [replace(asked[0], **changed)]
    (found,) = carried_out(others, request.out, answering({"patch_layout": {"synthetic_auroc": 0.7}}), lambda *_: None)
    assert found.result.synthetic_auroc == 0.7


def test_depth_and_parts_are_those_of_the_race_in_every_heat_and_in_the_winners_fit(tmp_path, monkeypatch):
    folder = tmp_path / "flange"
    folder.mkdir()
    for number in range(20):
        cv2.imwrite(str(folder / f"part{number // 4}_{number}.png"), np.full((32, 32), 1000 + number, np.uint16))
    told = {}

    def answered(asked, out, runner, progress):
        told["heats"] = asked
        return [Entry(heat, Result(synthetic_auroc=0.9, p50_ms=5.0, p99_ms=6.0)) for heat in asked]

    monkeypatch.setattr(race, "carried_out", answered)
    monkeypatch.setattr(race_session, "learn", lambda data, request, **given: told.update(given))
    asked = ["race", str(folder), "--takt-ms", "50", "--out", str(tmp_path), "--recipe", str(tmp_path / "a.recipe")]
    asked += ["--detector", "variation", "--bit-depth", "12", "--part-pattern", r"part\d+"]
    assert CliRunner().invoke(commands, asked, catch_exceptions=False).exit_code == 0
    (heat,) = told["heats"]
    assert (heat.bit_depth, heat.part_pattern) == (12, r"part\d+")
    assert (told["bit_depth"], told["part_pattern"]) == (12, r"part\d+")

    seen = {}

    def fit(dataset, request, progress):
        seen["learn"] = dataset.good
        raise TrainingError("as far as this test goes")

    monkeypatch.setattr(race_heat, "fit", fit)
    with pytest.raises(TrainingError, match="as far as"):
        race_heat.run(heat, tmp_path / "scratch.recipe")
    assert {item.bit_depth for item in seen["learn"]} == {12}
    assert len(seen["learn"]) == 16 and len({item.part_id for item in seen["learn"]}) == 4  # one whole part judges


def test_the_takt_is_asked_of_those_that_search_for_as_long_alone(images, tmp_path):
    request = RaceRequest(images, tmp_path / "race", 50.0, detectors=("patch_memory", "dcgan+anogan", "dcgan+siamese"))
    asked = heats(request, read_dataset(images))
    assert [heat.takt_ms for heat in asked] == [None, 50.0, 50.0]
    assert race_heat.fit_request(asked[1], tmp_path / "a.recipe").takt_ms == 50.0


def test_a_folder_that_cannot_be_written_is_named(images, tmp_path):
    (tmp_path / "race").write_text("a file")
    asked = heats(RaceRequest(images, tmp_path / "race", 50.0), read_dataset(images))
    with pytest.raises(InputError, match=r"race/heats: Not a directory: give a folder"):
        carried_out(asked, tmp_path / "race", answering({}), lambda *_: None)


def test_the_winner_is_fitted_as_it_raced(tmp_path):
    request = winning_request(Entry(replace(HEAT, height=384, epochs=7, seed=5), Result()), tmp_path / "a.recipe")
    assert (request.detector, request.height, request.width) == ("patch_layout", 384, 256)
    assert (request.options.seed, request.options.epochs) == (5, 7)
    assert request.recipe == tmp_path / "a.recipe"


def test_table_and_page_tell_of_every_candidate_and_why_it_is_out(tmp_path):
    field = [
        entry("best", synthetic=0.999),
        entry("slow", p99=80.0),
        entry("broken <b>", failed="no weights"),
        entry("never registered", p99=math.inf),
    ]
    order = ranked(field, 50.0)
    write_table(tmp_path / "race.csv", field, order, 50.0)
    with (tmp_path / "race.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["place"], row["detector"], row["out"]) for row in rows] == [
        ("1", "best", ""),
        ("", "slow", "too slow for 45 ms"),
        ("", "broken <b>", "failed: no weights"),
        ("", "never registered", "too slow for 45 ms"),
    ]
    text = page("flange", field, order, 50.0)
    assert "broken &lt;b&gt; @ 256" in text
    assert len(re.findall("<circle", text)) == 3  # the failed one has no place between time and error
    assert table_of(field, order, 50.0).row_count == 4
    numbers = [float(value) for value in re.findall(r'c[xy]="([\d.]+)"', text)]
    assert all(0 <= value <= 760 for value in numbers)


def test_on_a_cluster_every_heat_runs_once_and_one_whose_machine_is_lost_is_left_to_the_table(monkeypatch, tmp_path):
    """Ray itself is an extra: a stand-in with its three calls that hands results back in the other order."""
    ray = types.ModuleType("ray")
    ray.exceptions = types.SimpleNamespace(RayError=type("RayError", (Exception,), {}))
    ray.init = lambda **given: told.update(given)
    ray.remote = lambda **_: (
        lambda function: types.SimpleNamespace(remote=lambda index, command: (index, lambda: function(index, command)))
    )
    ray.wait = lambda references, num_returns: (references[-num_returns:], references[:-num_returns])

    def get(reference):
        if reference[0] == 1:
            raise ray.exceptions.RayError
        return reference[1]()

    ray.get = get
    told = {}
    monkeypatch.setitem(sys.modules, "ray", ray)
    script = "import sys; open(sys.argv[1], 'a').write('once')"
    commands = [[sys.executable, "-c", script, str(tmp_path / f"{number}.json")] for number in range(3)]
    assert list(on_ray("10.0.0.5:6379", commands)) == [2, 1, 0]
    assert told["address"] == "10.0.0.5:6379"
    assert {file.name: file.read_text() for file in tmp_path.glob("*.json")} == {"0.json": "once", "2.json": "once"}


def test_without_ray_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingPackage, match=r"pip install 'taktsight\[race\]'"):
        list(on_ray("local", []))


@pytest.mark.parametrize(
    ("results", "said"),
    [
        ([Result(failed="4 good images found")] * 2, "no candidate could be fitted, the first: 4 good images found"),
        ([Result(failed="no weights"), Result(p99_ms=60.0)], "no candidate keeps the takt: see the table"),
    ],
)
def test_candidates_that_all_failed_are_not_called_too_slow(images, tmp_path, monkeypatch, results, said):
    monkeypatch.setattr(
        race, "carried_out", lambda asked, *_: [Entry(*pair) for pair in zip(asked, results, strict=True)]
    )
    request = RaceRequest(images, tmp_path, 50.0, detectors=("patch_layout", "variation"))
    with pytest.raises(TrainingError, match=said):
        race_session.run(request, None, None)


@pytest.mark.parametrize("escape", [None, 0.1])
def test_an_order_that_rests_on_synthetic_defects_says_so(tmp_path, monkeypatch, capsys, escape):
    """Good test images alone, without a defective one, tell nothing of escape."""
    for folder in ("train/good", "test/good"):
        (tmp_path / "set" / folder).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / "set" / folder / "0.png"), np.full((32, 32), 100, np.uint8))
    told = entry("variation", escape=escape).result
    monkeypatch.setattr(race, "carried_out", lambda asked, *_: [Entry(heat, told) for heat in asked])
    race_session.run(RaceRequest(tmp_path / "set", tmp_path, 50.0, detectors=("variation",)), None, None)
    assert ("the order rests on synthetic defects" in "".join(capsys.readouterr())) is (escape is None)


def test_a_recipe_that_cannot_be_written_ends_a_race_before_it_starts(images, tmp_path, monkeypatch):
    monkeypatch.setattr(race_session, "read_dataset", None)
    request = RaceRequest(images, tmp_path / "race", 50.0)
    with pytest.raises(InputError, match=r"nofolder: not a folder"):
        race_session.run(request, tmp_path / "nofolder" / "x.recipe", None)


def test_a_size_that_no_detector_takes_ends_a_race_before_it_starts(images):
    with pytest.raises(TrainingError, match="size 100x100 found, need multiples of 32"):
        heats(RaceRequest(images, images, 50.0, sizes=((256, 256), (100, 100))), read_dataset(images))


def test_what_is_asked_for_twice_runs_once(images):
    twice = RaceRequest(images, images, 50.0, detectors=("variation", "variation"), sizes=((64, 64), (64, 64)))
    assert len(heats(twice, read_dataset(images))) == 1


def test_a_link_that_leads_nowhere_is_no_image(images):
    asked = RaceRequest(images, images, 50.0, detectors=("variation",))
    before = heats(asked, read_dataset(images))
    (images / "zz.png").symlink_to(images / "nowhere.png")
    assert heats(asked, read_dataset(images)) == before


@pytest.mark.parametrize("name", ["photometric.npz", "frames.jsonl"])
def test_an_answer_does_not_hold_once_a_recordings_correction_or_index_has_changed(images, name):
    asked = RaceRequest(images, images, 50.0, detectors=("variation",))
    dataset = read_dataset(images)
    before = heats(asked, dataset)
    (images / name).write_bytes(b"another flat field")
    assert heats(asked, dataset) != before


def test_an_answer_with_other_weights_does_not_hold(images, tmp_path):
    weights = tmp_path / "weights.pth"
    asked = RaceRequest(images, images, 50.0, detectors=("vgg16",), weights=weights)
    with pytest.raises(InputError, match=r"weights\.pth: No such file"):
        heats(asked, read_dataset(images))
    weights.write_bytes(b"one")
    before = heats(asked, read_dataset(images))
    weights.write_bytes(b"two")
    assert heats(asked, read_dataset(images)) != before


def test_a_second_race_in_a_folder_is_refused_with_the_process_that_works_there(images, tmp_path):
    request = RaceRequest(images, tmp_path / "race", 50.0, detectors=("variation",))
    asked = heats(request, read_dataset(images))

    def second(commands):
        with pytest.raises(InputError, match=rf"another race works in .*race \(process {os.getpid()}\): wait for"):
            carried_out(asked, request.out, answering({}), lambda *_: None)
        return answering({"variation": {"synthetic_auroc": 0.9}})(commands)

    (found,) = carried_out(asked, request.out, second, lambda *_: None)
    assert found.result.synthetic_auroc == 0.9
    assert [file.name for file in request.out.iterdir()] == ["heats"]  # nothing is left in the user's way
    assert carried_out(asked, request.out, answering({}), lambda *_: None) == [found]
