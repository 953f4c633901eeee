"""Port: what runs the recipe's graph on this device. Real engines stand in files beside this one."""

from __future__ import annotations

import importlib.util
import logging
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from agent.engines.parity import TOLERANCES, examined, require
from agent.errors import EngineError
from calibration.errors import MissingPackage
from calibration.recipe import Recipe

__all__ = [
    "CROP", "ENGINES", "INPUT", "KINDS", "MAP", "RUNTIMES", "SCORE", "TENSORRT", "TOLERANCES", "CropEngine", "Engine",
    "EngineSettings", "load_engine", "of_crops", "open_engine", "prove",
]  # fmt: skip

log = logging.getLogger(__name__)

INPUT, MAP, SCORE = "image", "anomaly_map", "score"
CROP = "crop"  # what becomes the input on the device
TENSORRT = "tensorrt"
RUNTIMES = ("tensorrt", "tensorrt_rtx")  # Python modules


class Engine(Protocol):
    """One loaded graph."""

    label: str  # "openvino f32, 2 threads"

    def infer(self, batch: NDArray[np.float32]) -> tuple[NDArray[np.float32], float]:
        """Return (anomaly_map (h', w'), score) of one prepared part (1, C, h, w); arrays are the caller's own."""


@runtime_checkable
class CropEngine(Engine, Protocol):
    """An engine that may take 8-bit pixels as they are."""

    crop_shape: tuple[int, int, int, int] | None  # (1, h, w, C); None: not this one

    def infer_crop(self, crop: NDArray[np.uint8]) -> tuple[NDArray[np.float32], float]:
        """Return (anomaly_map (h', w'), score) of one part cut out of an 8-bit frame, (h, w) or (h, w, 3)."""


def of_crops(engine: Engine) -> Callable[[NDArray[np.uint8]], tuple[NDArray[np.float32], float]] | None:
    """Return what infers 8-bit pixels as they are, None where the engine takes batches alone."""
    return engine.infer_crop if isinstance(engine, CropEngine) and engine.crop_shape is not None else None


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Which engine, and everything that changes its answers or its speed."""

    kind: str = "auto"  # auto: openvino on x86-64 where installed, else onnxruntime; never a GPU
    precision: str = "f32"
    threads: int = 2  # of the CPU engines
    runtime: str = RUNTIMES[0]  # tensorrt: Python module
    workspace_mb: int = 1024  # tensorrt: device memory that building may use
    cache: Path = Path("engines")  # tensorrt: folder of compiled plans
    fallback: bool = False  # tensorrt: a CPU engine may stand in


def open_engine(recipe: Recipe, settings: EngineSettings) -> Engine:
    """Return an engine that has passed the parity gate on this device, on the recipe's sealed set.

    With `fallback`, a CPU engine in f32 stands in for one on the GPU that cannot be had, and its label says so.

    Raises MissingPackage naming the extra to install, EngineError if the graph cannot be loaded or answers otherwise.
    """
    try:
        return _proven(recipe, settings)
    except (EngineError, MissingPackage) as error:
        if settings.kind != TENSORRT or not settings.fallback:
            raise
        log.error("no %s, a CPU engine stands in (engine.fallback): %s", TENSORRT, error)
        engine = _proven(recipe, replace(settings, kind="auto", precision="f32"))
        engine.label += f", in place of {TENSORRT} {settings.precision}"
        return engine


def prove(engine: Engine, recipe: Recipe, tolerance: float) -> float:
    """Return the largest relative difference between the engine's answers and the trainer's on the sealed set.

    Raises EngineError if it is above tolerance, or a verdict is another one: such an engine must not judge parts.
    """
    parity = examined(engine.infer, engine.label, recipe, tolerance)
    require(parity)
    return parity.worst


def load_engine(recipe: Recipe, settings: EngineSettings) -> Engine:
    """Return an engine that nobody has proven yet: for reports on it. Raises as `open_engine`."""
    kind = _automatic() if settings.kind == "auto" else settings.kind
    return _tensorrt(recipe, settings) if kind == TENSORRT else ENGINES[kind](recipe.graph, settings)


def _proven(recipe: Recipe, settings: EngineSettings) -> Engine:
    engine = load_engine(recipe, settings)
    prove(engine, recipe, TOLERANCES[settings.precision])
    return engine


def _tensorrt(recipe: Recipe, settings: EngineSettings) -> Engine:
    from agent.engines.tensorrt import tensorrt_engine

    return tensorrt_engine(recipe, settings)


def _onnxruntime(graph: bytes, settings: EngineSettings) -> Engine:
    _require("onnxruntime", "onnxruntime")
    from agent.engines.onnx import OnnxRuntimeEngine

    return OnnxRuntimeEngine(graph, settings)


def _openvino(graph: bytes, settings: EngineSettings) -> Engine:
    _require("openvino", "openvino")
    from agent.engines.openvino import OpenVinoEngine

    return OpenVinoEngine(graph, settings)


ENGINES: dict[str, Callable[[bytes, EngineSettings], Engine]] = {  # on the CPU, from the float32 graph
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
KINDS = (*ENGINES, TENSORRT)


def _automatic() -> str:
    """OpenVINO was the quicker one on x86-64 (benchmarks/latency.py); elsewhere ONNX Runtime is the safe choice."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return "openvino" if x86 and importlib.util.find_spec("openvino") is not None else "onnxruntime"


def _require(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise MissingPackage(f"{package} is not installed: pip install 'taktsight[{extra}]'")
