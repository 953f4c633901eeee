"""ONNX Runtime on the CPU."""

from __future__ import annotations

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from agent.engines.engine import INPUT, MAP, SCORE, EngineSettings
from agent.errors import EngineError


class OnnxRuntimeEngine:
    """A graph in ONNX Runtime; float32 only."""

    def __init__(self, graph: bytes, settings: EngineSettings) -> None:
        """Raises EngineError if the precision is not to be had or the graph cannot be loaded."""
        if settings.precision != "f32":
            raise EngineError(f"onnxruntime runs f32, {settings.precision} found: use openvino for it, or f32")
        onnxruntime.disable_telemetry_events()  # nobody outside is told what a plant runs
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = settings.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise EngineError(f"onnxruntime cannot load the graph: {error}") from error
        self.label = f"onnxruntime f32, {settings.threads} threads"

    def infer(self, batch: NDArray[np.float32]) -> tuple[NDArray[np.float32], float]:
        """Return (anomaly_map (h', w'), score) of one prepared part (1, C, h, w)."""
        anomaly_map, score = self._session.run([MAP, SCORE], {INPUT: batch})
        return np.asarray(anomaly_map, dtype=np.float32)[0, 0], float(np.asarray(score)[0])
