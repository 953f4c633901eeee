"""The numbers inside the detectors, against closed forms and independent methods."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trainer.detectors import layout, patch_gaussian, patch_memory, turned
from trainer.detectors.patch_layout import MOST_LAYOUT, PatchLayout, Weighing, held_out_scores, layout_weight
from trainer.learning import Material, Options


def test_the_distance_at_a_place_is_mahalanobis_with_the_neighbours_moments() -> None:
    values = torch.randn(40, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    centre, root = patch_gaussian.gaussians(patch_gaussian.Sums.of(values))
    found = patch_gaussian.distance(values[:1], centre, root)[0, 0, 2, 2]
    near = values[:, :, 1:4, 1:4].permute(0, 2, 3, 1).reshape(-1, 3).double().numpy()
    covariance = np.cov(near.T, bias=True) + patch_gaussian.RIDGE * np.eye(3)
    difference = values[0, :, 2, 2].numpy() - near.mean(0)
    assert float(found) == pytest.approx(np.sqrt(difference @ np.linalg.solve(covariance, difference)), rel=1e-4)


def test_a_detector_judges_by_the_same_distance_though_it_keeps_half_of_each_root() -> None:
    fold, keep = np.arange(60) % 5, torch.ones(1, 1, 5, 5)
    values = torch.randn(60, 50, 5, 5, generator=torch.Generator().manual_seed(5))
    module, _ = patch_gaussian.learned_gaussians(values, fold, keep, 0, lambda *_: None, copies=values[:0])
    reduced = F.conv2d(values - module.mean, module.components)
    centre, root = patch_gaussian.gaussians(patch_gaussian.Sums.of(reduced))
    expected = (patch_gaussian.distance(reduced, centre, root) - module.usual) / module.spread
    torch.testing.assert_close(module.judged(values)[0], expected, rtol=1e-3, atol=1e-3)
    assert module.lower.numel() < 0.52 * root.numel()


class Seen(nn.Module):
    """Features as they are given, in place of a backbone's."""

    def __init__(self, *seen: torch.Tensor) -> None:
        super().__init__()
        self.seen = list(seen)

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        return self.seen


def test_the_outline_draws_the_map_and_has_no_say_in_the_score() -> None:
    generator = torch.Generator().manual_seed(6)
    fold, keep = np.arange(60) % 5, torch.ones(1, 1, 8, 8)
    sharp, fine, near = (torch.randn(60, channels, 8, 8, generator=generator) for channels in (50, 50, 6))
    vectors = torch.randn(60, 30, generator=generator)
    outline, gaussian = (
        patch_gaussian.learned_gaussians(seen, fold, keep, 0, lambda *_: None, copies=seen[:0])[0]
        for seen in (sharp, fine)
    )
    material = Material(torch.zeros(60, 1, 8, 8), torch.ones(8, 8), fold, Path("unused"))
    memory = patch_memory.learned_memory(near, material, keep, Options(), lambda *_: None, copies=near[:0])[0]
    weighing = Weighing.of(torch.randn(60, 3, generator=generator), torch.ones(3))
    parts = (memory, gaussian, outline, layout.Layout(vectors))

    def judged(sharp: torch.Tensor, fine: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        anomaly_map, score = PatchLayout(Seen(sharp, fine, near[:1], vectors[:1]), parts, weighing)(near[:1])
        return anomaly_map[0, 0], score

    faulty = sharp[:1].clone()
    faulty[:, :, 2, 5] += 20.0
    plain_map, plain_score = judged(sharp[:1], fine[:1])
    marked_map, same_score = judged(faulty, fine[:1])
    same_map, higher_score = judged(sharp[:1], faulty)
    changed = (marked_map != plain_map).nonzero().tolist()
    assert changed == [[2, 5]] and float(marked_map.max()) == float(marked_map[2, 5])
    assert float(same_score) == float(plain_score) < float(higher_score)
    assert torch.equal(same_map, plain_map)


def test_sums_without_a_fold_are_the_sums_of_the_others() -> None:
    values = torch.randn(12, 2, 3, 4, generator=torch.Generator().manual_seed(2))
    rest = patch_gaussian.Sums.of(values) - patch_gaussian.Sums.of(values[:5])
    expected = patch_gaussian.Sums.of(values[5:])
    assert rest.count == expected.count == 7
    torch.testing.assert_close(rest.first, expected.first, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rest.second, expected.second, rtol=1e-4, atol=1e-4)


def test_whitened_components_are_uncorrelated_with_variance_one() -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.einsum("nchw,dc->ndhw", torch.randn(30, 4, 6, 6, generator=generator), torch.randn(4, 4))
    mean, components = patch_gaussian.whitening(values, torch.ones(1, 1, 6, 6), seed=0)
    reduced = F.conv2d(values - mean[:, None, None], components).transpose(0, 1).flatten(1)
    off_diagonal = torch.cov(reduced) - torch.diag(torch.var(reduced, dim=1))
    assert float(off_diagonal.abs().max()) < 1e-3
    assert float(torch.var(reduced[0])) == pytest.approx(1.0, abs=5e-3)


def test_principal_directions_keep_distances_between_patches_that_lie_in_so_few_dimensions() -> None:
    generator = torch.Generator().manual_seed(7)
    few = torch.randn(30, 5, 6, 6, generator=generator)
    values = torch.einsum("nchw,dc->ndhw", few, torch.randn(20, 5, generator=generator)) + 3.0
    keep = torch.ones(1, 1, 6, 6)
    mean, directions, variances = patch_memory.principal(values, keep, 0, 5)
    reduced = patch_memory.patches(F.conv2d(values - mean[:, None, None], directions), keep)
    whole = patch_memory.patches(values, keep)
    scaled = (whole - whole.mean(0)) / (whole.std(0) + 1e-3)
    near, true = ((seen[:40, None] - seen).square().sum(2).sqrt() for seen in (reduced, scaled))
    torch.testing.assert_close(near, true, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(reduced.var(0).double(), variances, rtol=1e-2, atol=1e-6)


def test_a_mixture_of_good_layouts_has_no_residual_and_what_lies_outside_has_its_own_length() -> None:
    generator = torch.Generator().manual_seed(4)
    basis = torch.linalg.qr(torch.randn(20, 3, generator=generator)).Q
    good = torch.randn(50, 2, generator=generator) @ basis[:, :2].T
    module = layout.Layout(good)
    module.scale = torch.ones(20)  # the closed form below is in the vectors' own unit
    module.components = layout.components(good - good.mean(0))
    outside = good[:1] + 3.0 * basis[:, 2]
    assert float(module(good[:1])[0]) == pytest.approx(0.0, abs=1e-4)
    assert float(module(outside)[0]) == pytest.approx(3.0, rel=1e-4)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (18, 10), (2, 4)])
def test_the_grid_is_an_adaptive_average_for_every_size(height: int, width: int) -> None:
    features = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(5))
    expected = F.adaptive_avg_pool2d(features, layout.GRID).flatten(1)
    torch.testing.assert_close(layout.Grid(height, width)(features), expected, rtol=1e-5, atol=1e-5)


WEIGHTS = torch.tensor([1.0, 1.0, 1.8])


def test_the_weighed_score_has_the_first_parts_mean_and_deviation_whatever_the_units() -> None:
    generator = torch.Generator().manual_seed(6)
    parts = torch.randn(60, 3, generator=generator) * torch.tensor([0.5, 40.0, 3.0]) + torch.tensor([3.0, 900.0, 30.0])
    scores = Weighing.of(parts, WEIGHTS)(parts)
    assert float(scores.mean()) == pytest.approx(float(parts[:, 0].mean()), rel=1e-4)
    assert float(scores.std()) == pytest.approx(float(parts[:, 0].std()), rel=1e-3)
    other = parts * torch.tensor([1.0, 7.0, 0.2])
    torch.testing.assert_close(Weighing.of(other, WEIGHTS)(other), scores, rtol=1e-3, atol=1e-3)


def test_an_image_has_no_part_in_the_moments_that_score_it() -> None:
    parts = torch.randn(20, 3, generator=torch.Generator().manual_seed(7)) + 5.0
    fold = np.arange(20) % 5
    before = held_out_scores(parts, WEIGHTS, fold)
    parts[3, 2] += 1.0
    unit = Weighing.of(parts, WEIGHTS)
    expected = (parts[3] - parts[fold != 3].mean(0)) / parts[fold != 3].std(0) * WEIGHTS
    assert float(held_out_scores(parts, WEIGHTS, fold)[3]) == pytest.approx(
        float(unit.start + unit.step * expected.sum()), rel=1e-5
    )
    assert before.shape == (20,)


def test_a_part_of_no_weight_moves_no_score() -> None:
    parts = torch.randn(20, 3, generator=torch.Generator().manual_seed(17)) + 5.0
    weighing = Weighing.of(parts, torch.tensor([1.0, 1.0, 0.0]))
    changed = parts + torch.tensor([0.0, 0.0, 100.0])
    torch.testing.assert_close(weighing(changed), weighing(parts))


def test_the_layout_counts_as_much_as_it_explains_of_unseen_good_images() -> None:
    generator = torch.Generator().manual_seed(18)
    fold = np.arange(40) % 5
    kinds = torch.randn(3, 500, generator=generator)
    fixed = torch.randn(40, 3, generator=generator) @ kinds + 0.05 * torch.randn(40, 500, generator=generator)
    texture = torch.randn(40, 500, generator=generator)
    explained = [layout.held_out_residuals(vectors, fold, vectors[:0])[1] for vectors in (fixed, texture)]
    weights = [layout_weight(share, Options()) for share in explained]
    assert explained[0] > 0.95
    assert weights[0] == MOST_LAYOUT
    assert weights[1] < 0.1
    assert layout_weight(0.6, Options()) == 1.5
    assert layout_weight(-0.1, Options()) == 0.0
    assert layout_weight(0.6, Options(layout_weight=0.25)) == 0.25


def test_one_odd_image_among_twenty_does_not_widen_a_place() -> None:
    distances = torch.rand(20, 1, 6, 6, generator=torch.Generator().manual_seed(8)) + 2.0
    usual, spread = patch_memory.moments(distances)
    odd = distances.clone()
    odd[int(distances[:, 0, 3, 3].argmax()), :, 3, 3] = 500.0
    torch.testing.assert_close(patch_memory.moments(odd), (usual, spread))
    kept = distances.numpy().astype(np.float64).copy()
    kept.sort(axis=0)
    near = kept[:19, 0, 1:6, 1:6]
    assert float(usual[0, 0, 3, 3]) == pytest.approx(near.mean(), rel=1e-5)
    floor = patch_memory.FLOOR * float((spread.mean() - 1e-6) / (1 + patch_memory.FLOOR))
    expected = np.sqrt(near.var(axis=0).mean()) + floor
    assert float(spread[0, 0, 3, 3]) == pytest.approx(expected, rel=1e-4)


def test_moments_of_a_single_image_are_its_own() -> None:
    usual, spread = patch_memory.moments(torch.full((1, 1, 5, 5), 3.0))
    assert float(usual.mean()) == 3.0
    assert bool(torch.isfinite(1.0 / spread).all())


def test_places_judged_alike_share_one_mean_and_deviation_without_the_highest_of_each() -> None:
    distances = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(9)) * torch.arange(1.0, 17.0).reshape(
        4, 4
    )
    usual, spread = patch_memory.moments(distances, alike=True)
    kept = np.sort(distances.numpy(), axis=0)[:38]
    assert usual.shape == spread.shape == (1, 1, 4, 4)
    torch.testing.assert_close(usual, torch.full_like(usual, float(kept.mean())))
    torch.testing.assert_close(spread, torch.full_like(spread, float(kept.std(ddof=1))), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("aspect", [1.0, 2.0])
def test_a_dot_that_is_turned_keeps_its_distance_from_the_centre_of_the_part(aspect: float) -> None:
    dots = torch.zeros(20, 1, 64, 64)
    dots[:, :, 30:34, 44:48] = 1.0  # its middle lies at (0.4375, 0) of -1..1
    found = turned.turned(dots, aspect, torch.Generator().manual_seed(10))
    places = (torch.arange(64) + 0.5) / 32 - 1.0
    weight = found.sum((1, 2, 3))
    x = (found.sum((1, 2)) * places).sum(1) / weight
    y = (found.sum((1, 3)) * places).sum(1) / weight
    torch.testing.assert_close(torch.hypot(x * aspect, y), torch.full((20,), 0.4375 * aspect), rtol=0.02, atol=0.02)
    angles = torch.atan2(y, x * aspect)
    assert float(angles.max() - angles.min()) > math.pi


def test_turning_repeats_edge_pixels() -> None:
    found = turned.turned(torch.full((5, 3, 32, 48), 0.7), 1.5, torch.Generator().manual_seed(11))
    torch.testing.assert_close(found, torch.full((5, 3, 32, 48), 0.7))


class Slopes(torch.nn.Module):
    """Images (N, 1, h, w) -> [slopes along x and y (N, 2, h/2, w/2)]."""

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        along_y, along_x = torch.gradient(image[:, 0], dim=(1, 2))
        return [F.avg_pool2d(torch.stack([along_x, along_y], 1), 2)]


def ramps(count: int, *, any_angle: bool) -> Material:
    """Return pictures of a slope: from left to right, or each along a direction of its own."""
    generator = torch.Generator().manual_seed(12)
    angle = torch.rand(count, 1, 1, generator=generator) * 2 * math.pi * any_angle
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    slope = (x * angle.cos() + y * angle.sin()) / 64.0
    noise = 0.003 * torch.randn(count, 32, 32, generator=generator)
    return Material((slope + noise)[:, None], torch.ones(32, 32), np.arange(count) % 5, Path("unused"))


def copies_of(material: Material, choice: str = "auto") -> int:
    return len(turned.turned_copies(Slopes(), material, Options(turned=choice), lambda *_: None)[0])


def test_only_parts_at_any_angle_get_turned_copies_unless_the_user_says_otherwise() -> None:
    still, lying = ramps(120, any_angle=False), ramps(120, any_angle=True)
    assert (copies_of(still), copies_of(lying)) == (0, 480)
    assert (copies_of(still, "on"), copies_of(lying, "off")) == (480, 0)


def test_a_background_that_turning_does_not_change_does_not_make_parts_lie_at_any_angle() -> None:
    """Most of each picture is noise, the same at any angle; the bar in the middle always lies the same way."""
    generator = torch.Generator().manual_seed(15)
    plain, copies = (0.01 * torch.randn(20, 4, 32, 32, generator=generator) for _ in range(2))
    plain[:, :2, 14:18, 10:22] += 1.0
    copies[:, 2:, 10:22, 14:18] += 1.0
    assert turned.nearer_turned(plain, copies, np.arange(20) % 5) < turned.ANY_ANGLE / 2
    assert (
        turned.nearer_turned(plain, plain + 0.01 * torch.randn(plain.shape, generator=generator), np.arange(20) % 5)
        > 0.3
    )


def test_parts_under_an_ignore_mask_get_no_turned_copies() -> None:
    material = ramps(120, any_angle=True)
    material.keep[:4] = 0.0
    assert copies_of(material) == 0


def test_turned_copies_are_remembered_and_never_judge_the_image_they_were_made_from() -> None:
    generator = torch.Generator().manual_seed(13)
    embedded, copies = (torch.randn(10, 6, 4, 4, generator=generator) for _ in range(2))
    material = Material(torch.zeros(10, 1, 8, 8), torch.ones(8, 8), np.arange(10) % 5, Path("unused"))
    keep = torch.ones(1, 1, 4, 4)

    def learned(seen: torch.Tensor) -> tuple[patch_memory.PatchMemory, torch.Tensor]:
        return patch_memory.learned_memory(embedded, material, keep, Options(), lambda *_: None, copies=seen)

    (module, _), changed = learned(copies), copies.clone()
    assert module.memory.shape == (6, 2 * 10 * 16)
    changed[3] = embedded[3]  # a copy that shows just what its image shows
    scaled = [F.conv2d(seen - module.mean, module.directions) for seen in (embedded, copies, changed)]
    before, after = (
        patch_memory.held_out_distances(scaled[0], material, keep, Options(), lambda *_: None, copies=seen)
        for seen in scaled[1:]
    )
    torch.testing.assert_close(before[3], after[3])


def test_turned_copies_widen_what_the_layout_and_the_gaussians_take_for_good() -> None:
    generator = torch.Generator().manual_seed(14)
    vectors, copies = torch.randn(15, 40, generator=generator), torch.randn(15, 40, generator=generator)
    fold = np.arange(15) % 5
    none, with_copies = (layout.held_out_residuals(vectors, fold, seen)[0] for seen in (copies[:0], copies))
    assert float(with_copies.mean()) < float(none.mean())
    embedded = torch.randn(15, 50, 4, 4, generator=generator)
    keep = torch.ones(1, 1, 4, 4)
    narrow, wide = (
        patch_gaussian.learned_gaussians(embedded, fold, keep, 0, lambda *_: None, copies=seen)[0]
        for seen in (embedded[:0], 3.0 * embedded)
    )
    assert float(wide.judged(3.0 * embedded)[1].mean()) < float(narrow.judged(3.0 * embedded)[1].mean())
    assert float(wide.usual.std()) == pytest.approx(0.0, abs=1e-6)
