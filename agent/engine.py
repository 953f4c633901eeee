"""Port: what runs the recipe's graph on this device. Real engines stand in files beside this one."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from agent.errors import EngineError
from calibration.errors import MissingPackage
from calibration.recipe import Recipe

INPUT, MAP, SCORE = "image", "anomaly_map", "score"

# Largest difference from the trainer's float32 answers, relative to the threshold, with which a precision may go live.
# f32: rounding order only, 1e-6 measured, so 1e-3 catches a wrong graph or driver. bf16 keeps 8 bits: its scores move
# by per cent, which is why thresholds must be fitted on it; 0.25 only catches an engine that is broken.
TOLERANCES = {"f32": 1e-3, "bf16": 0.25}


class Engine(Protocol):
    """One loaded graph."""

    label: str  # "openvino f32, 2 threads"

    def infer(self, batch: NDArray[np.float32]) -> tuple[NDArray[np.float32], float]:
        """Return (anomaly_map (h', w'), score) of one prepared part (1, C, h, w); arrays are the caller's own."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Which engine, and everything that changes its answers or its speed."""

    kind: str = "auto"  # auto: openvino on x86-64 where installed, else onnxruntime
    precision: str = "f32"
    threads: int = 2


def open_engine(recipe: Recipe, settings: EngineSettings) -> Engine:
    """Return an engine that has reproduced the recipe's self-test on this device.

    Raises MissingPackage naming the extra to install, EngineError if the graph cannot be loaded or answers otherwise.
    """
    kind = _automatic() if settings.kind == "auto" else settings.kind
    engine = ENGINES[kind](recipe.graph, settings)
    prove(engine, recipe, TOLERANCES[settings.precision])
    return engine


def prove(engine: Engine, recipe: Recipe, tolerance: float) -> float:
    """Return the largest relative difference between the engine's answers and the trainer's on the self-test.

    Raises EngineError if it is above tolerance: such an engine must not judge parts.
    """
    differences, told = [0.0], [""]
    for number, (batch, score, peak) in enumerate(
        zip(recipe.selftest.batches, recipe.selftest.scores, recipe.selftest.map_peaks, strict=True), start=1
    ):
        anomaly_map, found = engine.infer(batch[None])
        found_peak = float(anomaly_map.max())
        differences.append(abs(found - score) / max(abs(score), recipe.thresholds.score))
        differences.append(abs(found_peak - peak) / max(abs(peak), recipe.thresholds.map))
        told += [
            f"score {found:.6g} for {score:.6g} on part {number}",
            f"map {found_peak:.6g} for {peak:.6g} on {number}",
        ]
    place = int(np.argmax(differences))  # of a NaN, if there is one
    worst = differences[place]
    if not worst <= tolerance:  # `not <=`: a NaN must fail too
        raise EngineError(
            f"{engine.label} differs from the trainer's answers by {worst:.1e} of the threshold (self-test: "
            f"{told[place]}), at most {tolerance:g} is allowed: choose another engine or precision in station.yaml"
        )
    return worst


def _onnxruntime(graph: bytes, settings: EngineSettings) -> Engine:
    _require("onnxruntime", "onnxruntime")
    from agent.engine_onnx import OnnxRuntimeEngine

    return OnnxRuntimeEngine(graph, settings)


def _openvino(graph: bytes, settings: EngineSettings) -> Engine:
    _require("openvino", "openvino")
    from agent.engine_openvino import OpenVinoEngine

    return OpenVinoEngine(graph, settings)


ENGINES: dict[str, Callable[[bytes, EngineSettings], Engine]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}


def _automatic() -> str:
    """OpenVINO was the quicker one on x86-64 (benchmarks/latency.py); elsewhere ONNX Runtime is the safe choice."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return "openvino" if x86 and importlib.util.find_spec("openvino") is not None else "onnxruntime"


def _require(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise MissingPackage(f"{package} is not installed: pip install 'taktsight[{extra}]'")
