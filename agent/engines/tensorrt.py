"""TensorRT on an NVIDIA GPU: all is laid out before the first part; a part is one copy in, one launch, one copy out."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.engines.build import Plan, discard, graph_of, is_compiled, load_runtime, plan_for, runtime_name
from agent.engines.crop import crop_plan_for, crop_shape, sample
from agent.engines.cuda import Gpu, open_gpu
from agent.engines.engine import CROP, INPUT, MAP, SCORE, EngineSettings
from agent.errors import EngineError
from calibration.recipe import Recipe

log = logging.getLogger(__name__)

ONLY_BATCHES = "8-bit pixels go to the GPU as float32, which takes longer"
SAME = 1e-6  # of reflectance: a crop on the GPU may be off by the rounding of a division


def tensorrt_engine(recipe: Recipe, settings: EngineSettings) -> TensorRtEngine:
    """Return the recipe's engine on the first GPU, compiled now if that has not been done.

    Raises MissingPackage, EngineError.
    """
    gpu, runtime = _device_for(recipe, settings)
    with gpu.current():
        plan = plan_for(recipe, settings, runtime, gpu.facts)
    try:
        engine = TensorRtEngine(plan, runtime, gpu)
    except PlanRefused as error:
        if plan.is_new:
            raise
        log.warning("%s: it is compiled anew", error)
        discard(settings.cache, plan.key)
        with gpu.current():
            plan = plan_for(recipe, settings, runtime, gpu.facts)
        engine = TensorRtEngine(plan, runtime, gpu)
    crops = crop_plan(recipe, settings, runtime, gpu)
    if crops is not None:
        try:
            engine.take_crops(crops)
        except EngineError as error:
            log.warning("%s: %s", ONLY_BATCHES, error)
            discard(settings.cache, crops.key)  # compiled anew at the next start
    return engine


def crop_plan(recipe: Recipe, settings: EngineSettings, runtime: Any, gpu: Gpu) -> Plan | None:
    """Return what makes batches of the recipe's 8-bit crops on the device, None where that cannot be, or fails."""
    shape = crop_shape(recipe.view)
    if shape is None:
        return None
    try:
        with gpu.current():
            return crop_plan_for(shape, settings, runtime, gpu.facts)
    except EngineError as error:
        log.warning("%s: %s", ONLY_BATCHES, error)
        return None


def lies_ready(recipe: Recipe, settings: EngineSettings) -> bool:
    """Return whether the recipe has been compiled for this device; nothing is compiled, run or written.

    Raises MissingPackage, EngineError.
    """
    gpu, runtime = _device_for(recipe, settings)
    return is_compiled(recipe, settings, runtime, gpu.facts)


def _device_for(recipe: Recipe, settings: EngineSettings) -> tuple[Gpu, Any]:
    graph_of(recipe, settings.precision)  # what the recipe lacks is said first: no driver helps against it
    gpu = open_gpu()  # before the runtime: without a driver that one ends the process
    return gpu, load_runtime(settings.runtime)


def _begun(runtime: Any) -> Any:
    try:
        return runtime.Runtime(runtime.Logger(runtime.Logger.ERROR))
    except TypeError as error:  # what pybind11 makes of a null pointer
        raise EngineError(f"{runtime_name(runtime)} cannot run here: check the driver with nvidia-smi") from error


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
        self._replay_crop: Callable[[], None] | None = None
        self.crop_shape: tuple[int, int, int, int] | None = None
        self.label = f"{runtime.__name__} {plan.key.precision}, {gpu.facts.name}"
        self._host: dict[str, NDArray[Any]] = {}
        self._device: dict[str, Any] = {}
        self._engines: list[Any] = []
        self._contexts: list[Any] = []
        with gpu.current():
            self._module = runtime
            self._runtime = _begun(runtime)
            self._network = self._loaded(plan)
            if set(self._host) != {INPUT, MAP, SCORE}:
                raise EngineError(f"a plan of {sorted(self._host)} found, need {INPUT}, {MAP}, {SCORE}: train it again")
            self._begin()  # the first run makes what a capture must not contain
            gpu.wait()
            self._replay = self._captured(self._begin)

    def take_crops(self, plan: Plan) -> None:
        """Take 8-bit crops too. plan: makes a batch of them, in the memory that the network reads.

        Raises EngineError, and takes batches alone, if it cannot be loaded or makes another batch than the host would.
        """
        gpu = self._gpu
        with gpu.current():
            self._expansion = self._loaded(plan)
            crop, batch = sample(self._host[CROP].shape)
            self._host[CROP][:] = crop
            self._begin_crop()
            gpu.download(self._host[INPUT], self._device[INPUT])
            gpu.wait()
            off = float(np.abs(self._host[INPUT] - batch).max())
            if not off <= SAME:
                raise EngineError(f"a crop becomes another batch on the GPU, off by {off:.1e}: report this")
            self._replay_crop = self._captured(self._begin_crop)
        self.crop_shape = crop.shape

    def infer(self, batch: NDArray[np.float32]) -> tuple[NDArray[np.float32], float]:
        """Return (anomaly_map (h', w'), score) of one prepared part (1, C, h, w). Raises EngineError."""
        wanted = self._host[INPUT]
        if batch.shape != wanted.shape:
            raise EngineError(f"a batch of shape {batch.shape} found, the plan takes {wanted.shape}")
        np.copyto(wanted, batch)
        return self._answer(self._replay or self._begin)

    def infer_crop(self, crop: NDArray[np.uint8]) -> tuple[NDArray[np.float32], float]:
        """Return the same of one part cut out of an 8-bit frame, (h, w) or (h, w, 3). Raises EngineError."""
        shape = (1, *crop.shape, *(1,) * (3 - crop.ndim))
        if shape != self.crop_shape or crop.dtype != np.uint8:
            raise EngineError(f"a crop of shape {shape}, {crop.dtype} found, the plan takes {self.crop_shape}, uint8")
        np.copyto(self._host[CROP], crop.reshape(shape))
        return self._answer(self._replay_crop or self._begin_crop)

    def _answer(self, begin: Callable[[], None]) -> tuple[NDArray[np.float32], float]:
        with self._gpu.current():
            begin()
            self._gpu.wait()
        return self._host[MAP][0, 0].copy(), float(self._host[SCORE][0])

    def _captured(self, begin: Callable[[], None]) -> Callable[[], None] | None:
        """Return what plays `begin`, which has run once, as one CUDA graph; None where that cannot be."""
        asked = [getattr(context, "is_stream_capturable", None) for context in self._contexts]  # TensorRT-RTX has it
        allowed = all(is_capturable is None or is_capturable(self._gpu.stream) for is_capturable in asked)
        replay = self._gpu.captured(begin) if allowed else None
        if replay is None:
            log.warning("%s: no CUDA graph can be made: layers are launched one by one, which takes longer", self.label)
        return replay

    def _loaded(self, plan: Plan) -> Any:
        """Return the context of a plan, its tensors laid out."""
        engine, facts = self._runtime.deserialize_cuda_engine(plan.data), self._gpu.facts
        if engine is None:
            raise PlanRefused(
                f"{plan.key.runtime} does not load the plan for {facts.name} (compute capability "
                f"{facts.compute_capability}): see its messages above and its support matrix"
            )
        self._engines.append(engine)
        context = engine.create_execution_context()
        if context is None:
            raise EngineError(
                f"{plan.key.runtime} cannot lay out the plan on {facts.name} ({facts.memory_mb} MB): see its messages "
                "above; where memory is short, end what else uses the GPU, or take a recipe with a smaller --size"
            )
        self._contexts.append(context)
        for place in range(engine.num_io_tensors):
            self._lay_out(engine, context, engine.get_tensor_name(place))
        return context

    def _lay_out(self, engine: Any, context: Any, name: str) -> None:
        """Give a tensor its memory; of one name there is one, whichever plan reads or writes it."""
        shape, kind = tuple(engine.get_tensor_shape(name)), engine.get_tensor_dtype(name)
        wanted, of = (self._module.uint8, np.uint8) if name == CROP else (self._module.float32, np.float32)
        if kind != wanted or any(side < 1 for side in shape):
            word = np.dtype(of).name
            raise EngineError(f"{name} of {kind} {shape} found, need {word} of a fixed size: train it again")
        if name not in self._host:
            self._host[name] = self._gpu.page_locked(shape, of)
            self._device[name] = self._gpu.memory(np.dtype(of).itemsize * math.prod(shape))
        if self._host[name].shape != shape:
            raise EngineError(f"{name} of {shape} found, the network's is {self._host[name].shape}: report this")
        if not context.set_tensor_address(name, int(self._device[name])):
            raise EngineError(f"the runtime refuses memory for {name}: restart the agent")

    def _begin(self) -> None:
        """Put one inference on the stream."""
        self._gpu.upload(self._device[INPUT], self._host[INPUT])
        self._begin_network()

    def _begin_crop(self) -> None:
        """Put one inference of a crop on the stream."""
        self._gpu.upload(self._device[CROP], self._host[CROP])
        self._begin_plan(self._expansion)
        self._begin_network()

    def _begin_network(self) -> None:
        self._begin_plan(self._network)
        for name in (MAP, SCORE):
            self._gpu.download(self._host[name], self._device[name])

    def _begin_plan(self, context: Any) -> None:
        if not context.execute_async_v3(self._gpu.stream):
            raise EngineError("the GPU did not take the inference: see the messages above; restart the agent")

    def __del__(self) -> None:
        """Give memory back with the context current: pycuda leaks it otherwise."""
        if "_gpu" not in self.__dict__:  # it could not even be begun
            return
        held = (
            "_replay",
            "_replay_crop",
            "_network",
            "_expansion",
            "_contexts",
            "_engines",
            "_runtime",
            "_device",
            "_host",
        )
        with suppress(EngineError), self._gpu.current():
            for name in held:
                self.__dict__.pop(name, None)
            self._gpu.release()
