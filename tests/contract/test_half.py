"""A graph in half precision is chosen by what it answers, cut by cut, and never where none is close enough."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from agent.engines.parity import TOLERANCES, examined
from calibration.recipe import read_recipe, write_recipe
from tests.contract.test_fit import OPTIONS, learnt
from trainer.export import ReferenceRuntime, answers_of
from trainer.half import CUTS, SCORE_TOLERANCE, QuickHalf, folded, half_graph, with_fault

SIDE = 16
SCALES = (1.0, 1.0)


class Backbone(nn.Module):
    """Two stages; what goes from the first to the second is `scale` times too large."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stages = nn.ModuleList([nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)])
        with torch.no_grad():
            self.stages[0].weight *= scale
            self.stages[1].weight /= scale

    def forward(self, image: Tensor) -> Tensor:
        return self.stages[1](self.stages[0](image))


class Detector(nn.Module):
    """Features, then a distance times a factor: what overflows in half precision beyond 65504."""

    def __init__(self, factor: float = 1.0, scale: float = 1.0) -> None:
        super().__init__()
        self.features = Backbone(scale)
        self.register_buffer("factor", torch.tensor(factor))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.features(image)
        distance = ((seen * seen).sum(1, keepdim=True) * self.factor + 1e-3 * self.factor).sqrt()
        return distance / self.factor.sqrt(), distance.mean((1, 2, 3)) / self.factor.sqrt()


def images(count: int = 2) -> np.ndarray:
    return np.random.default_rng(1).uniform(0, 1, (count, 1, SIDE, SIDE)).astype(np.float32)


def types(graph: bytes) -> set[int]:
    return {tensor.data_type for tensor in onnx.load_from_string(graph).graph.initializer}


def test_a_harmless_network_is_cut_whole():
    half = half_graph(Detector().eval(), images(), *SCALES)
    assert half.chosen == "everything"
    assert half.tried["everything"].worst_score < 5e-3
    assert onnx.TensorProto.FLOAT16 in types(half.graph)


def test_its_inputs_and_outputs_stay_float32_and_its_answers_close():
    module = Detector().eval()
    half = half_graph(module, images(), *SCALES)
    model = onnx.load_from_string(half.graph)
    kinds = [value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)]
    assert kinds == [onnx.TensorProto.FLOAT] * 3
    ((expected_map, expected),) = answers_of(module, images(1))
    anomaly_map, score = ReferenceRuntime(half.graph)(images(1))
    assert score == pytest.approx(expected, rel=5e-3)
    assert score != expected
    np.testing.assert_allclose(anomaly_map, expected_map, atol=2e-2)


def test_distances_that_overflow_stay_in_single_precision():
    half = half_graph(Detector(factor=1e6).eval(), images(), *SCALES)
    assert half.chosen == "networks"
    assert not half.tried["everything"].worst_score <= 5e-3
    json.dumps(half.facts(), allow_nan=False)


def test_a_first_stage_that_cannot_be_rounded_stays_in_single_precision():
    module = Detector(scale=1e7)
    first, second = module.features.stages
    with torch.no_grad():
        second.weight *= 1e7
    module.features.stages[0] = nn.Sequential(first, Scale(1e-7))
    half = half_graph(module.eval(), images(), *SCALES)
    assert half.chosen == "networks without their first stage"
    assert list(half.tried) == list(CUTS)[:3]


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def test_where_no_cut_is_close_enough_there_is_no_graph():
    half = half_graph(Detector(scale=1e7).eval(), images(), *SCALES)
    assert half.graph is None
    assert half.chosen == ""
    assert set(half.facts()["tried"]) >= {"everything", "networks"}


def test_a_detector_without_a_network_has_no_further_cuts():
    class Plain(nn.Module):
        def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
            squares = (image * 1e4) ** 2
            return squares, squares.mean((1, 2, 3))

    half = half_graph(Plain().eval(), images(), *SCALES)
    assert (half.chosen, list(half.tried)) == ("", ["everything"])


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_folding_takes_the_normalisation_away_and_changes_nothing(kind):
    torch.manual_seed(0)
    network = nn.Sequential(kind(2, 3, 3), nn.BatchNorm2d(3), nn.Sequential(kind(3, 2, 1), nn.BatchNorm2d(2)))
    for norm in (network[1], network[2][1]):
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 2)
    x = torch.randn(1, 2, 8, 8)
    expected = network.eval()(x)
    found = folded(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in found.modules())
    torch.testing.assert_close(found(x), expected)


def test_the_quick_way_rounds_as_half_precision_does_and_does_not_mix():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3)).eval().half()
    x = torch.randn(1, 2, 8, 8).half()
    with torch.inference_mode():
        expected = network(x)
        with QuickHalf():
            found = network(x)
            squares = (x * 300) ** 2
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
    assert bool(squares.isinf().any())
    with QuickHalf(), pytest.raises(RuntimeError, match="two precisions"):
        torch.mm(torch.zeros(2, 2), torch.zeros(2, 2).half())


def test_a_fault_is_the_middle_alone_and_the_images_stay():
    batch = images()
    faulty = with_fault(batch)
    np.testing.assert_array_equal(faulty[:, :, 6:10, 6:10], 1 - batch[:, :, 6:10, 6:10])
    faulty[:, :, 6:10, 6:10] = batch[:, :, 6:10, 6:10]
    np.testing.assert_array_equal(faulty, batch)
    np.testing.assert_array_equal(batch, images())


def test_a_recipe_carries_both_graphs_and_a_sealed_set_that_reaches_far_above_the_threshold(tmp_path: Path) -> None:
    options = replace(OPTIONS, layout_weight=1.0)  # noise alone has no layout; without one FP16 misses by a hair
    write_recipe(tmp_path / "x.recipe", learnt(tmp_path, 12, options=options).recipe)
    recipe = read_recipe(tmp_path / "x.recipe")
    told = recipe.training["half_precision"]
    assert recipe.graph_f16 is not None, told
    assert told["tried"][told["chosen"]]["worst_score"] <= SCORE_TOLERANCE
    assert len(recipe.selftest.scores) == len(recipe.selftest.maps) == 4
    assert recipe.selftest.scores[3] > recipe.thresholds.score
    for precision, graph in (("f32", recipe.graph), ("f16", recipe.graph_f16)):
        parity = examined(ReferenceRuntime(graph), precision, recipe, TOLERANCES[precision])
        assert parity.passed, parity
