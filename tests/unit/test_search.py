"""How long a dcgan searches: what a takt allows, and no step that good parts gain nothing from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trainer import catalogue, search
from trainer.learning import Material, Options
from trainer.reconstructors.dcgan import Dcgan
from trainer.reconstructors.gan_training import Adversaries, down
from trainer.scorers import residual
from trainer.search import MOST_STEPS, affordable, pick_steps, told, worthwhile

SIZE = torch.Size((1, 32, 32))
OPTIONS = Options(latent=8, inversion_steps=4)


class Detector(nn.Module):
    """The reconstruction as map, what it misses as score."""

    def __init__(self, network: Dcgan) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        picture, _ = self.network(image)
        return picture, (picture - image).abs().flatten(1).mean(1)


def network(**changes: float) -> Dcgan:
    """Return a dcgan that was never trained."""
    torch.manual_seed(1)
    options = replace(OPTIONS, **changes)
    found = Dcgan(Adversaries(SIZE, options), down(SIZE, options.latent, normalise=True), SIZE, options)
    for layer in found.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            layer.reset_parameters()
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.data.uniform_(0.5, 1.5)
            layer.bias.data.normal_(0.0, 0.1)
    return found.eval().requires_grad_(False)


def images(count: int = 3) -> Tensor:
    return torch.rand(count, *SIZE, generator=torch.Generator().manual_seed(2))


def silent(what: str, done: int, total: int) -> None:
    pass


@pytest.mark.parametrize(
    ("engine_ms", "bare_ms", "step_ms", "steps"),
    [
        (20.0, 5.0, 2.0, 7),  # 5 + 7 * 2 = 19
        (20.0, 5.0, 0.1, MOST_STEPS),
        (20.0, 5.0, 0.0, MOST_STEPS),  # too quick to be told from nothing
        (20.0, 20.0, 0.0, 0),
        (5.5, 5.0, 2.0, 0),
        (-3.0, 5.0, 2.0, 0),  # preparation alone misses the deadline
        (float("-inf"), 5.0, 2.0, 0),
    ],
)
def test_as_many_steps_as_fit_beside_the_rest(engine_ms: float, bare_ms: float, step_ms: float, steps: int) -> None:
    assert affordable(engine_ms, bare_ms, step_ms) == steps


def test_the_course_of_a_search_is_what_each_number_of_steps_ends_with() -> None:
    found, image = network(inversion_rate=0.1), 2.0 * images() - 1.0
    start, distance = found.encoder(image), found.inversion.distance
    for steps in (0, 3):
        found.inversion.take(steps)
        course = found.inversion.course(image, start)
        picture, _ = found.inversion(image, start)
        assert course.shape == (steps + 1, 3)
        features = (distance.features(picture)[-1] - distance.goal(image)).abs().sum(1)
        ended = (picture - image).abs().sum((1, 2, 3)) + OPTIONS.feature_weight * features
        torch.testing.assert_close(course[-1], ended, rtol=0.02, atol=0.0)  # L1 is rounded off below a gray level
    assert bool((course.diff(dim=0) <= 0.0).all()) and bool((course[-1] < course[0]).all())


def test_a_search_that_gains_nothing_takes_no_step_and_one_that_gains_is_cut_where_it_ends() -> None:
    assert worthwhile(network(inversion_rate=1e-6), images()) == 0
    found = network(inversion_rate=0.3)
    image = found.pictures(torch.randn(3, OPTIONS.latent, generator=torch.Generator().manual_seed(3)))
    steps = worthwhile(found, image)
    assert 0 < steps < MOST_STEPS
    found.inversion.take(MOST_STEPS)
    target = 2.0 * image - 1.0
    losses = found.inversion.course(target, found.encoder(target)).double().mean(1)
    assert losses[steps] - losses[-1] <= 0.01 * losses[0] < losses[steps - 1] - losses[-1]


@pytest.mark.parametrize(("engine_ms", "steps"), [(4.6, 3), (1.0, 0), (100.0, 9)])
def test_the_takt_and_what_steps_are_worth_pick_their_number(monkeypatch, engine_ms: float, steps: int) -> None:
    """Without steps 1 ms, but 3 in the slowest of a hundred; half a millisecond for each step."""
    found, timed = network(), []

    def times_ms(engine: object, batch: object) -> list[float]:
        timed.append(found.inversion.steps)
        return [1.0 + 0.5 * found.inversion.steps] * 90 + [3.0 + 0.5 * found.inversion.steps] * 10

    monkeypatch.setattr(search, "worthwhile", lambda *_: 9)
    monkeypatch.setattr(search, "engine_times_ms", times_ms)
    decided = pick_steps(found, Detector(found), images(), engine_ms, silent)
    assert timed == [0, 4, steps][: 2 + (steps > 0)]
    assert found.inversion.steps == steps == len(found.inversion.first)
    assert f"search steps: {steps}," in decided


def test_steps_that_prove_slower_than_they_promised_are_given_up(monkeypatch) -> None:
    """Half a millisecond for each of four; from the fifth on every step takes a whole one more."""
    found, timed = network(), []

    def times_ms(engine: object, batch: object) -> list[float]:
        steps = found.inversion.steps
        timed.append(steps)
        return [1.0 + 0.5 * steps + max(0, steps - 4)] * 60

    monkeypatch.setattr(search, "worthwhile", lambda *_: 16)
    monkeypatch.setattr(search, "engine_times_ms", times_ms)
    pick_steps(found, Detector(found), images(), 5.0, silent)
    assert timed[:3] == [0, 4, 8]
    assert found.inversion.steps == timed[-1] > 0
    assert 1.0 + 0.5 * timed[-1] + max(0, timed[-1] - 4) <= 5.0


def test_the_scorer_learns_from_the_search_as_it_was_picked(monkeypatch) -> None:
    found, seen = network(), []

    def scorer(searching: Dcgan, material: Material, *_: object) -> nn.Module:
        seen.append(searching.inversion.steps)
        return residual.Residual(material.keep)

    def picked(searching: Dcgan, *_: object) -> str:
        searching.inversion.take(2)
        return "two"

    monkeypatch.setitem(catalogue.RECONSTRUCTORS, "dcgan", lambda *_: found)
    monkeypatch.setitem(catalogue.SCORERS, "residual", scorer)
    monkeypatch.setattr(catalogue, "pick_steps", picked)
    material = Material(images(10), torch.ones(32, 32), np.arange(10) % 5, Path("unused"), engine_ms=20.0)
    learned = catalogue.method("dcgan+residual")(material, OPTIONS, silent)
    assert seen == [4, 2]
    assert learned.decided == ("two",)
    seen.clear()
    assert catalogue.method("dcgan+residual")(replace(material, engine_ms=None), OPTIONS, silent).decided == ()
    assert seen == [2]


def test_what_is_decided_says_what_stopped_it() -> None:
    assert "less than 1%" in told(3, 3, 20.0, 5.0, 1.0)
    assert "as many as the takt allows" in told(3, 9, 8.0, 5.0, 1.0)
    assert "the most that are taken" in told(MOST_STEPS, MOST_STEPS, 99.0, 5.0, 1.0)
