"""OpenVINO on the CPU: the embedded default on x86-64."""

from __future__ import annotations

import io
import sys

import numpy as np
from numpy.typing import NDArray

from agent.engines.engine import INPUT, MAP, SCORE, EngineSettings
from agent.errors import EngineError

# Its import would tell Intel, by way of Google, that we run here; without this package OpenVINO keeps still
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
import openvino  # noqa: E402


class OpenVinoEngine:
    """A graph compiled for this CPU. The precision is always explicit: left alone, OpenVINO picks bf16 by itself."""

    def __init__(self, graph: bytes, settings: EngineSettings) -> None:
        """Raises EngineError if the precision is not to be had or the graph cannot be compiled."""
        if settings.precision not in ("f32", "bf16"):
            raise EngineError(f"openvino runs f32 and bf16 on a CPU, {settings.precision} found: use tensorrt for it")
        core = openvino.Core()
        properties = {
            "INFERENCE_PRECISION_HINT": settings.precision,
            "INFERENCE_NUM_THREADS": settings.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
        }
        try:
            model = core.read_model(io.BytesIO(graph))
            self._request = core.compile_model(model, "CPU", properties).create_infer_request()
        except RuntimeError as error:
            raise EngineError(f"openvino cannot compile the graph: {error}") from error
        self.label = f"openvino {settings.precision}, {settings.threads} threads"

    def infer(self, batch: NDArray[np.float32]) -> tuple[NDArray[np.float32], float]:
        """Return (anomaly_map (h', w'), score) of one prepared part (1, C, h, w)."""
        self._request.infer({INPUT: batch}, share_inputs=True)
        anomaly_map = np.array(self._request.get_tensor(MAP).data[0, 0], dtype=np.float32)  # copied out
        return anomaly_map, float(self._request.get_tensor(SCORE).data[0])
