"""How long a part takes on this machine from its frame in memory to its score, on the engine of a line without a GPU.

Timed is what a station does until it knows the score: photometric correction, light and focus, registration,
preparation, engine. Left out are the camera's transfer before that and, after it, the places above the threshold (a
station that has no time for them leaves them out), the output and the message.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.condition import glimpse, measured
from calibration.errors import BadFrame, NotRegistered
from calibration.frame import Pixels
from calibration.photometric import Photometric
from calibration.preprocess import View, check_frame, prepare
from calibration.registration import Reference
from trainer.data import Item, Pictures
from trainer.export import ReferenceRuntime
from trainer.prepared import pixels_of

DEADLINE = 0.9  # of the takt: what station.yaml takes where it names no deadline
WARM_UP, FRAMES = 5, 60
THREADS = 2

Engine = Callable[[NDArray[np.float32]], object]
Timed = Callable[[Engine], list[float]]
"""`frame_times_ms` of one product's frames."""


def engine_of(graph: bytes) -> tuple[Engine, str]:
    """Return what runs the graph beside a line without a GPU, and its name: OpenVINO if installed, or ONNX Runtime."""
    try:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # nobody outside is told
        import openvino  # noqa: PLC0415 an extra
    except ImportError:
        return ReferenceRuntime(graph), ReferenceRuntime.name
    core = openvino.Core()
    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": THREADS,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
    }
    request = core.compile_model(core.read_model(io.BytesIO(graph)), "CPU", settings).create_infer_request()
    return lambda batch: request.infer({"image": batch}, share_inputs=True), f"openvino f32, {THREADS} threads"


def engine_times_ms(engine: Engine, batch: NDArray[np.float32]) -> list[float]:
    """Return how long the engine takes for one prepared image (1, C, h, w), again and again."""
    times_ms = []
    for _ in range(WARM_UP + FRAMES):
        started_ns = time.perf_counter_ns()
        engine(batch)
        times_ms.append((time.perf_counter_ns() - started_ns) / 1e6)
    return times_ms[WARM_UP:]


def frame_times_ms(
    items: Sequence[Item], photometric: Photometric, view: View, reference: Reference | None, engine: Engine
) -> list[float]:
    """Return how long a frame in memory takes to its score, each image in turn; inf if none can be prepared."""
    sensor, times_ms = Pictures(Photometric()), []
    frames = [pixels_of(item, sensor, view) for item in items[: WARM_UP + FRAMES]]
    for number in range(WARM_UP + FRAMES if frames else 0):
        pixels, depth = frames[number % len(frames)]
        started_ns = time.perf_counter_ns()
        try:
            engine(_as_the_station(pixels, depth, photometric, view, reference))
        except (NotRegistered, BadFrame):
            continue
        if number >= WARM_UP:
            times_ms.append((time.perf_counter_ns() - started_ns) / 1e6)
    return times_ms or [float("inf")]


def slowest_ms(times_ms: Sequence[float]) -> float:
    """Return what all but the slowest in a hundred keep: the time that counts against a deadline."""
    return float(np.percentile(times_ms, 99, method="higher"))


def engine_ms_within(takt_ms: float, timed: Timed) -> float:
    """Return what the stages before the engine leave it of the deadline; below 0 if they alone miss it."""
    return DEADLINE * takt_ms - slowest_ms(timed(_idle))


def frame_to_score(takt_ms: float, graph: bytes, timed: Timed) -> tuple[str, bool]:
    """Return how long a part takes on this machine, for people, and whether the deadline of a takt is kept."""
    engine, name = engine_of(graph)
    times_ms = timed(engine)
    slowest = slowest_ms(times_ms)
    took = f"{np.median(times_ms):.3g} ms, 99 of 100 within {slowest:.3g} ms here ({name})"
    deadline = f"{DEADLINE * takt_ms:.3g} ms, the deadline of a takt of {takt_ms:g} ms"
    if slowest <= DEADLINE * takt_ms:
        return f"{took}, within {deadline}", True
    return f"{took}, more than {deadline}: give a smaller --size, or let race find a quicker detector", False


def _as_the_station(
    pixels: Pixels, depth: int, photometric: Photometric, view: View, reference: Reference | None
) -> NDArray[np.float32]:
    """Return the detector's input (1, C, h, w) of a frame as the sensor delivered it, and look at light and focus."""
    corrected = photometric.correct(pixels, depth)
    check_frame(corrected, depth, view)
    raw = None if photometric.is_identity else pixels
    measured(glimpse(corrected, depth, view, registered=reference is not None, sensor_pixels=raw))
    return prepare(corrected, depth, view, reference).batch


def _idle(batch: NDArray[np.float32]) -> None:
    """Do nothing: what is left are the stages before the engine."""
