"""A GPU, its driver and TensorRT as programs see them, for machines that have none.

`FakeDriver` is the module pycuda.driver, `FakeLibrary` libcuda itself, `FakeRuntime` the module tensorrt. Work that is
put on the stream while it is captured is not done until the graph is launched, as on a GPU. What is to fail is given by
the name of the call.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from recipes import BLOCK, tiny_answer

from agent.engines.cuda import PycudaGpu

SHAPES = {"image": (1, 1, 32, 32), "anomaly_map": (1, 1, 32 // BLOCK, 32 // BLOCK), "score": (1,)}


class FakeError(Exception):
    """pycuda.driver.Error."""


class FakeDriver:
    """One GPU. fails: call -> what the driver says of it."""

    Error = FakeError

    def __init__(self, name: str = "NVIDIA L4", *, cuda: int = 12060, fails: dict[str, str] | None = None) -> None:
        self.name, self.cuda, self.fails = name, cuda, fails or {}
        self.depth = 0  # of the contexts that are current
        self.taken = 0  # bytes of device memory
        self.streams = 0  # made so far; handles are 77, 78, ...
        self.waiting: dict[int, list[Callable[[], None]]] = {}  # by stream, while a capture is on

    def _call(self, name: str) -> None:
        if name in self.fails:
            raise FakeError(f"{name} failed: {self.fails[name]}")

    def _in_context(self, name: str) -> None:
        self._call(name)
        if self.depth < 1:
            raise FakeError(f"{name} failed: invalid context")

    def put(self, stream: int, work: Callable[[], None]) -> None:
        """Put work on a stream."""
        if stream in self.waiting:
            self.waiting[stream].append(work)
        else:
            work()

    def init(self) -> None:
        self._call("cuInit")

    def get_driver_version(self) -> int:
        return self.cuda

    def Device(self, number: int) -> Any:  # noqa: N802
        self._call("cuDeviceGet")
        return SimpleNamespace(
            name=lambda: self.name,
            compute_capability=lambda: (8, 9),
            total_memory=lambda: 23034 << 20,
            retain_primary_context=lambda: SimpleNamespace(push=self._push, pop=self._pop),
        )

    def _push(self) -> None:
        self._call("cuCtxPushCurrent")
        self.depth += 1

    def _pop(self) -> None:
        self.depth -= 1

    def Stream(self) -> Any:  # noqa: N802
        self._in_context("cuStreamCreate")
        self.streams += 1
        return SimpleNamespace(handle=76 + self.streams, synchronize=lambda: self._in_context("cuStreamSynchronize"))

    def pagelocked_empty(self, shape: tuple[int, ...], kind: Any) -> np.ndarray:
        self._in_context("cuMemHostAlloc")
        return np.full(shape, np.nan, kind)

    def mem_alloc(self, n_bytes: int) -> Memory:
        self._in_context("cuMemAlloc")
        self.taken += n_bytes
        return Memory(self, n_bytes)

    def memcpy_htod_async(self, memory: Memory, array: np.ndarray, stream: Any) -> None:
        self._in_context("cuMemcpyHtoDAsync")
        self.put(stream.handle, lambda: np.copyto(memory.content, array.ravel()))

    def memcpy_dtoh_async(self, array: np.ndarray, memory: Memory, stream: Any) -> None:
        self._in_context("cuMemcpyDtoHAsync")
        self.put(stream.handle, lambda: np.copyto(array, memory.content.reshape(array.shape)))


class Memory:
    """Device memory; freed without a context it is lost."""

    def __init__(self, driver: FakeDriver, n_bytes: int) -> None:
        self.driver, self.content = driver, np.zeros(n_bytes // 4, np.float32)

    def __int__(self) -> int:
        return id(self)

    def __del__(self) -> None:
        if self.driver.depth > 0:
            self.driver.taken -= 4 * len(self.content)


class FakeLibrary:
    """libcuda. statuses: call -> what it answers in place of 0."""

    def __init__(self, driver: FakeDriver | None = None, *, gpus: int = 1, statuses: dict[str, int] | None = None):
        self.driver, self.gpus, self.statuses = driver, gpus, statuses or {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.launches = self.destroyed = self.captures = 0
        self.on_capture: Callable[[], object] = lambda: None  # what another thread does meanwhile

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.statuses.get("cuInit", 0)

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = self.gpus
        return self.statuses.get("cuDeviceGetCount", 0)

    def cuStreamBeginCapture_v2(self, stream: ctypes.c_void_p, mode: int) -> int:  # noqa: N802
        assert self.driver is not None
        if "cuStreamBeginCapture" not in self.statuses:
            self.driver.waiting[stream.value or 0] = []
            self.on_capture()
        return self.statuses.get("cuStreamBeginCapture", 0)

    def cuStreamEndCapture(self, stream: ctypes.c_void_p, graph: Any) -> int:  # noqa: N802
        assert self.driver is not None
        graph._obj.value = self.captures = self.captures + 1
        self.graphs[graph._obj.value] = self.driver.waiting.pop(stream.value or 0)
        return self.statuses.get("cuStreamEndCapture", 0)

    def cuGraphInstantiateWithFlags(self, executable: Any, graph: ctypes.c_void_p, flags: Any) -> int:  # noqa: N802
        executable._obj.value = graph.value
        return self.statuses.get("cuGraphInstantiate", 0)

    def cuGraphDestroy(self, graph: ctypes.c_void_p) -> int:  # noqa: N802
        return 0

    def cuGraphLaunch(self, executable: ctypes.c_void_p, stream: ctypes.c_void_p) -> int:  # noqa: N802
        self.launches += 1
        assert self.driver is not None
        for work in self.graphs[executable.value or 0]:
            self.driver.put(stream.value or 0, work)
        return self.statuses.get("cuGraphLaunch", 0)

    def cuGraphExecDestroy(self, executable: ctypes.c_void_p) -> int:  # noqa: N802
        del self.graphs[executable.value or 0]
        self.destroyed += 1
        return 0


def fake_gpu(driver: FakeDriver | None = None, library: FakeLibrary | None = None) -> PycudaGpu:
    """Return the agent's own GPU over a fake driver without a kernel module's file."""
    driver = driver or FakeDriver()
    return PycudaGpu(driver, library or FakeLibrary(driver), Path("/nonexistent"))


class FakeRuntime:
    """tensorrt: its plans say which graph, version and GPU they are for, and answer as tests/recipes.py works out.

    fails: "parse", "build", "Builder", "deserialize", "context", "execute" or "address". wrong: added to every map.
    """

    __name__ = "tensorrt"
    float32 = "DataType.FLOAT"
    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=3)
    MemoryPoolType = SimpleNamespace(WORKSPACE="WORKSPACE")
    BuilderFlag = SimpleNamespace(TF32="TF32")

    def __init__(
        self,
        driver: FakeDriver | None = None,
        version: str = "10.3.0",
        *,
        fails: tuple[str, ...] = (),
        shapes: dict[str, tuple[int, ...]] | None = None,
        wrong: float = 0.0,
    ) -> None:
        self.driver, self.__version__, self.fails, self.wrong = driver or FakeDriver(), version, set(fails), wrong
        self.shapes = shapes or SHAPES
        self.builds = 0
        self.asked: dict[str, Any] = {}  # of the last build

    class Logger:
        ERROR = 2

        def __init__(self, severity: int) -> None:
            pass

    def Builder(self, logger: Any) -> Any:  # noqa: N802
        if "Builder" in self.fails:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        network = SimpleNamespace(
            num_inputs=1,
            get_input=lambda _: SimpleNamespace(name="image", shape=self.shapes["image"]),
            num_layers=1,
            get_layer=lambda _: SimpleNamespace(
                type="LayerType.CONVOLUTION", get_output=lambda _: SimpleNamespace(dtype="DataType.HALF")
            ),
        )

        def create_network(flags: int) -> Any:
            self.asked = {"flags": flags, "network": network}
            return network

        return SimpleNamespace(
            create_network=create_network,
            create_builder_config=lambda: FakeConfig(self.asked),
            build_serialized_network=self._built,
        )

    def OnnxParser(self, network: Any, logger: Any) -> Any:  # noqa: N802
        def parse(graph: bytes) -> bool:
            network.graph = graph
            return "parse" not in self.fails

        error = SimpleNamespace(desc=lambda: "no importer for Foo")
        return SimpleNamespace(parse=parse, num_errors=1, get_error=lambda _: error)

    def _built(self, network: Any, config: Any) -> bytes | None:
        self.builds += 1
        return None if "build" in self.fails else self._plan(hashlib.sha256(network.graph).hexdigest())

    def _plan(self, graph: str) -> bytes:
        return json.dumps({"graph": graph, "version": self.__version__, "gpu": self.driver.name}).encode()

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        return SimpleNamespace(deserialize_cuda_engine=self._engine)

    def _engine(self, plan: bytes) -> Any:
        fields = json.loads(plan)
        if "deserialize" in self.fails or plan != self._plan(fields["graph"]):
            return None
        names = list(self.shapes)
        return SimpleNamespace(
            num_io_tensors=len(names),
            get_tensor_name=lambda place: names[place],
            get_tensor_shape=lambda name: self.shapes[name],
            get_tensor_dtype=lambda name: self.float32,
            create_execution_context=lambda: None if "context" in self.fails else FakeContext(self),
        )


class FakeConfig:
    """What is asked of a build."""

    def __init__(self, asked: dict[str, Any]) -> None:
        self.asked = asked

    def set_memory_pool_limit(self, pool: str, n_bytes: int) -> None:
        self.asked["workspace"] = n_bytes

    def clear_flag(self, flag: str) -> None:
        self.asked["cleared"] = flag

    def create_timing_cache(self, known: bytes) -> bytes | None:
        self.asked["known"] = known
        return known if known in (b"", b"timings", b"another GPU's") else None

    def set_timing_cache(self, cache: bytes, *, ignore_mismatch: bool) -> bool:
        self.asked["cache"] = cache
        return cache != b"another GPU's"

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: b"timings")


class FakeContext:
    """Runs a plan: reads and writes the memory whose addresses it was given."""

    def __init__(self, runtime: FakeRuntime) -> None:
        self.runtime = runtime
        self.memory: dict[str, Memory] = {}

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.memory[name] = ctypes.cast(address, ctypes.py_object).value
        return "address" not in self.runtime.fails

    def execute_async_v3(self, stream: int) -> bool:
        def work() -> None:
            image = self.memory["image"].content.reshape(self.runtime.shapes["image"])
            anomaly_map, score = tiny_answer(image)
            self.memory["anomaly_map"].content[:] = anomaly_map.ravel() + self.runtime.wrong
            self.memory["score"].content[:] = score

        if "execute" not in self.runtime.fails:
            self.runtime.driver.put(stream, work)
        return "execute" not in self.runtime.fails
