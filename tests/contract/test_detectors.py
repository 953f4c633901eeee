"""Every detector of the catalogue keeps the contract: it learns, exports to one graph, and every engine agrees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from agent.engine import ENGINES, EngineSettings
from trainer.catalogue import detector_names, method
from trainer.errors import ParityError, TrainingError
from trainer.export import ReferenceRuntime, checked_parity, export_graph
from trainer.learning import Learned, Material, Options

SIDE = 64
OPTIONS = Options(memory_entries=40, epochs=2, latent=8)


def silent(what: str, done: int, total: int) -> None:
    pass


def textured_parts(count: int, channels: int, seed: int = 0) -> np.ndarray:
    """Return (count, channels, 64, 64): a bright disc on a dark field, with noise."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE]
    disc = ((x - 32) ** 2 + (y - 32) ** 2 < 24**2) * 0.5 + 0.2
    noise = generator.normal(0.0, 0.02, (count, channels, SIDE, SIDE))
    return np.clip(disc + noise, 0.0, 1.0).astype(np.float32)


@pytest.fixture(scope="module", params=[(name, channels) for name in detector_names() for channels in (1, 3)], ids=str)
def learned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Learned, np.ndarray]:
    name, channels = request.param
    parts = textured_parts(15, channels)
    material = Material(
        batch=torch.from_numpy(parts),
        keep=torch.ones(SIDE, SIDE),
        fold=np.arange(15) % 5,
        checkpoint=tmp_path_factory.mktemp("work") / "checkpoint",
    )
    return method(name)(material, OPTIONS, silent), parts


def with_defect(parts: np.ndarray) -> np.ndarray:
    damaged = parts.copy()
    damaged[:, :, 24:36, 24:36] = 0.0
    return damaged


def test_a_map_and_one_score_per_image(learned: tuple[Learned, np.ndarray]) -> None:
    detector, parts = learned
    with torch.inference_mode():
        anomaly_map, score = detector.module(torch.from_numpy(parts[:1]))
    assert anomaly_map.shape[:2] == (1, 1)
    assert score.shape == (1,)


def test_held_out_scores_belong_to_good_images(learned: tuple[Learned, np.ndarray]) -> None:
    detector, parts = learned
    assert len(detector.held_out) == len(detector.good_scores) == len(detector.good_peaks) == len(detector.good_maps)
    assert set(detector.held_out.tolist()) <= set(range(len(parts)))
    assert np.isfinite(detector.good_scores).all()
    np.testing.assert_allclose(detector.good_peaks, detector.good_maps.max(axis=(1, 2)), rtol=1e-5)


def test_a_hole_scores_above_every_good_part(learned: tuple[Learned, np.ndarray]) -> None:
    detector, _ = learned
    with torch.inference_mode():
        _, score = detector.module(torch.from_numpy(with_defect(textured_parts(1, detector_channels(learned), seed=9))))
    assert float(score[0]) > detector.good_scores.max()


def test_the_map_peaks_at_the_hole(learned: tuple[Learned, np.ndarray]) -> None:
    detector, _ = learned
    part = with_defect(textured_parts(1, detector_channels(learned), seed=9))
    with torch.inference_mode():
        anomaly_map = detector.module(torch.from_numpy(part))[0][0, 0].numpy()
    row, column = np.unravel_index(anomaly_map.argmax(), anomaly_map.shape)
    scale = SIDE / anomaly_map.shape[0]
    assert 16 <= (row + 0.5) * scale <= 44
    assert 16 <= (column + 0.5) * scale <= 44


def test_every_engine_reproduces_the_network(learned: tuple[Learned, np.ndarray]) -> None:
    detector, parts = learned
    graph = export_graph(detector.module, parts[:1])
    images = np.concatenate([parts[:4], with_defect(parts[:2])])
    parity = checked_parity(detector.module, graph, images, *scales(detector))
    assert parity.worst_score <= 1e-4
    for kind, open_engine in ENGINES.items():
        engine = open_engine(graph, EngineSettings(kind))
        for image in images:
            expected_map, expected = ReferenceRuntime(graph)(image[None])
            anomaly_map, score = engine.infer(image[None])
            assert score == pytest.approx(expected, rel=1e-3, abs=1e-3 * scales(detector)[0]), engine.label
            np.testing.assert_allclose(anomaly_map, expected_map, rtol=1e-3, atol=2e-3 * scales(detector)[1])


def test_the_graph_is_static_and_names_no_file_of_the_trainer(learned: tuple[Learned, np.ndarray]) -> None:
    detector, parts = learned
    graph = export_graph(detector.module, parts[:1])
    model = onnx.load_from_string(graph)
    shape = [dimension.dim_value for dimension in model.graph.input[0].type.tensor_type.shape.dim]
    assert shape == list(parts[:1].shape)
    assert [output.name for output in model.graph.output] == ["anomaly_map", "score"]
    assert b".py" not in graph
    assert b"site-packages" not in graph


def test_an_export_that_differs_is_refused(learned: tuple[Learned, np.ndarray]) -> None:
    detector, parts = learned
    graph = export_graph(detector.module, parts[:1])

    class Other(torch.nn.Module):
        def __init__(self, shift: float) -> None:
            super().__init__()
            self.shift = shift

        def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            anomaly_map, score = detector.module(image)
            return anomaly_map, score + self.shift * (scales(detector)[0] + score.abs())

    for shift in (0.01, float("nan")):
        with pytest.raises(ParityError, match="no recipe was written"):
            checked_parity(Other(shift), graph, parts[:2], *scales(detector))


def test_nothing_under_the_ignore_mask_moves_the_score(tmp_path: Path) -> None:
    keep = torch.ones(SIDE, SIDE)
    keep[:, :32] = 0.0
    for name in detector_names():
        material = Material(torch.from_numpy(textured_parts(10, 1)), keep, np.arange(10) % 5, tmp_path / "checkpoint")
        detector = method(name)(material, OPTIONS, silent)
        part = textured_parts(1, 1, seed=9)
        damaged = part.copy()
        damaged[:, :, 20:40, 4:20] = 0.0
        with torch.inference_mode():
            _, expected = detector.module(torch.from_numpy(part))
            anomaly_map, score = detector.module(torch.from_numpy(damaged))
        half = anomaly_map.shape[3] // 2
        assert float(anomaly_map[..., :half].abs().max()) == 0.0, name
        assert float(score[0]) == pytest.approx(float(expected[0]), rel=1e-6), name


def test_an_unknown_detector_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(TrainingError, match="patch_memory"):
        method("patchcore")
    with pytest.raises(TrainingError, match=r"vae\+residual"):
        method("vae+nothing")


def detector_channels(learned: tuple[Learned, np.ndarray]) -> int:
    return learned[1].shape[1]


def scales(detector: Learned) -> tuple[float, float]:
    return float(np.abs(detector.good_scores).max()), float(detector.good_peaks.max())
