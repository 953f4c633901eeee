from __future__ import annotations

import dataclasses
import importlib.util

import numpy as np
import pytest
from recipes import tiny_answer, tiny_recipe

from agent.engines.engine import ENGINES, EngineSettings, open_engine, prove
from agent.errors import EngineError
from calibration.errors import MissingPackage


@pytest.mark.parametrize("kind", list(ENGINES))
def test_an_engine_gives_the_closed_form_answer(kind: str) -> None:
    recipe = tiny_recipe()
    engine = open_engine(recipe, EngineSettings(kind))
    batch = np.random.default_rng(3).uniform(0, 1, (1, 1, 32, 32)).astype(np.float32)
    anomaly_map, score = engine.infer(batch)
    expected_map, expected = tiny_answer(batch)
    np.testing.assert_allclose(anomaly_map, expected_map, rtol=1e-5, atol=1e-6)
    assert score == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", list(ENGINES))
def test_an_answer_is_not_overwritten_by_the_next(kind: str) -> None:
    engine = open_engine(tiny_recipe(), EngineSettings(kind))
    first, _ = engine.infer(np.zeros((1, 1, 32, 32), np.float32))
    kept = first.copy()
    engine.infer(np.ones((1, 1, 32, 32), np.float32) * 0.5)
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("kind", list(ENGINES))
def test_the_label_names_engine_precision_and_threads(kind: str) -> None:
    assert open_engine(tiny_recipe(), EngineSettings(kind, threads=1)).label == f"{kind} f32, 1 threads"


@pytest.mark.parametrize("wrong", [0.2, float("nan")])
def test_an_engine_that_does_not_reproduce_the_self_test_stays_off(wrong: float) -> None:
    recipe = tiny_recipe()
    answers = tuple(score + wrong for score in recipe.selftest.scores)
    broken = dataclasses.replace(recipe, selftest=dataclasses.replace(recipe.selftest, scores=answers))
    with pytest.raises(EngineError, match=r"differs from the trainer's answers .*self-test: (score|map) .* on "):
        open_engine(broken, EngineSettings("onnxruntime"))


def test_the_self_test_sees_a_wrong_map_behind_a_right_score() -> None:
    recipe = tiny_recipe()
    peaks = tuple(peak * 1.5 for peak in recipe.selftest.map_peaks)
    broken = dataclasses.replace(recipe, selftest=dataclasses.replace(recipe.selftest, map_peaks=peaks))
    with pytest.raises(EngineError):
        open_engine(broken, EngineSettings("onnxruntime"))


def test_the_self_test_returns_how_far_the_engine_is_off() -> None:
    recipe = tiny_recipe()
    assert prove(open_engine(recipe, EngineSettings("onnxruntime")), recipe, 1e-3) < 1e-5


def test_a_missing_engine_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for kind in ENGINES:
        with pytest.raises(MissingPackage, match=rf"pip install 'taktsight\[{kind}\]'"):
            open_engine(tiny_recipe(), EngineSettings(kind))


def test_onnxruntime_refuses_a_precision_that_it_does_not_run() -> None:
    with pytest.raises(EngineError, match="bf16"):
        open_engine(tiny_recipe(), EngineSettings("onnxruntime", precision="bf16"))


@pytest.mark.parametrize("kind", list(ENGINES))
def test_a_graph_that_is_none_is_refused(kind: str) -> None:
    with pytest.raises(EngineError, match="cannot"):
        open_engine(tiny_recipe(graph=b"not an onnx file"), EngineSettings(kind))
