"""Labelled defects: which are learnt from, the thresholds that they give, and too few of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import norm

from calibration.errors import InputError, NotRegistered
from calibration.images import encode_png
from calibration.photometric import Photometric
from calibration.preprocess import View
from calibration.thresholds import Thresholds, rate_upper_bound
from trainer.catalogue import method
from trainer.classifier import Examples, train_classifier
from trainer.data import Item, Pictures, types_of
from trainer.errors import TrainingError
from trainer.label_limits import best_f1, check_labels, normal_intersection, with_labels
from trainer.labels import LEARNT, counted, defect_folds, labelled, prepared_defects
from trainer.learning import Defects, Learned, Material, Options
from trainer.limits import good_parts
from trainer.metrics import ScoredImage, evaluate
from trainer.prepared import prepared_defect
from trainer.synthetic import synthetic_defects

SIDE = 32


def silent(what: str, done: int, total: int) -> None:
    pass


def material(labels: tuple[str, ...] = (), good: int = 10, side: int = SIDE, parts: tuple[str, ...] = ()) -> Material:
    batch = torch.rand(good, 1, side, side, generator=torch.Generator().manual_seed(1))
    parts = parts or tuple(map(str, range(len(labels))))
    fold = defect_folds(labels, parts, 5, 0)
    defects = Defects(torch.zeros(len(labels), 1, side, side), labels, parts, fold) if labels else None
    return Material(batch, torch.ones(side, side), np.arange(good) % 5, Path("checkpoint"), defects=defects)


def thresholds(score: float = 2.0) -> Thresholds:
    return Thresholds(score, 1.0, 0.1, 0.3, 9, "torch f32, held-out good images")


class Mean(torch.nn.Module):
    """A detector whose score is the mean of the image."""

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return image, image.flatten(1).mean(1)


def test_a_folder_may_name_several_defects_of_one_part():
    assert types_of("crack+stain") == ("crack", "stain")
    assert counted(["crack+stain", "stain", "stain"]) == {"crack": 1, "stain": 3}


def folds_of(labels: tuple[str, ...], seed: int) -> np.ndarray:
    return defect_folds(labels, tuple(map(str, range(len(labels)))), 5, seed)


@pytest.mark.parametrize("n", [2, 5, 23])
def test_every_type_is_spread_over_the_folds_and_two_images_suffice_to_learn_and_to_measure(n):
    fold = folds_of(("crack",) * n + ("stain",) * 2, seed=4)
    for kind in (fold[:n], fold[n:]):
        sizes = np.bincount(kind, minlength=5)
        assert sizes.max() - sizes.min() <= 1
        assert sizes[2] >= 1 and sizes[1] >= 1


@pytest.mark.parametrize("seed", range(3))
def test_parts_with_several_defects_are_spread_by_type(seed):
    labels = ("crack", "stain", "crack+stain")
    fold = folds_of(labels, seed)
    for kind in ("crack", "stain"):
        assert sorted(k for label, k in zip(labels, fold, strict=True) if kind in label) == [1, 2]
    labels = ("crack",) * 5 + ("crack+stain",) * 10 + ("stain",) * 5
    fold = folds_of(labels, seed)
    for kind in ("crack", "stain"):
        shown = [k for label, k in zip(labels, fold, strict=True) if kind in label]
        assert np.bincount(shown, minlength=5).tolist() == [3] * 5


@pytest.mark.parametrize("seed", range(3))
def test_images_of_one_defective_part_are_never_on_both_sides(seed):
    """Nor where they show different faults: the part then counts for every type that any of its images shows."""
    parts = tuple(f"part{number // 2}" for number in range(24))
    fold = defect_folds(("crack",) * 24, parts, 5, seed)
    assert np.array_equal(fold[::2], fold[1::2])
    assert np.bincount(fold[::2], minlength=5).tolist() == [2, 3, 3, 2, 2]
    fold = defect_folds(("crack", "stain") * 12, parts, 5, seed)
    assert np.array_equal(fold[::2], fold[1::2])
    assert np.bincount(fold[::2], minlength=5).tolist() == [2, 3, 3, 2, 2]


def test_a_type_of_one_part_is_refused_by_name():
    with pytest.raises(TrainingError, match=r"defect type 'stain' has 1 part, need at least 2.*train/stain"):
        labelled(material(("crack", "crack", "stain")), "cnn")
    with pytest.raises(TrainingError, match="defect type 'crack' has 1 part, need at least 2"):
        labelled(material(("crack", "crack", "crack+stain"), parts=("a", "a", "a")), "cnn")


@pytest.mark.parametrize("name", ["deep_knn", "gmm", "variation", "nearest_image", "cnn"])
def test_images_that_hold_no_numbers_are_refused(name):
    shown = material(("dent",) * 4, side=64)
    shown.batch[3, 0, 5, 5] = torch.nan
    with pytest.raises(TrainingError, match="images that hold NaN"):
        method(name)(shown, Options(neighbours=3), silent)


def test_labels_that_are_missing_are_missed_before_the_training():
    with pytest.raises(TrainingError, match=r"the threshold best_f1 needs labelled defects, none found"):
        check_labels(material(), "best_f1", "patch_layout")
    with pytest.raises(TrainingError, match="defect type 'dent' has 1 part"):
        check_labels(material(("dent",)), "false_reject_rate", "vae+siamese")
    check_labels(material(("dent",)), "false_reject_rate", "patch_layout")  # nobody uses them
    check_labels(material(), "false_reject_rate", "vae+siamese")  # makes its own


@pytest.mark.parametrize("detector", ["cnn", "vgg16", "vae+siamese"])
@pytest.mark.parametrize(("few", "enough"), [(("dent",) * 2, ("dent",) * 7), (("dent",) * 6, ("dent", "stain") * 2)])
def test_a_threshold_needs_two_defects_that_its_detector_never_saw(detector, few, enough):
    with pytest.raises(TrainingError, match=rf"best_f1 needs 2 defective parts that .*, 1 of {len(few)} found: add"):
        check_labels(material(few), "best_f1", detector)
    twice = tuple(str(number // 2) for number in range(2 * len(few)))
    with pytest.raises(TrainingError, match=rf", 1 of {len(few)} found: add"):
        check_labels(material(tuple(label for label in few for _ in "ab"), parts=twice), "best_f1", detector)
    check_labels(material(enough), "best_f1", detector)
    check_labels(material(few), "best_f1", "patch_layout")  # learns from none: all of them are unseen
    check_labels(material(few), "false_reject_rate", detector)


@pytest.mark.parametrize("name", ["cnn", "vgg16"])
def test_a_method_that_learns_from_labels_says_where_to_put_them(name):
    with pytest.raises(TrainingError, match=rf"{name} needs labelled defects, none found: .*train/DEFECT"):
        method(name)(material(), Options(), silent)


def test_defects_that_cannot_be_registered_are_left_out_and_named():
    def prepare(item: Item) -> np.ndarray:
        if item.name == "b":
            raise NotRegistered("too far", cause="out_of_view")
        return np.zeros((1, 4, 4), np.float32)

    items = [Item(Path(name), name, "dent") for name in "abc"]
    defects, notes = prepared_defects(items, prepare, 0)
    assert len(defects) == 2
    assert notes == ["1 of 3 labelled defects could not be registered: b (too far)"]
    assert prepared_defects([], prepare, 0) == (None, [])


@pytest.mark.parametrize(
    ("pixels", "told"),
    [
        (np.zeros((60, 64), np.uint8), "of 64x60 px found, the good images have 64x64"),
        (np.zeros((64, 64), np.uint16), "of 16 bits found, the good images have 8"),
    ],
)
def test_a_labelled_defect_unlike_the_good_images_is_named_in_the_trainers_words(tmp_path, pixels, told):
    file = tmp_path / "b.png"
    file.write_bytes(encode_png(pixels))
    item, pictures = Item(file, "b.png", "dent"), Pictures(Photometric())
    view = View(32, 32, colour=False, reference_size=(64, 64))
    with pytest.raises(InputError) as raised:
        prepared_defect(item, pictures, view, None)
    assert str(raised.value).startswith(f"{file}: a labelled defect {told}: take it")
    if pixels.dtype == np.uint8:  # where the good images differ in size, each fills the view
        assert prepared_defect(item, pictures, replace(view, fixed_size=False), None).shape == (1, 32, 32)


@pytest.mark.parametrize(("a", "s", "b", "t"), [(0, 1, 4, 1), (0, 1, 6, 2), (3, 0.5, 4, 2), (-5, 2, 1, 0.3)])
def test_the_intersection_is_where_both_fitted_densities_are_equal(a, s, b, t):
    generator = np.random.default_rng(0)
    good, defective = generator.normal(a, s, 400), generator.normal(b, t, 300)
    limit = normal_intersection(good, defective)
    heights = [norm.pdf(limit, np.mean(x), np.std(x, ddof=1)) for x in (good, defective)]
    assert heights[0] == pytest.approx(heights[1], rel=1e-9)
    assert np.mean(good) < limit < np.mean(defective)


def test_equal_deviations_cross_half_way():
    assert normal_intersection(np.array([0.0, 1.0, 2.0]), np.array([4.0, 5.0, 6.0])) == pytest.approx(3.0)


def spread(mean: float, deviation: float) -> np.ndarray:
    """Return 50 scores of just this mean and deviation."""
    drawn = np.random.default_rng(1).normal(size=50)
    return mean + deviation * (drawn - drawn.mean()) / drawn.std(ddof=1)


@pytest.mark.parametrize(("s", "t"), [(10.0, 1.0), (1.0, 10.0)])
def test_normals_that_do_not_cross_between_their_means_give_no_threshold(s: float, t: float):
    with pytest.raises(TrainingError, match=rf"score 0\.1 \+- {t:.0f}, good ones .* \+- {s:.0f}: these normals do not"):
        normal_intersection(spread(0.0, s), spread(0.1, t))
    assert 0.0 <= normal_intersection(spread(0.0, 1.0), spread(0.1, 1.0)) <= 0.1
    assert 0.0 <= normal_intersection(spread(0.0, s), spread(40.0, t)) <= 40.0


def test_scores_that_no_normal_fits_are_refused():
    two = np.array([1.0, 2.0])
    with pytest.raises(TrainingError, match="all 3 good parts score 1: no normal"):
        normal_intersection(np.ones(3), two)
    with pytest.raises(TrainingError, match="1 defective part scored unseen, need at least 2"):
        normal_intersection(two, np.array([5.0]))
    with pytest.raises(TrainingError, match=r"defective parts score 0.5 on average, good ones 1.5"):
        normal_intersection(two, two - 1)
    with pytest.raises(TrainingError, match="a defective part's score is not a finite number"):
        best_f1(two, np.array([5.0, np.nan]))


def test_the_best_f1_is_that_of_the_evaluation():
    generator = np.random.default_rng(2)
    good, defective = generator.normal(0, 1, 60), generator.normal(1.5, 1, 40)
    limit = best_f1(good, defective)
    images = [ScoredImage(f"g{i}", "good", s) for i, s in enumerate(good)]
    images += [ScoredImage(f"d{i}", "dent", s) for i, s in enumerate(defective)]
    figures = evaluate(images, limit)
    assert figures.f1 == pytest.approx(figures.best_f1)


def test_a_threshold_from_labels_keeps_the_statement_about_good_parts():
    learned = Learned(Mean(), np.arange(9), np.linspace(0.4, 0.6, 9), np.ones(9), np.zeros((9, 2, 2), np.float32))
    shown = material(("dent",) * 4)
    shown.defects.batch[:] = torch.tensor([0.7, 0.75, 0.8, 0.85])[:, None, None, None]
    fitted = with_labels(thresholds(), good_parts(learned), learned, shown, "best_f1")
    assert fitted.score == pytest.approx(0.65)
    assert fitted.false_reject_rate == pytest.approx(1 / 10)  # none of 9 good parts is above
    assert fitted.fitted_on.endswith("score: best_f1 with 4 defective parts")
    shown.defects.batch[:] = torch.tensor([0.56, 0.57, 0.8, 0.85])[:, None, None, None]
    lower = with_labels(thresholds(), good_parts(learned), learned, shown, "best_f1")
    assert lower.false_reject_rate == pytest.approx(1 - 7 / 10)
    assert lower.rate_upper_bound > fitted.rate_upper_bound
    assert with_labels(thresholds(), good_parts(learned), learned, shown, "false_reject_rate") == thresholds()


def test_parts_that_were_left_out_count_in_the_bound_of_a_threshold_from_labels_too():
    learned = Learned(Mean(), np.arange(66), np.linspace(0.4, 0.6, 66), np.ones(66), np.zeros((66, 2, 2), np.float32))
    shown = material(("dent",) * 4)
    shown.defects.batch[:] = torch.tensor([0.7, 0.75, 0.8, 0.85])[:, None, None, None]
    good = good_parts(learned, left_out=["a", "b", "c", "d"])
    fitted = with_labels(thresholds(), good, learned, shown, "best_f1")
    assert fitted.rate_upper_bound == rate_upper_bound(66, 1 / 67, left_out=4)
    assert fitted.rate_upper_bound > 0.12


def test_a_part_of_several_images_counts_once_in_a_threshold_from_labels_with_its_highest_score():
    """Good parts a and b reach 0.5 and 0.6, the defective ones 0.85 and 0.9: the rule sees none of the lower images."""
    learned = Learned(Mean(), np.arange(4), np.array([0.1, 0.5, 0.6, 0.2]), np.ones(4), np.zeros((4, 2, 2), np.float32))
    shown = material(("dent",) * 4, parts=("c", "c", "d", "d"))
    shown.defects.batch[:] = torch.tensor([0.55, 0.85, 0.9, 0.15])[:, None, None, None]
    fitted = with_labels(thresholds(), good_parts(learned, list("aabb")), learned, shown, "best_f1")
    assert fitted.score == pytest.approx((0.6 + 0.85) / 2)
    assert fitted.fitted_on.endswith("score: best_f1 with 2 defective parts")


def test_defects_that_were_learnt_from_give_no_threshold():
    learned = Learned(
        Mean(), np.arange(9), np.linspace(0.4, 0.6, 9), np.ones(9), np.zeros((9, 2, 2), np.float32), LEARNT
    )
    shown = material(("dent",) * 10)
    values = torch.where(torch.from_numpy(shown.defects.fold == 1), 0.8, 5.0)
    shown.defects.batch[:] = values[:, None, None, None]
    assert with_labels(thresholds(), good_parts(learned), learned, shown, "best_f1").score == pytest.approx(0.7)


def test_defects_that_score_below_every_good_part_give_no_threshold():
    learned = Learned(Mean(), np.arange(9), np.linspace(0.4, 0.6, 9), np.ones(9), np.zeros((9, 2, 2), np.float32))
    shown = material(("dent",) * 40)
    with pytest.raises(TrainingError, match="below every good part's score"):
        with_labels(thresholds(), good_parts(learned), learned, shown, "best_f1")


def test_a_part_with_two_defects_counts_for_both_types_and_once_in_all():
    images = [
        ScoredImage("a", "good", 0.1),
        ScoredImage("b", "crack", 0.2),
        ScoredImage("c", "crack+stain", 0.9),
        ScoredImage("d", "stain", 0.8),
    ]
    figures = evaluate(images, 0.5)
    assert {name: (one.n, one.detected) for name, one in figures.by_defect.items()} == {
        "crack": (2, 1),
        "stain": (2, 2),
    }
    assert figures.n_defective == 3
    assert figures.escape == pytest.approx(1 / 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_made_defects_are_seen_under_their_masks_and_nowhere_else(channels):
    images = torch.rand(4, channels, 64, 96, generator=torch.Generator().manual_seed(3)) * 0.2 + 0.4
    keep = torch.ones(64, 96)
    keep[:, :40] = 0.0
    made, masks = synthetic_defects(images, keep, 24, seed=5)
    assert made.shape == (24, channels, 64, 96)
    assert masks.any(dim=2).any(dim=1).all()
    assert not masks[:, :, :40].any()
    assert float(made.min()) >= 0.0 and float(made.max()) <= 1.0
    for one, mask in zip(made, masks, strict=True):
        nearest = (one - images).abs().amax(1)  # (4, h, w)
        source = nearest[:, ~mask].mean(1).argmin()
        assert float(nearest[source][~mask].max()) <= 0.1 * 1.0 + 1e-6
        assert float(nearest[source][mask].mean()) > 0.03
    again, _ = synthetic_defects(images, keep, 24, seed=5)
    assert torch.equal(made, again)


def test_no_defect_is_made_where_nothing_is_looked_at():
    with pytest.raises(TrainingError, match="no visible defect could be made"):
        synthetic_defects(torch.rand(2, 1, 32, 32), torch.zeros(32, 32), 1, seed=0)


def test_a_classifier_needs_both_kinds_and_a_share_of_defects(tmp_path: Path):
    network = torch.nn.Linear(2, 1)
    rest = replace(material(), checkpoint=tmp_path / "checkpoint"), Options(defect_share=0.7), silent
    some, none = torch.zeros(3, 2), torch.zeros(0, 2)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
    with pytest.raises(TrainingError, match="3 good and 0 defective images to learn from"):
        train_classifier("cnn", network, (Examples(some, none), Examples(some, none)), optimiser, rest)
    with pytest.raises(TrainingError, match=r"defect share 0.7 found, need above 0 and at most 0.5"):
        train_classifier("cnn", network, (Examples(some, some), Examples(some, some)), optimiser, rest)
