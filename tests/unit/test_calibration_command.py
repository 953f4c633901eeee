"""taktsight-calibration sets thresholds from good parts only, and leaves with an exit code that says what to mend."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from calibration import __main__ as command
from calibration import photometric, recording
from calibration.__main__ import main
from calibration.frame import Frame
from calibration.images import encode_png
from calibration.photometric import ReferencePatch, read_photometric
from calibration.recipe import Recipe, read_recipe
from calibration.recipe_file import read_members
from calibration.recording import RecordingWriter
from calibration.scores import PartScore, Scores, write_scores
from calibration.signing import make_key, read_signing_key, sign_recipe, signature_of
from calibration.thresholds import rate_upper_bound
from tests.recipes import tiny_recipe, write_tiny_recipe

USAGE, INPUT, RECIPE, CALIBRATION = 2, 3, 5, 6


@dataclass(frozen=True)
class Answer:
    """What a command left on the terminal."""

    code: int
    out: str
    err: str


@pytest.fixture
def calibrate(monkeypatch, capsys):
    """Return a function that runs taktsight-calibration with these arguments."""

    def run(*arguments: str | Path) -> Answer:
        monkeypatch.setattr(sys, "argv", ["taktsight-calibration", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as left:
            code = int(left.code or 0)
        return Answer(code, *capsys.readouterr())

    return run


@dataclass(frozen=True)
class Bench:
    """A recipe and the scores of good parts, as replay leaves them."""

    recipe: Path
    scores: Path

    @property
    def loaded(self) -> Recipe:
        return read_recipe(self.recipe)

    def score(self, labels: list[str], *, digest: str | None = None, unscored: int = 0) -> None:
        """Write one score per label: 0.001, 0.002, ... with map peaks ten times as high."""
        parts = [
            PartScore(f"{n}.png", label, "pass", "", 0.001 * n, 0.01 * n) for n, label in enumerate(labels, start=1)
        ]
        parts += [PartScore(f"x{n}.png", "good", "no_verdict", "bad_frame", None, None) for n in range(unscored)]
        np.random.default_rng(0).shuffle(parts)
        write_scores(
            self.scores, Scores(digest or self.loaded.detector_digest, "openvino f32, 2 threads", tuple(parts))
        )


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    write_tiny_recipe(tmp_path / "flange.recipe")
    return Bench(tmp_path / "flange.recipe", tmp_path / "good.scores")


def test_new_thresholds_are_written_into_the_recipe_and_nothing_else_changes(bench: Bench, calibrate):
    before = bench.loaded
    bench.score(["good"] * 199)
    answer = calibrate("threshold", bench.recipe, bench.scores, "--false-reject-rate", "0.01")
    assert (answer.code, answer.err) == (0, "")
    after = bench.loaded
    assert after.thresholds.score == pytest.approx(0.198)  # rank 198 = 0.99 x (199 + 1)
    assert after.thresholds.map == pytest.approx(1.98)
    assert (after.thresholds.n_good, after.thresholds.false_reject_rate) == (199, 0.01)
    assert after.thresholds.fitted_on == "openvino f32, 2 threads"
    assert after.thresholds.good_median == pytest.approx(0.100)
    assert after.thresholds.good_deviation == pytest.approx(1.4826 * 0.050)
    assert after.detector_digest == before.detector_digest
    assert after.digest != before.digest
    unchanged = replace(after, thresholds=before.thresholds, digest=before.digest, selftest=before.selftest)
    assert unchanged == before
    assert sorted(path.name for path in bench.recipe.parent.iterdir()) == ["flange.recipe", "good.scores"]


def test_the_user_is_told_the_old_and_the_new_threshold_and_how_far_to_trust_it(bench: Bench, calibrate):
    bench.score(["good"] * 199)
    answer = calibrate("threshold", bench.recipe, bench.scores, "--false-reject-rate", "0.01")
    assert answer.out.splitlines() == [
        "threshold 0.1 (torch f32, n = 99) -> 0.198 (openvino f32, 2 threads)",
        "199 good parts: 1.00% of good parts rejected on average, below 2.4% with 95 % confidence",
        "to be confident of 2.00%, inspect about 400 in all",
        f"recipe digest {bench.loaded.digest}",
    ]


def test_the_images_of_a_part_count_once_with_the_highest(bench: Bench, calibrate):
    """50 parts photographed 4 times each and 49 whose number nobody knows are 99 good parts."""
    several = [PartScore(f"{n}.png", "", "pass", "", 0.001 * n, 0.01 * (200 - n), f"A{n // 4}") for n in range(200)]
    single = [PartScore(f"s{n}.png", "", "pass", "", 0.0, 0.0) for n in range(49)]
    unseen = PartScore("x.png", "", "no_verdict", "bad_frame", None, None, "A3")
    parts = (*several, unseen, *single)
    write_scores(bench.scores, Scores(bench.loaded.detector_digest, "openvino f32, 2 threads", parts))
    refused = calibrate("threshold", bench.recipe, bench.scores, "--false-reject-rate", "0.009")
    assert "99 good parts found, a false reject rate of 0.009 needs 111" in refused.err
    answer = calibrate("threshold", bench.recipe, bench.scores, "--false-reject-rate", "0.02")
    assert "99 good parts: 2.00% of good parts rejected on average" in answer.out
    assert "note: 1 of 250 images had no verdict and are left out" in answer.out
    found = bench.loaded.thresholds
    assert (found.n_good, found.rate_upper_bound) == (99, rate_upper_bound(99, 0.02))
    assert (found.score, found.map) == (pytest.approx(0.195), pytest.approx(1.96))  # of the second highest part


def test_a_bound_is_never_told_lower_than_it_is(bench: Bench, calibrate):
    bench.score(["good"] * 200)
    answer = calibrate("threshold", bench.recipe, bench.scores, "--false-reject-rate", "0.01")
    assert bench.loaded.thresholds.rate_upper_bound > 0.023
    assert "below 2.4% with 95 % confidence" in answer.out


def test_a_new_threshold_ends_the_signature_and_says_so(bench: Bench, calibrate):
    make_key(bench.recipe.with_name("key"))
    sign_recipe(bench.recipe, read_signing_key(bench.recipe.with_name("key")))
    bench.score(["good"] * 199)
    answer = calibrate("threshold", bench.recipe, bench.scores, "--false-reject-rate", "0.01")
    assert answer.out.splitlines()[-1] == (
        "note: the recipe was signed with its old threshold; the new one is unsigned: have it signed again with "
        "taktsight-trainer sign"
    )
    assert signature_of(bench.recipe, read_members(bench.recipe)[0]) is None


@pytest.mark.parametrize("asked", [("--points", "2,4,14,20", "--mm", "5"), ("--mm-per-px", "0.25")])
def test_a_scale_is_told_and_changes_no_verdict(bench: Bench, calibrate, asked):
    before = bench.loaded
    answer = calibrate("scale", bench.recipe, *asked)
    assert answer.out == "0.25 mm per px: the reference view of 32x32 px shows 8 x 8 mm\n"
    after = bench.loaded
    assert (after.mm_per_px, after.digest, after.thresholds) == (0.25, before.digest, before.thresholds)
    bench.score(["good"] * 99)
    assert calibrate("threshold", bench.recipe, bench.scores, "--false-reject-rate", "0.01").code == 0
    assert bench.loaded.mm_per_px == 0.25


def test_a_scale_ends_the_signature_and_says_so(bench: Bench, calibrate):
    make_key(bench.recipe.with_name("key"))
    sign_recipe(bench.recipe, read_signing_key(bench.recipe.with_name("key")))
    answer = calibrate("scale", bench.recipe, "--mm-per-px", "0.25")
    assert "have it signed again with taktsight-trainer sign" in answer.out
    assert signature_of(bench.recipe, read_members(bench.recipe)[0]) is None


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ((), "give --points and --mm, or --mm-per-px alone"),
        (("--points", "0,0,10,10"), "give --points and --mm"),
        (("--mm-per-px", "0.1", "--mm", "5"), "give --points and --mm"),
        (("--points", "0,0,10", "--mm", "5"), "need X1,Y1,X2,Y2"),
        (("--points", "0,0,6,0", "--mm", "5"), "two points 6 px apart found, need 10 or more"),
        (("--points", "0,0,nan,0", "--mm", "5"), "need 10 or more"),
        (("--mm-per-px", "0"), "0"),
        (("--mm-per-px", "nan"), "'nan' is not a finite number"),
        (("--mm-per-px", "inf"), "'inf' is not a finite number"),
        (("--points", "0,0,10,0", "--mm", "nan"), "'nan' is not a finite number"),
        (("--mm-per-px", "1001"), "1001.0 mm per px found, need at most 1000"),
    ],
)
def test_a_scale_that_cannot_be_leaves_the_recipe_as_it_was(bench: Bench, calibrate, asked, named):
    before = bench.recipe.read_bytes()
    answer = calibrate("scale", bench.recipe, *asked)
    assert answer.code != 0
    assert named in answer.err
    assert bench.recipe.read_bytes() == before


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.003])
def test_whoever_inspects_the_parts_that_were_advised_is_confident_of_the_rate(bench: Bench, calibrate, rate):
    bench.score(["good"] * math.ceil(1 / rate))
    said = calibrate("threshold", bench.recipe, bench.scores, "--false-reject-rate", str(rate)).out
    advised = int(re.search(r"inspect about (\d+) in all", said).group(1))
    assert all(rate_upper_bound(n_good, rate) <= 2 * rate for n_good in range(advised, advised + 500))
    bench.score(["good"] * advised)
    assert (
        "inspect about" not in calibrate("threshold", bench.recipe, bench.scores, "--false-reject-rate", str(rate)).out
    )


def test_too_few_good_parts_leave_with_6_and_the_recipe_as_it_was(bench: Bench, calibrate):
    before = bench.recipe.read_bytes()
    bench.score(["good"] * 80)
    answer = calibrate("threshold", bench.recipe, bench.scores, "--false-reject-rate", "0.01")
    assert answer.code == CALIBRATION
    assert answer.out == ""
    assert answer.err == (
        "error: 80 good parts found, a false reject rate of 0.01 needs 99: inspect 19 more good parts, "
        "or ask for a rate of 0.013 or more\n"
    )
    assert bench.recipe.read_bytes() == before


def test_maps_that_show_nothing_give_no_threshold(bench: Bench, calibrate):
    before = bench.recipe.read_bytes()
    parts = tuple(PartScore(f"{n}.png", "good", "pass", "", 0.001 * n, 0.0) for n in range(1, 200))
    write_scores(bench.scores, Scores(bench.loaded.detector_digest, "openvino f32, 2 threads", parts))
    answer = calibrate("threshold", bench.recipe, bench.scores, "--false-reject-rate", "0.01")
    assert answer.code == CALIBRATION
    assert "maps of the good parts peak at 0, need more than 0" in answer.err
    assert bench.recipe.read_bytes() == before


def test_mixed_labels_are_refused_until_one_is_chosen(bench: Bench, calibrate):
    bench.score(["good"] * 99 + ["dent"] * 20)
    answer = calibrate("threshold", bench.recipe, bench.scores, "--false-reject-rate", "0.01")
    assert answer.code == CALIBRATION
    assert "parts of several folders found: dent (20), good (99); need good ones only: add --label good" in answer.err
    answer = calibrate("threshold", bench.recipe, bench.scores, "--false-reject-rate", "0.01", "--label", "good")
    assert answer.code == 0
    assert bench.loaded.thresholds.score == pytest.approx(0.099)


def test_a_label_that_no_part_has_is_refused_with_those_there_are(bench: Bench, calibrate):
    bench.score(["good"] * 99 + ["dent"] * 20)
    answer = calibrate("threshold", bench.recipe, bench.scores, "--false-reject-rate", "0.01", "--label", "god")
    assert answer.code == CALIBRATION
    assert "no parts with label 'god' found, there are 'dent', 'good': choose one of these" in answer.err


def test_parts_without_verdict_are_left_out_with_a_note(bench: Bench, calibrate):
    bench.score(["good"] * 99, unscored=4)
    answer = calibrate("threshold", bench.recipe, bench.scores, "--false-reject-rate", "0.01")
    assert answer.code == 0
    assert "note: 4 of 103 parts had no verdict and are left out" in answer.out
    assert bench.loaded.thresholds.n_good == 99


def test_scores_of_another_detector_are_refused(bench: Bench, calibrate):
    bench.score(["good"] * 99, digest="0" * 64)
    answer = calibrate("threshold", bench.recipe, bench.scores, "--false-reject-rate", "0.01")
    assert answer.code == INPUT
    assert "good.scores: these scores are of another detector than" in answer.err
    assert "run replay with this recipe" in answer.err


def test_scores_stay_valid_while_only_thresholds_change(bench: Bench, calibrate):
    bench.score(["good"] * 199)
    for rate in ("0.01", "0.02"):
        assert calibrate("threshold", bench.recipe, bench.scores, "--false-reject-rate", rate).code == 0
    assert bench.loaded.thresholds.score == pytest.approx(0.196)


@pytest.mark.parametrize("rate", ["0", "1", "-0.5", "nan"])
def test_a_rate_that_is_no_share_leaves_with_6(bench: Bench, calibrate, rate):
    bench.score(["good"] * 99)
    answer = calibrate("threshold", bench.recipe, bench.scores, f"--false-reject-rate={rate}")
    assert answer.code == CALIBRATION
    assert "need a share above 0 and below 1" in answer.err


def test_a_damaged_recipe_leaves_with_5_and_a_damaged_score_file_with_3(bench: Bench, calibrate):
    bench.scores.write_text("{}", encoding="utf-8")
    assert calibrate("threshold", bench.recipe, bench.scores, "--false-reject-rate", "0.01").code == INPUT
    bench.recipe.write_bytes(b"")
    assert calibrate("threshold", bench.recipe, bench.scores, "--false-reject-rate", "0.01").code == RECIPE


def test_wrong_usage_leaves_with_2(bench: Bench, calibrate):
    assert calibrate("threshold", bench.recipe, bench.scores).code == USAGE
    assert calibrate("treshold").code == USAGE
    answer = calibrate("photometric", bench.recipe.with_name("station.npz"))
    assert answer.code == USAGE
    assert "give --dark, --flat or --patch" in answer.err


def test_brackets_in_a_message_are_shown_as_they_are(bench: Bench, calibrate):
    """Rich takes [red] for a colour; a path may be called so."""
    odd = bench.recipe.with_name("[red] [3, 14] :smile:.recipe")
    answer = calibrate("threshold", odd, bench.scores, "--false-reject-rate", "0.01")
    assert answer.err == f"error: {odd}: No such file or directory: give the path of a recipe\n"


def test_the_installed_command_leaves_with_the_same_codes(bench: Bench):
    bench.score(["good"] * 80)
    arguments = ["threshold", str(bench.recipe), str(bench.scores), "--false-reject-rate", "0.01"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "calibration", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == CALIBRATION
    assert done.stderr.startswith("error: 80 good parts found")
    assert "Traceback" not in done.stderr


def folder_of(path: Path, *images: np.ndarray) -> Path:
    path.mkdir()
    for number, pixels in enumerate(images):
        (path / f"{number}.png").write_bytes(encode_png(pixels))
    return path


def test_dark_and_flat_folders_become_their_means(tmp_path: Path, calibrate):
    dark = folder_of(tmp_path / "dark", np.full((6, 8), 2, np.uint8), np.full((6, 8), 4, np.uint8))
    flat = folder_of(tmp_path / "flat", np.full((6, 8), 200, np.uint8))
    out = tmp_path / "station.npz"
    answer = calibrate("photometric", out, "--dark", dark, "--flat", flat, "--patch", "1,2,3,4,0.8")
    assert (answer.code, answer.out) == (0, f"photometric calibration: {out}\n")
    found = read_photometric(out)
    np.testing.assert_allclose(found.dark, 3 / 255)
    np.testing.assert_allclose(found.flat, 200 / 255)
    assert found.patch == ReferencePatch(1, 2, 3, 4, 0.8)


@pytest.mark.parametrize("recorded", [False, True])
def test_one_image_of_a_field_is_read_at_a_time(tmp_path: Path, calibrate, monkeypatch, recorded):
    """What is read goes into the sum before the next is read: a field of 500 images takes no more than one of two."""
    told, read, add = [], recording.read_image, photometric.reflectance

    def reads(path: Path) -> np.ndarray:
        told.append("read")
        return read(path)

    def adds(pixels: np.ndarray, bit_depth: int) -> np.ndarray:
        told.append("add")
        return add(pixels, bit_depth)

    for module in (command, recording):
        monkeypatch.setattr(module, "read_image", reads)
    monkeypatch.setattr(photometric, "reflectance", adds)
    images = [np.full((6, 8), level, np.uint8) for level in (100, 110, 120)]
    if recorded:
        writer = RecordingWriter(tmp_path / "flat")
        for number, pixels in enumerate(images):
            writer.append(Frame(pixels, number, number, 0, 0))
    else:
        folder_of(tmp_path / "flat", *images)
    assert calibrate("photometric", tmp_path / "x.npz", "--flat", tmp_path / "flat").code == 0
    assert told == ["read", "add"] * 3
    np.testing.assert_allclose(read_photometric(tmp_path / "x.npz").flat, 110 / 255, rtol=1e-6)


@pytest.mark.parametrize(("options", "level", "full_scale"), [((), 48000, 65535), (("--bit-depth", "12"), 3000, 4095)])
def test_16_bit_files_count_to_their_own_full_scale(tmp_path: Path, calibrate, options, level, full_scale):
    dark = folder_of(tmp_path / "dark", np.full((6, 8), level // 100, np.uint16))
    flat = folder_of(tmp_path / "flat", np.full((6, 8), level, np.uint16))
    answer = calibrate("photometric", tmp_path / "x.npz", "--dark", dark, "--flat", flat, *options)
    assert answer.code == 0
    found = read_photometric(tmp_path / "x.npz")
    np.testing.assert_allclose(found.dark, level / 100 / full_scale, rtol=1e-6)
    np.testing.assert_allclose(found.flat, level / full_scale, rtol=1e-6)


@pytest.mark.parametrize("fields", [("dark", "flat"), ("dark",), ("flat",)])
def test_12_bit_files_are_refused_until_their_depth_is_given(tmp_path: Path, calibrate, fields):
    levels = {"dark": 200, "flat": 3600}
    for name in fields:
        folder_of(tmp_path / name, np.full((6, 8), levels[name], np.uint16))
    given = [word for name in fields for word in (f"--{name}", tmp_path / name)]
    refused = calibrate("photometric", tmp_path / "x.npz", *given)
    assert refused.code == INPUT
    brightest = max(levels[name] for name in fields)
    assert f"16-bit images whose brightest pixel is {brightest}: a " in refused.err
    assert "-bit camera? Give the sensor's depth with --bit-depth" in refused.err
    assert not (tmp_path / "x.npz").exists()
    assert calibrate("photometric", tmp_path / "x.npz", *given, "--bit-depth", "12").code == 0
    found = read_photometric(tmp_path / "x.npz")
    for name in fields:
        np.testing.assert_allclose(getattr(found, name), levels[name] / 4095, rtol=1e-6)


@pytest.mark.parametrize("pixels", [np.full((6, 8), 200, np.uint8), np.full((6, 8), 4096, np.uint16)])
def test_a_depth_that_does_not_fit_the_files_is_refused(tmp_path: Path, calibrate, pixels):
    flat = folder_of(tmp_path / "flat", pixels)
    answer = calibrate("photometric", tmp_path / "x.npz", "--flat", flat, "--bit-depth", "12")
    assert answer.code == INPUT
    assert f"0.png: {8 * pixels.itemsize}-bit image whose brightest pixel is {pixels.max()}, 12 bits were" in answer.err


def test_a_saturated_white_sheet_leaves_with_6_and_writes_nothing(tmp_path: Path, calibrate):
    y, x = np.mgrid[-1:1:40j, -1:1:60j]
    white = np.clip(400 * (1 - 0.3 * (x**2 + y**2)), 0, 255).astype(np.uint8)
    answer = calibrate("photometric", tmp_path / "x.npz", "--flat", folder_of(tmp_path / "flat", white))
    assert answer.code == CALIBRATION
    assert "% of a white frame's pixels read 98% of full scale or more, need at most 0.1%: shorten the" in answer.err
    assert not (tmp_path / "x.npz").exists()


@pytest.mark.parametrize(("dead", "told"), [(1, "1 dead pixel: "), (3, "3 dead pixels: ")])
def test_dead_pixels_are_told_and_do_not_cost_the_calibration(tmp_path: Path, calibrate, dead, told):
    white = np.full((150, 200), 220, np.uint8)
    white[77, 99 : 99 + 2 * dead : 2] = 0
    answer = calibrate("photometric", tmp_path / "x.npz", "--flat", folder_of(tmp_path / "flat", white))
    assert answer.code == 0
    assert f"note: {told}the flat field takes the median of the neighbours there\n" in answer.out
    np.testing.assert_allclose(read_photometric(tmp_path / "x.npz").flat, 220 / 255, rtol=1e-6)


@pytest.mark.parametrize("field", ["--dark", "--flat"])
def test_a_patch_beside_the_fields_is_wrong_usage(tmp_path: Path, calibrate, field):
    source = folder_of(tmp_path / "field", np.full((40, 60), 100, np.uint8))
    answer = calibrate("photometric", tmp_path / "x.npz", field, source, "--patch", "5000,10,60,60,0.9")
    assert answer.code == USAGE
    assert "--patch: a patch that reaches to 5060,70 found, dark and flat field are 60x40 px" in answer.err
    assert not (tmp_path / "x.npz").exists()
    assert calibrate("photometric", tmp_path / "x.npz", field, source, "--patch", "50,30,10,10,0.9").code == 0
    assert calibrate("photometric", tmp_path / "x.npz", field, source, "--patch", "50,31,10,10,0.9").code == USAGE


def test_a_recording_brings_its_own_bit_depth(tmp_path: Path, calibrate):
    writer = RecordingWriter(tmp_path / "white")
    for number in (1, 2):
        writer.append(Frame(np.full((6, 8, 3), 1000 * number, np.uint16), number, number, 0, 0, 12))
    assert calibrate("photometric", tmp_path / "x.npz", "--flat", tmp_path / "white").code == 0
    found = read_photometric(tmp_path / "x.npz").flat
    assert found.shape == (6, 8, 3)
    np.testing.assert_allclose(found, 1500 / 4095, rtol=1e-6)


def test_a_flat_field_without_light_leaves_with_6_and_writes_nothing(tmp_path: Path, calibrate):
    flat = folder_of(tmp_path / "flat", np.zeros((6, 8), np.uint8))
    answer = calibrate("photometric", tmp_path / "x.npz", "--flat", flat)
    assert answer.code == CALIBRATION
    assert "capture an even white sheet that fills the view" in answer.err
    assert not (tmp_path / "x.npz").exists()


def test_an_empty_folder_leaves_with_3(tmp_path: Path, calibrate):
    answer = calibrate("photometric", tmp_path / "x.npz", "--dark", folder_of(tmp_path / "dark"))
    assert answer.code == INPUT
    assert "dark: no images found: put images of the covered lens or the white sheet there" in answer.err


@pytest.mark.parametrize("patch", ["1,2,3,4", "1,2,3,4,0.8,9", "a,b,c,d,e", "1.5,2,3,4,0.8", ""])
def test_a_patch_that_is_not_five_numbers_is_wrong_usage(tmp_path: Path, calibrate, patch):
    answer = calibrate("photometric", tmp_path / "x.npz", "--patch", patch)
    assert answer.code == USAGE
    assert re.search(rf"--patch: {re.escape(repr(patch))} found, need X,Y,WIDTH,HEIGHT,LEVEL", answer.err)


def test_a_patch_that_no_frame_can_have_leaves_with_6(tmp_path: Path, calibrate):
    assert calibrate("photometric", tmp_path / "x.npz", "--patch", "1,2,3,4,80").code == CALIBRATION


def test_the_recipe_made_for_tests_is_what_it_says():
    """Other tests stand on it: its graph, run by ONNX Runtime, gives the answers worked out in numpy."""
    onnxruntime = pytest.importorskip("onnxruntime")
    recipe = tiny_recipe(colour=True)
    session = onnxruntime.InferenceSession(recipe.graph, providers=["CPUExecutionProvider"])
    for batch, score, peak in zip(
        recipe.selftest.batches, recipe.selftest.scores, recipe.selftest.map_peaks, strict=True
    ):
        found_map, found_score = session.run(["anomaly_map", "score"], {"image": batch[None]})
        assert found_map.shape == (1, 1, 4, 4)
        assert found_score.shape == (1,)
        assert found_score[0] == pytest.approx(score, rel=1e-5)
        assert found_map.max() == pytest.approx(peak, rel=1e-5)
