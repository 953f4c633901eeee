"""TensorRT on an NVIDIA GPU: all is laid out before the first part; a part is one copy in, one launch, one copy out."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.engines.build import Plan, discard, graph_of, load_runtime, plan_for
from agent.engines.cuda import Gpu, open_gpu
from agent.engines.engine import INPUT, MAP, SCORE, EngineSettings
from agent.errors import EngineError
from calibration.recipe import Recipe

log = logging.getLogger(__name__)


def tensorrt_engine(recipe: Recipe, settings: EngineSettings) -> TensorRtEngine:
    """Return the recipe's engine on the first GPU, compiled now if that has not been done.

    Raises MissingPackage, EngineError.
    """
    graph_of(recipe, settings.precision)  # what the recipe lacks is said first: no driver helps against it
    gpu = open_gpu()  # before the runtime: without a driver that one ends the process
    runtime = load_runtime(settings.runtime)
    with gpu.current():
        plan = plan_for(recipe, settings, runtime, gpu.facts)
    try:
        return TensorRtEngine(plan, runtime, gpu)
    except PlanRefused as error:
        if plan.is_new:
            raise
        log.warning("%s: it is compiled anew", error)
    discard(settings.cache, plan.key)
    with gpu.current():
        plan = plan_for(recipe, settings, runtime, gpu.facts)
    return TensorRtEngine(plan, runtime, gpu)


class PlanRefused(EngineError):
    """The runtime does not load a plan."""


class TensorRtEngine:
    """A plan with its memory: page-locked on the host, fixed on the device, one stream, a CUDA graph where it can be.

    Any thread may infer, one at a time.
    """

    def __init__(self, plan: Plan, runtime: Any, gpu: Gpu) -> None:
        """Raises PlanRefused if the plan cannot be loaded here, EngineError if it is no detector's or memory lacks."""
        self._gpu = gpu = gpu.beside()
        self._replay: Callable[[], None] | None = None
        self.label = f"{runtime.__name__} {plan.key.precision}, {gpu.facts.name}"
        with gpu.current():
            self._runtime = runtime.Runtime(runtime.Logger(runtime.Logger.ERROR))
            self._engine = self._runtime.deserialize_cuda_engine(plan.data)
            if self._engine is None:
                raise PlanRefused(
                    f"{plan.key.runtime} does not load the plan for {gpu.facts.name} (compute capability "
                    f"{gpu.facts.compute_capability}): see its messages above and its support matrix"
                )
            self._context = self._engine.create_execution_context()
            if self._context is None:
                raise EngineError(
                    f"{plan.key.runtime} got no memory for the plan on {gpu.facts.name} ({gpu.facts.memory_mb} MB): "
                    "end what else uses the GPU, or take a recipe with a smaller --size"
                )
            self._host: dict[str, NDArray[np.float32]] = {}
            self._device: dict[str, Any] = {}
            for place in range(self._engine.num_io_tensors):
                self._lay_out(self._engine.get_tensor_name(place), runtime)
            if set(self._host) != {INPUT, MAP, SCORE}:
                raise EngineError(f"a plan of {sorted(self._host)} found, need {INPUT}, {MAP}, {SCORE}: train it again")
            self._begin()  # the first run makes what a capture must not contain
            gpu.wait()
            self._replay = gpu.captured(self._begin)

    def infer(self, batch: NDArray[np.float32]) -> tuple[NDArray[np.float32], float]:
        """Return (anomaly_map (h', w'), score) of one prepared part (1, C, h, w). Raises EngineError."""
        host = self._host
        if batch.shape != host[INPUT].shape:
            raise EngineError(f"a batch of shape {batch.shape} found, the plan takes {host[INPUT].shape}")
        np.copyto(host[INPUT], batch)
        with self._gpu.current():
            if self._replay is None:
                self._begin()
            else:
                self._replay()
            self._gpu.wait()
        return host[MAP][0, 0].copy(), float(host[SCORE][0])

    def _lay_out(self, name: str, runtime: Any) -> None:
        shape = tuple(self._engine.get_tensor_shape(name))
        kind = self._engine.get_tensor_dtype(name)
        if kind != runtime.float32 or any(side < 1 for side in shape):
            raise EngineError(f"{name} of {kind} {shape} found, need float32 of a fixed size: train it again")
        self._host[name] = self._gpu.page_locked(shape)
        self._device[name] = self._gpu.memory(4 * math.prod(shape))
        if not self._context.set_tensor_address(name, int(self._device[name])):
            raise EngineError(f"the runtime refuses memory for {name}: restart the agent")

    def _begin(self) -> None:
        """Put one inference on the stream."""
        gpu = self._gpu
        gpu.upload(self._device[INPUT], self._host[INPUT])
        if not self._context.execute_async_v3(gpu.stream):
            raise EngineError("the GPU did not take the inference: see the messages above; restart the agent")
        for name in (MAP, SCORE):
            gpu.download(self._host[name], self._device[name])

    def __del__(self) -> None:
        """Give memory back with the context current: pycuda leaks it otherwise."""
        if "_gpu" not in self.__dict__:  # it could not even be begun
            return
        with suppress(EngineError), self._gpu.current():
            for name in ("_replay", "_context", "_engine", "_runtime", "_device", "_host"):
                self.__dict__.pop(name, None)
            self._gpu.release()
