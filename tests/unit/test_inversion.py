"""The search in latent space: gradients against autograd, steps against torch's Adam, the looped graph against both."""

from __future__ import annotations

import io
import logging
import warnings
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from trainer.chain import Chain
from trainer.errors import TrainingError
from trainer.inversion import Distance, Inversion, Step, check_options, counted
from trainer.learning import Options
from trainer.reconstructors.gan_training import Adversaries

SIZE = torch.Size((1, 32, 32))
OPTIONS = Options(latent=8, inversion_steps=5)


def adversaries(options: Options = OPTIONS, size: torch.Size = SIZE) -> Adversaries:
    """Return networks that were never trained, with weights large enough to show every gradient."""
    torch.manual_seed(1)
    found = Adversaries(size, options)
    for layer in found.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            layer.reset_parameters()
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0.0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
            layer.weight.data.uniform_(0.5, 1.5)
            layer.bias.data.normal_(0.0, 0.1)
    return found.eval().requires_grad_(False)


def distance(options: Options = OPTIONS) -> Distance:
    found = adversaries(options)
    return Distance(found.generator, found.features, SIZE, options)


def exact(found: Distance) -> Distance:
    """Return it with rectifiers that open at one point, as autograd's do."""
    found.generator.kink = found.features.kink = 0.0
    return found


def images(count: int = 2) -> Tensor:
    return torch.rand(count, *SIZE, generator=torch.Generator().manual_seed(2)) * 2.0 - 1.0


def starts(count: int = 2) -> Tensor:
    return torch.randn(count, OPTIONS.latent, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("options", [OPTIONS, replace(OPTIONS, resize=True), replace(OPTIONS, wasserstein=True)])
def test_the_written_gradient_is_that_of_autograd(options: Options) -> None:
    found = adversaries(options, torch.Size((3, 32, 64)))
    for layers, value in ((found.generator, starts()), (found.features, torch.rand(2, 3, 32, 64))):
        chain = Chain(layers, kink=0.0)
        value.requires_grad_(True)
        answer = layers(value)
        weights = torch.randn(answer.shape)
        (answer * weights).sum().backward()
        values = chain(value.detach())
        torch.testing.assert_close(values[-1], answer.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(chain.gradient(values, weights), value.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [OPTIONS, replace(OPTIONS, inversion_loss="laplacian"), replace(OPTIONS, feature_weight=0.0)]
)
def test_the_slope_of_every_loss_is_that_of_autograd(options: Options) -> None:
    found, image = exact(distance(options)), images()
    z = starts().requires_grad_(True)
    loss, slope, _ = found.loss(z, image, found.goal(image))
    torch.testing.assert_close(slope.detach(), torch.autograd.grad(loss.sum(), z)[0], rtol=1e-4, atol=1e-3)


def test_a_rectifier_opens_gradually_on_the_way_back() -> None:
    before = torch.tensor([[-0.1, -0.025, 0.0, 0.0125, 0.025, 0.1]])
    share = torch.tensor([[0.0, 0.0, 0.5, 0.75, 1.0, 1.0]])
    for layer, least in ((nn.ReLU(), 0.0), (nn.LeakyReLU(0.2), 0.2)):
        chain = Chain(nn.Sequential(layer))
        found = chain.gradient(chain(before), torch.full_like(before, 3.0))
        torch.testing.assert_close(found, 3.0 * (least + (1.0 - least) * share))


@pytest.mark.parametrize("loss", ["anogan", "laplacian"])
def test_what_rounding_does_to_the_start_the_search_does_not_magnify(loss: str) -> None:
    """With steps at the kinks it does, up to some hundred times: another map in every engine."""
    options = replace(OPTIONS, inversion_loss=loss, inversion_steps=16)
    found, image, start = Inversion(distance(options), options), images(16), starts(16)
    found.settle(image, start)
    jolt = 1e-5 * torch.randn(start.shape, generator=torch.Generator().manual_seed(4))

    def apart(one: Tensor, other: Tensor) -> Tensor:
        return (one - other).flatten(1).norm(dim=1)

    ends = found(image, start)[1], found(image, start + jolt)[1]
    magnified = apart(*ends) / jolt.norm(dim=1)
    assert float(magnified.max()) < 5.0


def test_the_anogan_loss_sums_pixels_and_weighted_features() -> None:
    networks, image, z = adversaries(), images(), starts()
    loss, _, _ = distance().loss(z, image, distance().goal(image))
    picture = networks.generator(z)
    features = (networks.features(picture), networks.features(image))
    expected = huber(picture, image).sum((1, 2, 3)) + OPTIONS.feature_weight * huber(*features).sum(1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(huber(picture, image).sum(), (picture - image).abs().sum(), rtol=0.02, atol=0.0)


def huber(one: Tensor, other: Tensor) -> Tensor:
    """Return L1 rounded off below one gray level of 255 in -1..1, by torch's own function."""
    gray_level = 2.0 / 255.0
    return torch.nn.functional.huber_loss(one, other, reduction="none", delta=gray_level) / gray_level


def by_adam(found: Inversion, image: Tensor, start: Tensor, steps: int) -> list[Tensor]:
    """Return z after 0..steps steps of torch's own Adam."""
    z = start.clone().requires_grad_(True)
    optimiser = torch.optim.Adam([z], lr=OPTIONS.inversion_rate, eps=float(found.adam.epsilon))
    path = [z.detach().clone()]
    for _ in range(steps):
        optimiser.zero_grad()
        with torch.no_grad():
            z.grad = found.distance.loss(z, image, found.distance.goal(image))[1]
        optimiser.step()
        path.append(z.detach().clone())
    return path


def loss_of(found: Inversion, z: Tensor, image: Tensor) -> Tensor:
    return found.distance.loss(z, image, found.distance.goal(image))[0]


def test_the_inversion_is_the_best_of_torchs_own_adam() -> None:
    found, image, start = Inversion(distance(), OPTIONS), images(), starts()
    found.settle(image, start)
    path = by_adam(found, image, start, OPTIONS.inversion_steps)
    losses = torch.stack([loss_of(found, z, image) for z in path])
    picture, z = found(image, start)
    best = losses.argmin(0)
    nearest = torch.stack([path[int(best[row])][row] for row in range(len(image))])
    torch.testing.assert_close(z, path[-1], rtol=0.0, atol=1e-5)
    torch.testing.assert_close(picture, found.distance.generator(nearest)[-1], rtol=1e-4, atol=1e-4)
    assert bool((best > 0).all())


def test_more_steps_are_never_worse() -> None:
    image, start = images(), starts()
    losses = []
    for steps in (0, 1, 4, 12):
        found = Inversion(distance(), replace(OPTIONS, inversion_steps=steps, inversion_rate=0.5))
        picture = found(image, start)[0]
        apart = huber(found.distance.features(picture)[-1], found.distance.goal(image)).sum(1)
        losses.append(huber(picture, image).sum((1, 2, 3)) + OPTIONS.feature_weight * apart)
    assert bool((torch.stack(losses).diff(dim=0) <= 0.0).all())
    assert bool((losses[0] > losses[-1]).all())


def test_the_one_step_graph_looped_by_a_host_is_torchs_adam() -> None:
    found, image, start = Inversion(distance(), OPTIONS), images(1), starts(1)
    found.settle(image, start)
    session = exported(Step(found), (start, start * 0.1, start**2, torch.rand(1), torch.rand(1) + 0.5, image))
    z, m, v = start.numpy(), np.zeros((1, 8), np.float32), np.zeros((1, 8), np.float32)
    path = by_adam(found, image, start, steps=12)
    for step in range(1, 13):
        corrections = {"c1": np.float32([1 - 0.9**step]), "c2": np.float32([1 - 0.999**step])}
        z, m, v = session.run(None, {"z": z, "m": m, "v": v, **corrections, "x": image.numpy()})
        np.testing.assert_allclose(z, path[step].numpy(), rtol=0.0, atol=1e-5, err_msg=f"step {step}")


def exported(module: nn.Module, examples: tuple[Tensor, ...]) -> onnxruntime.InferenceSession:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            module,
            examples,
            dynamo=True,
            opset_version=18,
            input_names=["z", "m", "v", "c1", "c2", "x"],
            external_data=False,
            verbose=False,
        )
    program.save(buffer)
    return onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])


def test_a_coordinate_without_slope_stays_where_it_is() -> None:
    found, image, start = Inversion(distance(), OPTIONS), images(), starts()
    found.settle(image, start)
    slope = found.distance.loss(start, image, found.distance.goal(image))[1]
    assert float(found.adam.epsilon) == pytest.approx(0.05 * float(slope.square().mean().sqrt()), rel=1e-5)
    nearly = torch.full((1, 8), 1e-3 * float(found.adam.epsilon))
    moved, _, _ = found.adam(
        start[:1], (torch.zeros(1, 8), torch.zeros(1, 8)), nearly, (found.first[0], found.second[0])
    )
    assert float((moved - start[:1]).abs().max()) < 0.01 * OPTIONS.inversion_rate


def test_what_is_masked_is_the_worst_share_in_whole_cells() -> None:
    image = torch.zeros(1, 3, 32, 64)
    picture = image.clone()
    picture[:, :, 8:24, 40:56] = 0.5
    picture[:, :, 0:8, 0:8] = 0.1
    kept = counted(image, picture, share=4 / 32)
    assert kept.shape == (1, 1, 32, 64)
    assert float(kept[:, :, 8:24, 40:56].max()) == 0.0
    assert float(kept.sum()) == 32 * 64 - 16 * 16


def test_behind_the_mask_a_defect_pulls_nothing() -> None:
    good, start = adversaries().generator(starts(1)), starts(1) + 0.2
    found = []
    for share in (0.0, 2 / 16):
        inversion = Inversion(distance(), replace(OPTIONS, masked_share=share))
        answers = []
        for defect in (-3.0, 3.0):
            damaged = good.clone()
            damaged[:, :, 8:16, 8:24] = defect
            answers.append(inversion(damaged, start)[1])
        found.append(float((answers[0] - answers[1]).abs().max()))
    assert found[0] > 1e-5
    assert found[1] == 0.0


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"inversion_loss": "l2"}, "anogan, laplacian"),
        ({"masked_share": 0.9}, "0 .nothing is masked. to 0.5"),
        ({"inversion_rate": 0.0}, "of more than 0"),
        ({"inversion_steps": -1}, "at least 0 steps"),
        ({"feature_weight": float("nan")}, "weight of at least 0"),
    ],
)
def test_options_that_no_inversion_can_follow_are_refused(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(TrainingError, match=said):
        check_options(replace(OPTIONS, **wrong))
