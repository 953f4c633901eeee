"""Every detector of the catalogue keeps the contract: it learns, exports to one graph, and every engine agrees.

Every detector, reconstructor and scorer comes at least once; every pair of them with TAKTSIGHT_EVERY_PAIR=1.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from tiny_detectors import SIDE, covering, material_of, options_for, silent, textured_parts

from agent.engines.engine import ENGINES, EngineSettings
from trainer.catalogue import detector_names, method
from trainer.errors import ParityError, TrainingError
from trainer.export import ReferenceRuntime, checked_parity, export_graph
from trainer.learning import Learned

EVERY_PAIR = "TAKTSIGHT_EVERY_PAIR" in os.environ  # by hand, half an hour: all pairs of reconstructor and scorer
CASES = [(name, channels) for name in (detector_names() if EVERY_PAIR else covering()) for channels in (1, 3)]


@dataclass(frozen=True)
class Case:
    """A detector that has learnt, its graph, and what it learnt from."""

    detector: Learned
    graph: bytes
    parts: np.ndarray

    @property
    def module(self) -> torch.nn.Module:
        return self.detector.module

    @property
    def scales(self) -> tuple[float, float]:
        return float(np.abs(self.detector.good_scores).max()), float(self.detector.good_peaks.max())

    @property
    def damaged(self) -> np.ndarray:
        """A part that it has never seen, with a hole."""
        return with_defect(textured_parts(1, self.parts.shape[1], seed=9))


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name, channels = request.param
    parts, folder = textured_parts(15, channels), tmp_path_factory.mktemp("work")
    learned = method(name)(material_of(parts, folder), options_for(name, folder), silent)
    return Case(learned, export_graph(learned.module, parts[:1]), parts)


def with_defect(parts: np.ndarray) -> np.ndarray:
    damaged = parts.copy()
    damaged[:, :, 24:36, 24:36] = 0.0
    return damaged


def test_a_map_and_one_score_per_image(case: Case) -> None:
    with torch.inference_mode():
        anomaly_map, score = case.module(torch.from_numpy(case.parts[:1]))
    assert anomaly_map.shape[:2] == (1, 1)
    assert score.shape == (1,)


def test_held_out_scores_belong_to_good_images(case: Case) -> None:
    found = case.detector
    assert len(found.held_out) == len(found.good_scores) == len(found.good_peaks) == len(found.good_maps)
    assert set(case.detector.held_out.tolist()) <= set(range(len(case.parts)))
    assert np.isfinite(case.detector.good_scores).all()
    np.testing.assert_allclose(case.detector.good_peaks, case.detector.good_maps.max(axis=(1, 2)), rtol=1e-5)


def test_a_hole_scores_above_every_good_part(case: Case) -> None:
    with torch.inference_mode():
        _, score = case.module(torch.from_numpy(case.damaged))
    assert float(score[0]) > case.detector.good_scores.max()


def test_the_map_peaks_at_the_hole(case: Case) -> None:
    part = case.damaged
    with torch.inference_mode():
        anomaly_map = case.module(torch.from_numpy(part))[0][0, 0].numpy()
    row, column = np.unravel_index(anomaly_map.argmax(), anomaly_map.shape)
    scale = SIDE / anomaly_map.shape[0]
    assert 16 <= (row + 0.5) * scale <= 44
    assert 16 <= (column + 0.5) * scale <= 44


def test_every_engine_reproduces_the_network(case: Case) -> None:
    images = np.concatenate([case.parts[:4], with_defect(case.parts[:2])])
    parity = checked_parity(case.module, case.graph, images, *case.scales)
    assert parity.worst_score <= 1e-4
    for kind, open_engine in ENGINES.items():
        engine = open_engine(case.graph, EngineSettings(kind))
        for image in images:
            expected_map, expected = ReferenceRuntime(case.graph)(image[None])
            anomaly_map, score = engine.infer(image[None])
            assert score == pytest.approx(expected, rel=1e-3, abs=1e-3 * case.scales[0]), engine.label
            np.testing.assert_allclose(anomaly_map, expected_map, rtol=1e-3, atol=2e-3 * case.scales[1])


def test_the_graph_is_static_and_names_no_file_of_the_trainer(case: Case) -> None:
    model = onnx.load_from_string(case.graph)
    shape = [dimension.dim_value for dimension in model.graph.input[0].type.tensor_type.shape.dim]
    assert shape == list(case.parts[:1].shape)
    assert [output.name for output in model.graph.output] == ["anomaly_map", "score"]
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")  # weights may spell anything
    told = model.SerializeToString()
    assert b".py" not in told
    assert b"site-packages" not in told


def test_an_export_that_differs_is_refused(case: Case) -> None:

    class Other(torch.nn.Module):
        def __init__(self, shift: float) -> None:
            super().__init__()
            self.shift = shift

        def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            anomaly_map, score = case.module(image)
            return anomaly_map, score + self.shift * (case.scales[0] + score.abs())

    for shift in (0.01, float("nan")):
        with pytest.raises(ParityError, match="no recipe was written"):
            checked_parity(Other(shift), case.graph, case.parts[:2], *case.scales)


@pytest.mark.parametrize("name", covering())
def test_nothing_under_the_ignore_mask_moves_the_score(name: str, tmp_path: Path) -> None:
    keep = torch.ones(SIDE, SIDE)
    keep[:, :32] = 0.0
    material = material_of(textured_parts(10, 1), tmp_path, keep=keep)
    module = method(name)(material, options_for(name, tmp_path), silent).module
    part = textured_parts(1, 1, seed=9)
    damaged = part.copy()
    damaged[:, :, 20:40, 4:20] = 0.0
    with torch.inference_mode():
        _, expected = module(torch.from_numpy(part))
        anomaly_map, score = module(torch.from_numpy(damaged))
    half = anomaly_map.shape[3] // 2
    assert float(anomaly_map[..., :half].abs().max()) == 0.0
    assert float(score[0]) == pytest.approx(float(expected[0]), rel=1e-6)


def test_an_unknown_detector_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(TrainingError, match="patch_memory"):
        method("patchcore")
    with pytest.raises(TrainingError, match=r"vae\+residual"):
        method("vae+nothing")
