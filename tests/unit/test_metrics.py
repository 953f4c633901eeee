"""The figures of an evaluation, against closed forms and slow independent computations."""

from __future__ import annotations

import dataclasses
import json
import math
import types
from itertools import pairwise

import cv2
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from calibration.errors import InputError
from calibration.frame import reflectance
from calibration.images import encode_png
from calibration.photometric import Photometric
from calibration.preprocess import View, prepare
from trainer.data import Item, Pictures
from trainer.evaluate import _scored, packed
from trainer.metrics import ScoredImage, au_pro, evaluate, pixel_auroc

THRESHOLD = 0.5


def part(label: str, score: float | None, name: str = "", **more) -> ScoredImage:
    return ScoredImage(name=name or f"test/{label}/{score}.png", label=label, score=score, **more)


def small_line() -> list[ScoredImage]:
    """Four good parts, one of them rejected, one without verdict; three cracks, one passed; two stains, one unread."""
    good = [part("good", 0.1), part("good", 0.2), part("good", 0.7), part("good", None, reason="blank")]
    cracks = [part("crack", 0.3), part("crack", 0.6), part("crack", 0.9)]
    return good + cracks + [part("stain", 0.8), part("stain", None, reason="out_of_view")]


def test_overkill_counts_the_good_parts_without_a_verdict():
    assert evaluate(small_line(), THRESHOLD).overkill == 2 / 4


def test_escape_counts_only_defective_parts_that_were_passed():
    assert evaluate(small_line(), THRESHOLD).escape == 1 / 5


def test_parts_are_counted_by_truth_and_by_missing_verdict():
    figures = evaluate(small_line(), THRESHOLD)
    assert (figures.n_good, figures.n_defective) == (4, 5)
    assert (figures.n_no_verdict_good, figures.n_no_verdict_defective) == (1, 1)


def test_precision_recall_and_f1_follow_from_the_counts():
    figures = evaluate(small_line(), THRESHOLD)
    assert figures.precision == pytest.approx(4 / 6)
    assert figures.recall == pytest.approx(4 / 5)
    assert figures.f1 == pytest.approx(2 * (4 / 6) * (4 / 5) / (4 / 6 + 4 / 5))


def test_a_score_equal_to_the_threshold_passes():
    figures = evaluate([part("good", 0.5), part("crack", 0.5)], 0.5)
    assert (figures.overkill, figures.escape) == (0.0, 1.0)


def test_parts_without_a_verdict_rank_above_every_score():
    images = small_line()
    truth = [image.defective for image in images]
    scores = [1e9 if image.score is None else image.score for image in images]
    figures = evaluate(images, THRESHOLD)
    assert figures.auroc == pytest.approx(roc_auc_score(truth, scores))
    assert figures.average_precision == pytest.approx(average_precision_score(truth, scores))


def test_auroc_is_the_share_of_pairs_in_the_right_order():
    generator = np.random.default_rng(3)
    good, bad = generator.integers(0, 20, 40), generator.integers(8, 30, 30)  # with ties
    images = [part("good", float(s)) for s in good] + [part("crack", float(s)) for s in bad]
    pairs = np.mean([(b > g) + 0.5 * (b == g) for g in good for b in bad])
    assert evaluate(images, 10.0).auroc == pytest.approx(pairs)


@pytest.mark.parametrize("seed", range(5))
def test_best_f1_is_the_best_of_all_thresholds_and_its_threshold_reaches_it(seed):
    generator = np.random.default_rng(seed)
    labels = ["good"] * 12 + ["crack"] * 9
    scores = [None if generator.random() < 0.15 else float(generator.integers(0, 12)) for _ in labels]
    images = [part(label, score) for label, score in zip(labels, scores, strict=True)]
    figures = evaluate(images, 0.0)
    every_f1 = [evaluate(images, threshold).f1 for threshold in np.arange(-0.5, 12.5)]
    assert figures.best_f1 == pytest.approx(max(every_f1))
    assert evaluate(images, figures.best_f1_threshold).f1 == pytest.approx(figures.best_f1)


def test_the_best_threshold_lies_between_scores_that_are_neighbours_in_float():
    lower = 0.1
    upper = math.nextafter(lower, 1.0)
    figures = evaluate([part("good", lower), part("crack", upper)], 0.0)
    assert figures.best_f1 == 1.0
    assert lower <= figures.best_f1_threshold < upper


def test_each_defect_type_is_measured_against_all_good_parts():
    figures = evaluate(small_line(), THRESHOLD).by_defect
    assert list(figures) == ["crack", "stain"]
    crack = figures["crack"]
    assert (crack.n, crack.detected, crack.recall) == (3, 2, pytest.approx(2 / 3))
    assert crack.precision == pytest.approx(2 / (2 + 2))
    assert crack.auroc == pytest.approx(roc_auc_score([0] * 4 + [1] * 3, [0.1, 0.2, 0.7, 9.0, 0.3, 0.6, 0.9]))
    assert figures["stain"].detected == 2


def test_with_good_parts_only_nothing_is_said_about_defects():
    figures = evaluate([part("good", 0.1), part("good", 0.9)], THRESHOLD)
    assert figures.overkill == 0.5
    assert [figures.auroc, figures.average_precision, figures.best_f1, figures.best_f1_threshold] == [None] * 4
    assert [figures.escape, figures.precision, figures.recall, figures.f1] == [None] * 4
    assert figures.by_defect == {}


def test_with_defective_parts_only_nothing_is_said_about_overkill():
    figures = evaluate([part("crack", 0.9)], THRESHOLD)
    assert (figures.overkill, figures.auroc, figures.escape) == (None, None, 0.0)
    assert figures.by_defect["crack"].auroc is None


def test_where_no_part_got_a_verdict_there_is_no_best_threshold():
    figures = evaluate([part("good", None), part("crack", None)], THRESHOLD)
    assert (figures.auroc, figures.best_f1_threshold, figures.overkill, figures.escape) == (0.5, None, 1.0, 0.0)


def test_an_evaluation_survives_json():
    figures = evaluate(small_line(), THRESHOLD)
    assert json.loads(json.dumps(figures.as_dict(), allow_nan=False)) == figures.as_dict()


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_refused_with_the_name_of_the_image(score):
    with pytest.raises(InputError, match=r"test/crack/017\.png.*score"):
        evaluate([part("good", 0.1), part("crack", score, "test/crack/017.png")], THRESHOLD)


def test_a_map_that_is_not_finite_is_refused_with_the_name_of_the_image():
    damaged = np.full((2, 2), np.nan, np.float32)
    with pytest.raises(InputError, match=r"test/crack/017\.png.*map"):
        evaluate([part("crack", 0.1, "test/crack/017.png", anomaly_map=damaged)], THRESHOLD)


def test_a_threshold_that_is_not_finite_is_refused():
    with pytest.raises(InputError, match="threshold"):
        evaluate(small_line(), math.nan)


def test_no_images_are_refused():
    with pytest.raises(InputError, match="no images"):
        evaluate([], THRESHOLD)


# ---- pixels ----------------------------------------------------------------------------------------------------------


def textured(seed: int, n: int = 4, size: int = 40, *, values: int | None = None):
    """Maps (size, size) with a few values or many, and masks with up to three discs that touch or not."""
    generator = np.random.default_rng(seed)
    maps, masks = [], []
    for _ in range(n):
        mask = np.zeros((size, size), np.uint8)
        for _ in range(generator.integers(0, 4)):
            centre = tuple(int(v) for v in generator.integers(4, size - 4, 2))
            cv2.circle(mask, centre, int(generator.integers(1, 6)), 1, -1)
        noise = generator.normal(0, 1, (size, size)) + 1.2 * mask
        maps.append((noise if values is None else np.round(noise * values)).astype(np.float32))
        masks.append(mask.astype(bool))
    masks[0][5:9, 5:9] = True
    return maps, masks


@pytest.mark.parametrize("values", [None, 3])
def test_pixel_auroc_agrees_with_scikit_learn(values):
    maps, masks = textured(1, values=values)
    everything = roc_auc_score(np.concatenate(masks, axis=None), np.concatenate(maps, axis=None))
    assert pixel_auroc(maps, masks) == pytest.approx(everything, abs=1e-5)


def test_pixel_auroc_does_not_depend_on_the_scale_of_the_map():
    maps, masks = textured(2)
    scaled = [np.exp(5 * anomaly_map).astype(np.float32) * 1e-7 for anomaly_map in maps]  # 20 decades
    assert pixel_auroc(scaled, masks) == pytest.approx(pixel_auroc(maps, masks), abs=1e-5)


def slow_au_pro(maps, masks, limit):
    """Every distinct value as a threshold, every region by itself, trapezoids up to the limit."""
    regions = []
    for index, mask in enumerate(masks):
        count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
        regions += [(index, labels == number) for number in range(1, count)]
    free = np.concatenate([m[~mask] for m, mask in zip(maps, masks, strict=True)])
    curve = [(0.0, 0.0)]
    for threshold in np.unique(np.concatenate(maps, axis=None))[::-1]:
        overlap = np.mean([np.mean(maps[index][inside] >= threshold) for index, inside in regions])
        curve.append((np.mean(free >= threshold), overlap))
    area = 0.0
    for (left, start), (right, end) in pairwise(curve):
        stop = min(right, limit)
        if stop > left:
            area += (stop - left) * (start + start + (end - start) * (stop - left) / (right - left)) / 2
    return area / limit


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_au_pro_agrees_with_a_slow_sweep_over_all_thresholds(limit):
    maps, masks = textured(4, n=3, size=24, values=4)
    assert au_pro(maps, masks, limit) == pytest.approx(slow_au_pro(maps, masks, limit), abs=1e-9)


def test_au_pro_of_a_tiny_map_by_hand():
    # Two regions, of one and of two pixels; nine free pixels: one 4, three 1, five 0.
    mask = np.array([[1, 0, 1], [0, 0, 1], [0, 0, 0], [0, 0, 0]], bool)
    values = np.array([[5, 4, 5], [1, 1, 3], [1, 0, 0], [0, 0, 0]], np.float32)
    # From 5: rate 0, overlap (1 + 1/2) / 2 = 0.75. From 4: rate 1/9, overlap 0.75. From 3: overlap 1, and so on.
    expected = (1 / 9 * 0.75 + (0.3 - 1 / 9) * 1.0) / 0.3
    assert au_pro([values], [mask]) == pytest.approx(expected)


def test_au_pro_weighs_a_small_region_as_much_as_a_large_one():
    mask = np.zeros((20, 20), bool)
    mask[0, 0], mask[5:15, 5:15] = True, True
    found_large = np.where(mask, 1.0, 0.0).astype(np.float32)
    found_large[0, 0] = -1.0
    assert au_pro([found_large], [mask]) == pytest.approx(0.5)
    assert pixel_auroc([found_large], [mask]) == pytest.approx(100 / 101)


def test_regions_that_touch_at_a_corner_are_one():
    mask = np.zeros((4, 4), bool)
    mask[0, 0] = mask[1, 1] = mask[3, 3] = True
    values = np.zeros((4, 4), np.float32)
    values[3, 3] = 1.0  # finds one of two regions; were there three, it would be a third
    rest = 0.5 * 0.3 / 2  # under the line from (0, 0.5) to (1, 1): all other pixels are tied
    assert au_pro([values], [mask]) == pytest.approx(0.5 + rest)


def test_a_perfect_map_scores_one_and_a_constant_map_half():
    _, masks = textured(6)
    assert pixel_auroc([mask.astype(np.float32) for mask in masks], masks) == 1.0
    assert au_pro([mask.astype(np.float32) for mask in masks], masks) == 1.0
    assert pixel_auroc([np.ones(mask.shape, np.float32) for mask in masks], masks) == 0.5


def test_a_coarse_map_is_brought_to_the_size_of_its_mask():
    mask = np.zeros((64, 64), bool)
    mask[16:48, 16:48] = True
    coarse = cv2.resize(mask.astype(np.float32), (8, 8), interpolation=cv2.INTER_AREA)
    fine = cv2.resize(coarse, (64, 64), interpolation=cv2.INTER_LINEAR)
    assert pixel_auroc([coarse], [mask]) == pytest.approx(roc_auc_score(mask.ravel(), fine.ravel()), abs=1e-6)


@pytest.mark.parametrize("mask", [np.zeros((4, 4), bool), np.ones((4, 4), bool)])
def test_masks_of_one_class_are_refused(mask):
    with pytest.raises(InputError, match="one class"):
        pixel_auroc([np.ones((4, 4), np.float32)], [mask])


def test_pixel_figures_take_good_parts_as_free_of_defects():
    maps, masks = textured(7, n=2)
    good_map = maps[1][:20, :20]  # coarser than the masks
    images = [
        part("crack", 0.9, anomaly_map=maps[0], mask=masks[0]),
        part("good", 0.1, anomaly_map=good_map),
        part("crack", 0.8, anomaly_map=maps[1]),  # its defect is unknown: left out
    ]
    figures = evaluate(images, THRESHOLD)
    pair = [maps[0], good_map], [masks[0], np.zeros_like(masks[0])]
    assert figures.pixel_auroc == pixel_auroc(*pair)
    assert figures.au_pro == au_pro(*pair)


def test_without_masks_there_are_no_pixel_figures():
    maps, _ = textured(8, n=2)
    figures = evaluate([part("crack", 0.9, anomaly_map=maps[0]), part("good", 0.1, anomaly_map=maps[1])], THRESHOLD)
    assert (figures.pixel_auroc, figures.au_pro) == (None, None)


def test_bytes_of_an_8_bit_camera_are_read_as_reflectance():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = part("good", 0.1, picture=levels)
    assert image.view.dtype == np.float32
    np.testing.assert_array_equal(image.view, reflectance(levels, 8))
    np.testing.assert_array_equal(dataclasses.replace(image, score=0.2).view, image.view)
    assert part("good", 0.1).view is None


@pytest.mark.parametrize(("gamma", "kept"), [(1.0, np.uint8), (2.2, np.float32)])
def test_pictures_are_held_as_bytes_where_these_are_the_very_same(gamma, kept):
    levels = np.random.default_rng(1).integers(0, 256, (40, 30, 3), np.uint8)
    view = View(40, 30, colour=True, reference_size=(40, 30), gamma=gamma)
    seen = prepare(levels, 8, view, None).picture
    held = packed(seen)
    assert held.dtype == kept
    np.testing.assert_array_equal(part("good", 0.1, picture=held).view, seen)
    fine = np.random.default_rng(2).random((8, 8), np.float32)  # a camera of more bits, or corrected light
    assert packed(fine) is fine


def test_a_tested_part_is_held_in_bytes(tmp_path):
    levels = np.random.default_rng(1).integers(0, 256, (40, 30), np.uint8)
    (tmp_path / "1.png").write_bytes(encode_png(levels))
    view = View(40, 30, colour=False, reference_size=(40, 30))
    recipe = types.SimpleNamespace(condition=None, view=view, reference=None)
    pictures = Pictures(Photometric())
    image = _scored(recipe, lambda batch: (batch[0, 0], 0.5), Item(tmp_path / "1.png", "1.png", "good"), pictures)
    assert image.picture.dtype == np.uint8
    np.testing.assert_array_equal(image.view, reflectance(levels, 8))
