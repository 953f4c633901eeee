"""deep_knn, gmm, ocsvm, lof, variation, nearest_image, map_knn: the arithmetic against scikit-learn and by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import LocalOutlierFactor, NearestNeighbors
from sklearn.preprocessing import StandardScaler
from sklearn.svm import OneClassSVM

from trainer.catalogue import method
from trainer.detectors.embedding import Places
from trainer.detectors.nearest_image import Nearest, Smaller
from trainer.detectors.variation import LEAST_DEVIATION, Variation
from trainer.errors import TrainingError
from trainer.judges import NU, RIDGE, Mixture, Neighbours, OneClass, OutlierFactor, Reduced
from trainer.learning import Material, Options
from trainer.scorers.map_knn import MapEmbedding, cascade

OPTIONS = Options(neighbours=4)


def silent(what: str, done: int, total: int) -> None:
    pass


def vectors(n: int, seed: int, dimensions: int = 40) -> torch.Tensor:
    """Return vectors from two clusters, with one dimension that never changes."""
    generator = np.random.default_rng(seed)
    found = generator.normal(size=(n, dimensions)) * np.linspace(0.1, 4.0, dimensions)
    found[::3, :5] += 6.0
    found[:, 7] = 2.0
    return torch.from_numpy(found.astype(np.float32))


GOOD, TEST = vectors(60, 0), torch.cat([vectors(10, 1), vectors(10, 2) + 3.0])


def test_deep_knn_is_the_mean_distance_that_scikit_learn_finds():
    judge = Neighbours.of(GOOD, OPTIONS)
    varying = [i for i in range(GOOD.shape[1]) if i != 7]
    scaler = StandardScaler().fit(GOOD[:, varying].double())
    found = NearestNeighbors(n_neighbors=4).fit(scaler.transform(GOOD[:, varying].double()))
    inside = TEST.clone()
    inside[:, 7] = 2.0
    expected = found.kneighbors(scaler.transform(inside[:, varying].double()))[0].mean(1)
    np.testing.assert_allclose(judge(inside), expected, rtol=1e-4)


def test_a_dimension_that_never_changed_still_counts_when_it_does():
    judge = Neighbours.of(GOOD, OPTIONS)
    changed = GOOD[:1].clone()
    changed[0, 7] += 100.0
    assert float(judge(changed)) > 3 * float(judge(GOOD[:1]))


def test_a_known_vector_is_at_no_distance_from_itself():
    assert float(Neighbours.of(GOOD, replace(OPTIONS, neighbours=1))(GOOD[5:6])) == 0.0


def test_the_mixture_is_that_of_scikit_learn_below_its_bound():
    judge = Mixture.of(GOOD, OPTIONS)
    points = judge.reduced(GOOD).double().numpy()
    fitted = GaussianMixture(len(judge.below), reg_covar=RIDGE, random_state=0).fit(points)
    density = fitted.score_samples(judge.reduced(TEST).double().numpy())
    np.testing.assert_allclose(judge(TEST), judge.bound - density, rtol=1e-4, atol=1e-4)
    assert float(judge(GOOD).min()) >= 0.0


def test_the_one_class_machine_decides_as_scikit_learn_does():
    judge = OneClass.of(GOOD, OPTIONS)
    fitted = OneClassSVM(nu=NU, gamma="scale").fit(judge.reduced(GOOD).double().numpy())
    decision = fitted.decision_function(judge.reduced(TEST).double().numpy())
    np.testing.assert_allclose(judge.boundary - judge(TEST).double().numpy(), decision, atol=1e-4)


def test_the_outlier_factor_is_that_of_scikit_learn():
    judge = OutlierFactor.of(GOOD, OPTIONS)
    fitted = LocalOutlierFactor(n_neighbors=4, novelty=True).fit(judge.reduced(GOOD).double().numpy())
    expected = -fitted.score_samples(judge.reduced(TEST).double().numpy())
    np.testing.assert_allclose(judge(TEST), expected, rtol=1e-4)


def test_components_are_white_and_no_more_than_a_third_of_the_images():
    reduced = Reduced(GOOD[:15])(GOOD[:15])
    assert reduced.shape == (15, 5)
    torch.testing.assert_close(torch.cov(reduced.T), torch.eye(5), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["deep_knn", "lof", "vae+map_knn"])
def test_fewer_good_images_than_neighbours_are_refused_with_what_to_give(name: str, tmp_path: Path):
    batch = torch.rand(10, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    material = Material(batch, torch.ones(64, 64), np.arange(10) % 5, tmp_path / "checkpoint")
    with pytest.raises(TrainingError, match=r"good images left to compare with, 15 neighbours wanted.*--neighbours \d"):
        method(name)(material, Options(epochs=1, latent=4), silent)


def test_a_place_counts_in_the_deviations_of_good_parts_there():
    good = torch.randn(200, 3, 2, 2, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 5.0]) + 2.0
    places = Places.of(good)
    assert float(places(good).square().mean()) == pytest.approx(1 / (1.2**2 + 0.5), rel=0.5)
    shifted = good[:1].clone()
    shifted[..., 0] = 2.0
    shifted[..., 1] = 2.0
    shifted[0, :, 0, 0] += 8.0  # quiet there
    shifted[0, :, 1, 1] += 8.0  # lively there
    found = places(shifted)[0, 0]
    assert float(found[0, 0]) > 2 * float(found[1, 1]) > 4 * float(found[0, 1])


def test_variation_is_the_distance_from_the_mean_in_deviations():
    images = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    keep = torch.ones(4, 4)
    keep[0] = 0.0
    anomaly_map, score = Variation(images, keep)(images[:1] + 0.3)
    values = images.numpy()[:, 0]
    deviations = (values[0] + 0.3 - values.mean(0)) / (values.std(0) + LEAST_DEVIATION)
    np.testing.assert_allclose(anomaly_map[0, 0, 1:], np.abs(deviations)[1:], rtol=1e-4)
    assert float(score) == pytest.approx((deviations[1:] ** 2).mean(), rel=1e-4)
    assert not anomaly_map[0, 0, 0].any()


def test_the_nearest_image_is_the_one_with_the_least_distance():
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    part = (images[4] + 0.02)[None]
    anomaly_map, score = Nearest(images, torch.ones(1, 1, 8, 8))(part)
    assert float(score) == pytest.approx(0.02, rel=1e-3)
    torch.testing.assert_close(anomaly_map, torch.full((1, 1, 8, 8), 0.02), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("height", "width", "side"), [(256, 256, (64, 64)), (64, 64, (64, 64)), (96, 352, (48, 176))])
def test_images_are_compared_in_small(height, width, side):
    assert Smaller(height, width)(torch.zeros(1, 1, height, width)).shape[2:] == side


def test_the_cascade_of_poolings_is_maximum_mean_and_maximum_of_means():
    features = torch.zeros(1, 2, 5, 5)
    features[0, 0, 2, 2] = 9.0
    assert cascade(features)[0].tolist() == pytest.approx([9.0, 0.0, 9 / 25, 0.0, 1.0, 0.0])


def test_the_network_sees_the_difference_with_its_sign_and_mid_gray_where_there_is_none(monkeypatch):
    monkeypatch.setattr("trainer.scorers.map_knn.taps", lambda *_: lambda image: [image])
    image, keep = torch.full((1, 1, 8, 8), 0.4), torch.ones(8, 8)
    keep[:, 4:] = 0.0

    def seen(rebuilt: float) -> list[float]:
        return MapEmbedding(Options())(image, torch.full_like(image, rebuilt), keep)[0].tolist()

    assert seen(0.4) == pytest.approx([0.5, 0.5, 0.5])
    assert seen(0.6) == pytest.approx(
        [0.5, 0.45, 0.5]
    )  # darker than its reconstruction, but where nothing is looked at
    assert seen(0.2) == pytest.approx([0.6, 0.55, 0.6])
