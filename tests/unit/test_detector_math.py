"""The numbers inside the detectors, against closed forms and independent methods."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from trainer.detectors import layout, patch_gaussian, patch_memory
from trainer.detectors.patch_layout import Weighing, held_out_scores


def test_the_distance_at_a_place_is_mahalanobis_with_the_neighbours_moments() -> None:
    values = torch.randn(40, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    centre, root = patch_gaussian.gaussians(patch_gaussian.Sums.of(values))
    found = patch_gaussian.distance(values[:1], centre, root)[0, 0, 2, 2]
    near = values[:, :, 1:4, 1:4].permute(0, 2, 3, 1).reshape(-1, 3).double().numpy()
    covariance = np.cov(near.T, bias=True) + patch_gaussian.RIDGE * np.eye(3)
    difference = values[0, :, 2, 2].numpy() - near.mean(0)
    assert float(found) == pytest.approx(np.sqrt(difference @ np.linalg.solve(covariance, difference)), rel=1e-4)


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


def test_the_weighed_score_has_the_first_parts_mean_and_deviation_whatever_the_units() -> None:
    generator = torch.Generator().manual_seed(6)
    parts = torch.randn(60, 3, generator=generator) * torch.tensor([0.5, 40.0, 3.0]) + torch.tensor([3.0, 900.0, 30.0])
    scores = Weighing.of(parts)(parts)
    assert float(scores.mean()) == pytest.approx(float(parts[:, 0].mean()), rel=1e-4)
    assert float(scores.std()) == pytest.approx(float(parts[:, 0].std()), rel=1e-3)
    rescaled = Weighing.of(parts * torch.tensor([1.0, 7.0, 0.2]))(parts * torch.tensor([1.0, 7.0, 0.2]))
    torch.testing.assert_close(rescaled, scores, rtol=1e-3, atol=1e-3)


def test_an_image_has_no_part_in_the_weights_that_score_it() -> None:
    parts = torch.randn(20, 3, generator=torch.Generator().manual_seed(7)) + 5.0
    fold = np.arange(20) % 5
    before = held_out_scores(parts, fold)
    parts[3, 2] += 1.0
    unit = Weighing.of(parts)
    expected = (parts[3] - parts[fold != 3].mean(0)) / parts[fold != 3].std(0)
    assert float(held_out_scores(parts, fold)[3]) == pytest.approx(
        float(unit.start + unit.step * expected.sum()), rel=1e-5
    )
    assert before.shape == (20,)


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
