"""What the scorers compute, against closed forms and independent methods."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from scipy.ndimage import correlate1d
from sklearn.neighbors import KernelDensity
from torch import Tensor, nn

from trainer import judges
from trainer.catalogue import detector_names, method
from trainer.errors import TrainingError
from trainer.learning import Material, Options
from trainer.reconstructors.dcgan import signed
from trainer.reconstructors.vae import Vae, elbo_loss
from trainer.scorers import anogan, elbo, laplacian, latent_frechet, latent_kde, one_class, residual, ssim

CHANCE = torch.Generator().manual_seed(0)
KEEP = torch.ones(32, 48)
NO_LATENT = torch.zeros(2, 1)


@pytest.fixture(autouse=True)
def _same_chance_for_every_test() -> None:
    CHANCE.manual_seed(0)


def silent(what: str, done: int, total: int) -> None:
    pass


def pair() -> tuple[Tensor, Tensor]:
    return torch.rand(2, 3, 32, 48, generator=CHANCE), torch.rand(2, 3, 32, 48, generator=CHANCE)


def material(images: Tensor) -> Material:
    return Material(images, torch.ones(images.shape[2:]), np.arange(len(images)) % 5, Path("unused"))


def test_the_residual_is_the_mean_absolute_or_squared_difference() -> None:
    image, reconstruction = pair()
    for norm, expected in ((1, (image - reconstruction).abs()), (2, (image - reconstruction) ** 2)):
        anomaly_map, score = residual.Residual(KEEP, norm)(image, reconstruction, NO_LATENT)
        torch.testing.assert_close(score, expected.mean((1, 2, 3)))
        middle = expected.mean(1)[:, 4:9, 10:15].mean((1, 2))
        torch.testing.assert_close(anomaly_map[:, 0, 6, 12], middle if norm == 1 else middle.sqrt())


def test_a_residual_of_another_norm_is_refused() -> None:
    with pytest.raises(TrainingError, match="need 1"):
        residual.fit(nn.Identity(), material(torch.rand(5, 1, 32, 32)), torch.arange(3), Options(norm=3), silent)


def test_the_elbo_is_the_loss_of_the_vae_less_what_no_reconstruction_can_lower() -> None:
    torch.manual_seed(3)
    network = Vae(1, 32, 48, Options(latent=6)).eval()
    image = torch.rand(1, 1, 32, 48, generator=CHANCE) * 0.98 + 0.01
    network.log_variance.bias.data.fill_(-30.0)  # z is its mean: the loss draws no noise
    network.log_variance.weight.data.zero_()
    least = F.binary_cross_entropy(image, image, reduction="sum")
    with torch.no_grad():
        anomaly_map, score = elbo.Elbo(network, KEEP)(image, *network(image))
        expected = elbo_loss(network, image, image) - least
    assert float(score[0]) == pytest.approx(float(expected), rel=1e-3)
    assert float(anomaly_map.min()) >= 0.0


@torch.no_grad()
def test_with_samples_the_elbo_is_the_mean_over_them() -> None:
    torch.manual_seed(3)
    network = Vae(1, 32, 48, Options(latent=6, samples=4)).eval()
    image = torch.rand(1, 1, 32, 48, generator=CHANCE)
    reconstruction, mean = network(image)
    _, log_variance = network.encode(image)
    samples = torch.sigmoid(network.decode(mean + network.noise * torch.exp(0.5 * log_variance)))
    losses = [float(elbo.surplus(image, sample[None]).sum()) for sample in samples]
    divergence = float(0.5 * (log_variance.exp() + mean**2 - 1.0 - log_variance).sum())
    _, score = elbo.Elbo(network, KEEP)(image, reconstruction, mean)
    assert float(score[0]) == pytest.approx(np.mean(losses) + divergence, rel=1e-5)
    assert float(elbo.surplus(image, reconstruction).sum()) == pytest.approx(min(losses), rel=1e-5)


class Discriminator(nn.Module):
    def features(self, image: Tensor) -> Tensor:
        return F.avg_pool2d(signed(image), 16).flatten(1)


def test_the_anogan_score_is_that_of_images_in_minus_one_to_one() -> None:
    image, reconstruction = pair()
    _, score = anogan.Anogan(Discriminator(), KEEP, 0.1)(image, reconstruction, NO_LATENT)
    x, y = signed(image), signed(reconstruction)
    features = (F.avg_pool2d(x, 16) - F.avg_pool2d(y, 16)).abs().sum((1, 2, 3))
    torch.testing.assert_close(score, (x - y).abs().sum((1, 2, 3)) + 0.1 * features)


def test_the_levels_of_the_pyramid_add_up_to_the_image_and_their_gradient_is_autograds() -> None:
    difference = torch.randn(2, 3, 40, 56, generator=CHANCE).requires_grad_(True)
    pyramid = laplacian.Pyramid(3, 40, 56)
    levels = pyramid(difference)
    whole = levels[-1]
    for depth, level in reversed(list(enumerate(levels[:-1]))):
        whole = level + pyramid.widened(whole, level, depth)
    torch.testing.assert_close(whole, difference)
    pyramid.loss(levels).sum().backward()
    torch.testing.assert_close(pyramid.gradient(levels), difference.grad)


def test_the_pyramid_shrinks_with_the_binomial_kernel() -> None:
    image = torch.rand(1, 1, 16, 16, generator=CHANCE)
    _, coarse = laplacian.Pyramid(1, 16, 16)(image)
    kernel = np.array([1, 4, 6, 4, 1]) / 16
    expected = correlate1d(correlate1d(image[0, 0].numpy(), kernel, 0), kernel, 1)
    np.testing.assert_allclose(coarse[0, 0, 1:-1, 1:-1].numpy(), expected[2:-2:2, 2:-2:2], rtol=1e-5)


def test_a_level_has_the_weight_of_the_pixels_that_it_stands_for() -> None:
    scorer = laplacian.Laplacian(KEEP, 1)
    flat = torch.full((1, 1, 32, 48), 0.3)
    anomaly_map, score = scorer(flat, torch.zeros_like(flat), NO_LATENT)
    assert [tuple(level.shape[2:]) for level in scorer.bands(flat)] == [(32, 48), (16, 24), (8, 12)]
    assert float(score[0]) == pytest.approx(0.3, rel=1e-5)  # nothing but the coarsest level
    torch.testing.assert_close(anomaly_map, flat)


def test_ssim_is_that_of_wang_et_al() -> None:
    image, reconstruction = pair()
    anomaly_map, score = ssim.Ssim(KEEP)(image, reconstruction, NO_LATENT)
    line = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
    weights = np.outer(line, line) / line.sum() ** 2
    found = []
    for row, column in itertools.product(range(12, 17), range(18, 23)):
        x, y = (
            picture[0].mean(0)[row - 5 : row + 6, column - 5 : column + 6].double().numpy()
            for picture in (image, reconstruction)
        )
        mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
        spread = (weights * (x - mean_x) ** 2).sum() + (weights * (y - mean_y) ** 2).sum()
        shared = (weights * (x - mean_x) * (y - mean_y)).sum()
        same = (2 * mean_x * mean_y + 1e-4) * (2 * shared + 9e-4)
        found.append(1 - same / ((mean_x**2 + mean_y**2 + 1e-4) * (spread + 9e-4)))
    assert float(anomaly_map[0, 0, 14, 20]) == pytest.approx(np.mean(found), rel=1e-4)
    torch.testing.assert_close(score, anomaly_map.mean((1, 2, 3)), rtol=0.02, atol=0.0)
    assert float(ssim.Ssim(KEEP)(image, image, NO_LATENT)[1].max()) < 1e-5


def test_surprise_is_the_log_density_of_a_gaussian_kernel_estimate() -> None:
    codes = torch.randn(60, 5, generator=CHANCE) * torch.tensor([5.0, 3.0, 1.0, 0.5, 0.1])
    scorer = latent_kde.LatentKde(codes, KEEP)
    components = (codes - codes.mean(0)) @ scorer.axes
    torch.testing.assert_close(components.square().mean(0), torch.ones(5), rtol=1e-4, atol=1e-4)
    density = KernelDensity(bandwidth=60 ** (-1 / 9)).fit(components.double().numpy())
    asked = torch.randn(4, 5, generator=CHANCE) * 3.0
    expected = density.score_samples(((asked - scorer.mean) @ scorer.axes).double().numpy())
    highest = KernelDensity(bandwidth=60 ** (-1 / 9)).fit(np.zeros((60, 5))).score_samples(np.zeros((1, 5)))
    np.testing.assert_allclose(scorer.surprise(asked).numpy(), highest - expected, rtol=1e-3)


def test_an_image_is_as_odd_as_the_odder_of_error_and_code() -> None:
    codes = torch.randn(40, 3, generator=CHANCE)
    scorer = latent_kde.LatentKde(codes, KEEP)
    scorer.limits = torch.tensor([0.1, 2.0])
    image = torch.full((1, 1, 32, 48), 0.5)
    usual, odd = scorer.mean[None], scorer.mean[None] + 20.0
    assert float(scorer(image, image - 0.3, usual)[1]) == pytest.approx(3.0, rel=1e-4)
    assert float(scorer(image, image - 0.3, odd)[1]) == pytest.approx(float(scorer.surprise(odd)) / 2.0, rel=1e-5)


def test_a_density_of_two_codes_is_refused() -> None:
    with pytest.raises(TrainingError, match="need at least 3"):
        latent_kde.fit(nn.Identity(), material(torch.rand(5, 1, 32, 32)), torch.arange(2), Options(), silent)


class Flat(nn.Module):
    """A reconstructor that leaves everything out; its code is the image's first numbers."""

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros_like(image), image.flatten(1)[:, :6]


@pytest.mark.parametrize(
    ("fit", "learn_usual"),
    [
        (one_class.fit_gmm, judges.Mixture.of),
        (one_class.fit_ocsvm, judges.OneClass.of),
        (one_class.fit_lof, judges.OutlierFactor.of),
    ],
)
def test_a_one_class_method_judges_the_code_alone_as_learnt_from_the_chosen_images(fit, learn_usual) -> None:
    images, options = torch.rand(40, 1, 32, 48, generator=CHANCE), Options(neighbours=5)
    scorer = fit(Flat(), material(images), torch.arange(30), options, silent)
    expected = learn_usual(images[:30].flatten(1)[:, :6], options)
    asked = torch.rand(4, 6, generator=CHANCE)
    anomaly_map, score = scorer(images[:4], torch.zeros_like(images[:4]), asked)
    torch.testing.assert_close(score, expected(asked))
    torch.testing.assert_close(anomaly_map, residual.Residual(KEEP)(images[:4], torch.zeros(4, 1, 32, 48), asked)[0])


def test_fewer_codes_than_neighbours_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"--neighbours"):
        one_class.fit_lof(Flat(), material(torch.rand(8, 1, 32, 48)), torch.arange(8), Options(neighbours=15), silent)


def test_the_distance_of_two_sets_is_frechets() -> None:
    first = torch.randn(200, 4, generator=CHANCE) @ torch.randn(4, 4, generator=CHANCE)
    second = torch.randn(150, 4, generator=CHANCE) @ torch.randn(4, 4, generator=CHANCE) + 0.5
    one, other = np.cov(first.double().numpy().T), np.cov(second.double().numpy().T)
    means = first.double().numpy().mean(0) - second.double().numpy().mean(0)
    expected = means @ means + np.trace(one + other - 2 * np.real(scipy.linalg.sqrtm(one @ other)))
    assert latent_frechet.frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)
    assert latent_frechet.frechet_distance(first, first) == pytest.approx(0.0, abs=1e-6)


def test_few_codes_have_no_covariance_and_are_compared_along_each_dimension() -> None:
    shape = torch.tensor([[1.0, 0.9], [0.0, 0.4]])  # the dimensions go together
    many, apart = torch.randn(400, 2, generator=CHANCE) @ shape, torch.randn(400, 2, generator=CHANCE) @ shape.flip(1)
    assert latent_frechet.whole_covariances(many, apart, many[:4])
    assert not latent_frechet.whole_covariances(many, many[:3])
    one, other = many.numpy(), apart.numpy()
    expected = ((one.mean(0) - other.mean(0)) ** 2).sum() + ((one.std(0, ddof=1) - other.std(0, ddof=1)) ** 2).sum()
    assert latent_frechet.diagonal_distance(many, apart) == pytest.approx(float(expected), rel=1e-4)
    straight = many @ torch.linalg.eigh(torch.cov(many.T))[1]  # along its axes both are the same
    stretched = straight * torch.tensor([2.0, 0.5]) + 1.0
    assert latent_frechet.diagonal_distance(straight, stretched) == pytest.approx(
        latent_frechet.frechet_distance(straight, stretched), rel=1e-5
    )


def test_the_score_is_the_distance_where_the_axes_agree_and_never_more() -> None:
    shape = torch.randn(5, 5, generator=CHANCE)
    good = torch.randn(30, 12, 5, generator=CHANCE) @ shape + 4.0 * torch.randn(12, 5, generator=CHANCE)  # 12 places
    scorer = latent_frechet.LatentFrechet(nn.Identity(), good, KEEP)
    apart = (good - good.mean(0)).flatten(0, 1) @ scorer.axes
    torch.testing.assert_close(torch.cov(apart.T), torch.eye(5), rtol=0.0, atol=0.05)  # each axis in its deviations
    stretched = apart * torch.tensor([2.0, 0.1, 1.0, 3.0, 1.0]) + 1.0
    many = latent_frechet.LatentFrechet(nn.Identity(), good, KEEP)
    many.usual = torch.zeros(1, 5)  # all 360 differences as those of one image
    expected = latent_frechet.frechet_distance(apart, stretched)
    assert float(many.distance((stretched @ scorer.axes.inverse())[None])) == pytest.approx(expected, rel=1e-4)
    other = torch.randn(12, 5, generator=CHANCE) @ torch.randn(5, 5, generator=CHANCE)
    most = latent_frechet.frechet_distance(apart, other @ scorer.axes)
    assert float(scorer.distance((scorer.usual + other)[None])) <= most * (1 + 1e-5)


def test_a_step_along_a_narrow_axis_counts_as_much_as_one_along_a_wide_axis() -> None:
    spread = torch.tensor([100.0, 1.0, 0.0])
    good = torch.randn(200, 8, 3, generator=CHANCE) * spread
    scorer = latent_frechet.LatentFrechet(nn.Identity(), good, KEEP)
    codes = torch.randn(1, 8, 3, generator=CHANCE) * spread
    usually, wide, narrow = (
        float(scorer.distance(codes + torch.tensor(step)))
        for step in ([0.0, 0.0, 0.0], [1000.0, 0.0, 0.0], [0.0, 30.0, 0.0])
    )
    assert usually < 5.0
    assert min(wide, narrow) > 50.0
    assert float(scorer.distance(codes + torch.tensor([0.0, 0.0, 1.0]))) < usually + 1.0  # no axis of its own: floor


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("kde_ae+elbo", "elbo needs a likelihood.*use it with vae"),
        ("vae+anogan", "anogan needs a discriminator: use it with dcgan"),
        ("noise_ae+latent_frechet", "several codes for one image.*dcgan or patch_ae or kde_ae"),
    ],
)
def test_a_pair_that_cannot_work_says_why_before_any_training(name: str, said: str) -> None:
    assert name not in detector_names()
    with pytest.raises(TrainingError, match=said):
        method(name)
