"""What accuracy.py sets beside our detectors: the published methods, against their formulas computed otherwise."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist, mahalanobis
from scipy.special import softmax
from sklearn.decomposition import PCA
from torch import Tensor, nn

from trainer.learning import Material, Options

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def references(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("references")


WIDTHS = {1: (24, 4), 2: (40, 8), 4: (112, 16)}  # channels and stride of a stage


class Levels(nn.Module):
    """A backbone without weights: the picture's blocks at the strides of some stages, in as many channels."""

    def __init__(self, stages: tuple[int, ...]) -> None:
        super().__init__()
        self.stages = stages

    def forward(self, image: Tensor) -> list[Tensor]:
        found = []
        for stage in self.stages:
            channels, stride = WIDTHS[stage]
            phases = torch.arange(1, channels + 1, dtype=torch.float32).reshape(-1, 1, 1)
            found.append(torch.sin(phases * nn.functional.avg_pool2d(image, stride)))
        return found


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, 64, 64, generator=torch.Generator().manual_seed(seed))


def learnt(kind: type[nn.Module], good: Tensor) -> nn.Module:
    network = kind(Levels(kind.stages), 0).eval()
    network.learn(network.features(good)[0])
    return network


def rows(embedded: Tensor) -> np.ndarray:
    return embedded.permute(0, 2, 3, 1).reshape(-1, embedded.shape[1]).double().numpy()


def test_patchcore_keeps_a_tenth_and_weighs_the_farthest_patch_by_its_neighbours(references: ModuleType) -> None:
    good, test = images(12), images(3, seed=1)
    network = learnt(references.PatchCore, good)
    memory = network.memory.double().numpy()
    assert len(memory) == round(0.1 * 12 * 64)
    maps, scores = network(test)
    assert maps.shape == (3, 1, 64, 64)
    for image, score in zip(network.features(test)[0], scores, strict=True):
        found = rows(image[None])
        apart = cdist(found, memory)
        worst = apart.min(1).argmax()
        nearest = memory[apart[worst].argmin()]
        neighbours = memory[np.argsort(cdist(nearest[None], memory)[0])[:9]]
        weight = 1.0 - softmax(cdist(found[worst][None], neighbours)[0])[0]
        assert float(score) == pytest.approx(weight * apart.min(1).max(), rel=1e-4)


def test_patchcore_chooses_among_all_patches(references: ModuleType) -> None:
    """More than our own detector looks at: the rare one is the last of 40,000, and is kept."""
    network = references.PatchCore(nn.Identity(), 0)
    found = torch.zeros(1, 2, 200, 200)
    found[0, :, -1, -1] = 50.0
    network.learn(found)
    assert len(network.memory) == 4000
    assert int((network.memory[:, 0] == 50.0).sum()) == 1


def test_padim_is_the_mahalanobis_distance_at_each_place(references: ModuleType) -> None:
    good, test = images(30), images(2, seed=1)
    network = learnt(references.PaDiM, good)
    seen, asked = (network.features(batch)[0].double().numpy() for batch in (good, test))
    assert seen.shape == (30, 100, 16, 16)
    expected = np.empty((2, 16, 16))
    for row in range(16):
        for column in range(16):
            place = seen[:, :, row, column]
            inverse = np.linalg.inv(np.cov(place, rowvar=False) + 0.01 * np.eye(100))
            for number in range(2):
                expected[number, row, column] = mahalanobis(asked[number, :, row, column], place.mean(0), inverse)
    maps, scores = network(test)
    for number in range(2):
        grown = cv2.resize(expected[number], (64, 64), interpolation=cv2.INTER_LINEAR)
        shown = cv2.GaussianBlur(grown, (33, 33), 4.0, borderType=cv2.BORDER_REFLECT_101)
        np.testing.assert_allclose(maps[number, 0].numpy(), shown, rtol=2e-3)
        assert float(scores[number]) == pytest.approx(shown.max(), rel=2e-3)


def test_dfm_is_what_97_percent_of_the_variance_cannot_rebuild(references: ModuleType) -> None:
    good, test = images(30), images(4, seed=1)
    network = learnt(references.Dfm, good)
    seen, asked = (network.features(batch)[0].flatten(1).double().numpy() for batch in (good, test))
    pca = PCA(n_components=0.97, svd_solver="full").fit(seen)
    rest = asked - pca.inverse_transform(pca.transform(asked))
    np.testing.assert_allclose(network(test)[1].numpy(), (rest**2).sum(1), rtol=1e-3)


@pytest.mark.parametrize("name", ["patchcore", "padim", "dfm"])
def test_thresholds_rest_on_a_fold_that_was_not_learnt_from(references: ModuleType, monkeypatch, name: str) -> None:
    learned_from = []
    kind = {"patchcore": references.PatchCore, "padim": references.PaDiM, "dfm": references.Dfm}[name]
    learn = kind.learn

    def noted(network: nn.Module, embedded: Tensor) -> None:
        learned_from.append(len(embedded))
        learn(network, embedded)

    monkeypatch.setattr(kind, "learn", noted)
    monkeypatch.setattr(references, "lite0", lambda stages, *_: Levels(stages))
    good = images(15)
    material = Material(good, torch.ones(64, 64), np.arange(15) % 5, Path("unused"))
    learned = references.REFERENCES[name](material, Options(), lambda *_: None)
    assert learned_from == [12, 15]
    assert learned.held_out.tolist() == [0, 5, 10]
    others = learnt(kind, good[material.fold != 0])
    np.testing.assert_allclose(learned.good_scores, others(good[::5])[1].numpy(), rtol=1e-5)
    assert not np.allclose(learned.good_scores, learned.module(good[::5])[1].numpy(), rtol=1e-3)
