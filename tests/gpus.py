"""A GPU, its driver and TensorRT as programs see them, for machines that have none.

`FakeDriver` is the module pycuda.driver, `FakeLibrary` libcuda itself, `FakeRuntime` the module tensorrt. Work that is
put on the stream while it is captured is not done until the graph is launched, as on a GPU. Networks that are put
together layer by layer are computed so when their plan runs. What is to fail is given by the name of the call.
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
        self.copied: list[int] = []  # bytes of each copy to the device
        self.streams = 0  # made so far; handles are 77, 78, ...
        self.flags: list[int] = []  # of each stream
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

    def Stream(self, flags: int = 0) -> Any:  # noqa: N802
        self._in_context("cuStreamCreate")
        self.flags.append(flags)
        self.streams += 1
        return SimpleNamespace(handle=76 + self.streams, synchronize=lambda: self._in_context("cuStreamSynchronize"))

    def pagelocked_empty(self, shape: tuple[int, ...], kind: Any) -> np.ndarray:
        self._in_context("cuMemHostAlloc")
        return np.full(shape, np.nan if kind == np.float32 else 99, kind)

    def mem_alloc(self, n_bytes: int) -> Memory:
        self._in_context("cuMemAlloc")
        self.taken += n_bytes
        return Memory(self, n_bytes)

    def memcpy_htod_async(self, memory: Memory, array: np.ndarray, stream: Any) -> None:
        self._in_context("cuMemcpyHtoDAsync")
        self.copied.append(array.nbytes)
        self.put(stream.handle, lambda: np.copyto(memory.content, array.ravel().view(np.uint8)))

    def memcpy_dtoh_async(self, array: np.ndarray, memory: Memory, stream: Any) -> None:
        self._in_context("cuMemcpyDtoHAsync")
        self.put(stream.handle, lambda: np.copyto(array, memory.content.view(array.dtype).reshape(array.shape)))


class Memory:
    """Device memory; freed without a context it is lost."""

    def __init__(self, driver: FakeDriver, n_bytes: int) -> None:
        self.driver, self.content = driver, np.zeros(n_bytes, np.uint8)

    def __int__(self) -> int:
        return id(self)

    def __del__(self) -> None:
        if self.driver.depth > 0:
            self.driver.taken -= len(self.content)


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

    fails: "parse", "build", "Builder", "Runtime", "deserialize", "context", "execute" or "address"; "crop" fails at
    building, and "crop context" at laying out, what makes batches of crops. wrong: added to every map. dark: share that
    a crop loses. capturable: what TensorRT-RTX answers when it is asked whether a graph can be made; None: cannot be
    asked, as TensorRT.
    """

    __name__ = "tensorrt"
    float32, uint8 = "DataType.FLOAT", "DataType.UINT8"
    ElementWiseOperation = SimpleNamespace(DIV="DIV")
    Permutation = staticmethod(list)
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
        dark: float = 0.0,
        capturable: bool | None = None,
    ) -> None:
        self.driver, self.__version__, self.fails, self.wrong = driver or FakeDriver(), version, set(fails), wrong
        self.shapes, self.dark, self.capturable = shapes or SHAPES, dark, capturable
        self.builds = 0
        self.asked: dict[str, Any] = {}  # of the last build

    class Logger:
        ERROR = 2

        def __init__(self, severity: int) -> None:
            pass

    def Builder(self, logger: Any) -> Any:  # noqa: N802
        if "Builder" in self.fails:
            raise TypeError("pybind11::init(): factory function returned nullptr")

        def create_network(flags: int) -> Any:
            network = FakeNetwork(self.shapes["image"])
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
        if "build" in self.fails or ("crop" in self.fails and network.graph is None):
            return None
        return self._plan(network.layers if network.graph is None else hashlib.sha256(network.graph).hexdigest())

    def _plan(self, graph: str | list[Any]) -> bytes:
        return json.dumps({"graph": graph, "version": self.__version__, "gpu": self.driver.name}).encode()

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        if "Runtime" in self.fails:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        return SimpleNamespace(deserialize_cuda_engine=self._engine)

    def _engine(self, plan: bytes) -> Any:
        fields = json.loads(plan)
        if "deserialize" in self.fails or plan != self._plan(fields["graph"]):
            return None
        layers = fields["graph"] if isinstance(fields["graph"], list) else None
        shapes = self.shapes if layers is None else {"crop": tuple(layers[0][1]), "image": self.shapes["image"]}
        names, refused = list(shapes), "context" if layers is None else "crop context"
        return SimpleNamespace(
            num_io_tensors=len(names),
            get_tensor_name=lambda place: names[place],
            get_tensor_shape=lambda name: shapes[name],
            get_tensor_dtype=lambda name: self.uint8 if name == "crop" else self.float32,
            create_execution_context=lambda: None if refused in self.fails else FakeContext(self, layers),
        )


class FakeNetwork:
    """A network: of a graph that was parsed, or of layers that were added to it, each fed by the one before."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.graph: bytes | None = None
        self.shape = shape
        self.layers: list[Any] = []
        self.num_inputs = 1

    @property
    def num_layers(self) -> int:
        return max(1, len(self.layers) - 1)

    def get_input(self, place: int) -> Any:
        return SimpleNamespace(name="image", shape=self.shape)

    def get_layer(self, place: int) -> Any:
        return self._layer("CONVOLUTION", "DataType.HALF")

    def _layer(self, kind: str, dtype: str = "DataType.FLOAT") -> Any:
        tensor = SimpleNamespace(dtype=dtype)
        return SimpleNamespace(type=f"LayerType.{kind}", get_output=lambda place: tensor)

    def add_input(self, name: str, dtype: str, shape: tuple[int, ...]) -> Any:
        assert (name, dtype) == ("crop", "DataType.UINT8")
        self.layers.append(["crop", shape])
        return SimpleNamespace(dtype=dtype)

    def add_cast(self, tensor: Any, dtype: str) -> Any:
        assert dtype == "DataType.FLOAT"
        self.layers.append(["cast"])
        return self._layer("CAST")

    def add_constant(self, shape: tuple[int, ...], values: np.ndarray) -> Any:
        self.constant = float(values.reshape(-1)[0])
        return self._layer("CONSTANT")

    def add_elementwise(self, one: Any, other: Any, operation: str) -> Any:
        assert operation == "DIV"
        self.layers.append(["divide", self.constant])
        return self._layer("ELEMENTWISE")

    def add_shuffle(self, tensor: Any) -> Any:
        network = self

        class Shuffle:
            def __setattr__(self, name: str, value: Any) -> None:
                assert name == "first_transpose"
                network.layers.append(["transpose", value])

            def get_output(self, place: int) -> Any:
                return SimpleNamespace(dtype="DataType.FLOAT")

        return Shuffle()

    def mark_output(self, tensor: Any) -> None:
        assert tensor.name == "image"


class FakeConfig:
    """What is asked of a build."""

    def __init__(self, asked: dict[str, Any]) -> None:
        self.asked = asked

    def set_memory_pool_limit(self, pool: str, n_bytes: int) -> None:
        self.asked["workspace"] = n_bytes

    def clear_flag(self, flag: str) -> None:
        self.asked["cleared"] = flag

    def set_flag(self, flag: str) -> None:
        self.asked["set"] = flag

    def set_compute_capability(self, name: str, place: int) -> None:
        self.asked |= {"config": self, "capabilities": [(name, place)]}

    def create_timing_cache(self, known: bytes) -> bytes | None:
        self.asked["known"] = known
        return known if known in (b"", b"timings", b"another GPU's") else None

    def set_timing_cache(self, cache: bytes, *, ignore_mismatch: bool) -> bool:
        self.asked["cache"] = cache
        return cache != b"another GPU's"

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: b"timings")


class FakeContext:
    """Runs a plan: reads and writes the memory whose addresses it was given. layers: None for a parsed graph."""

    def __init__(self, runtime: FakeRuntime, layers: list[Any] | None) -> None:
        self.runtime, self.layers = runtime, layers
        self.memory: dict[str, Memory] = {}
        if runtime.capturable is not None:
            self.is_stream_capturable = lambda stream: runtime.capturable

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.memory[name] = ctypes.cast(address, ctypes.py_object).value
        return "address" not in self.runtime.fails

    def execute_async_v3(self, stream: int) -> bool:
        if "execute" not in self.runtime.fails:
            self.runtime.driver.put(stream, self._network if self.layers is None else self._layers)
        return "execute" not in self.runtime.fails

    def _network(self) -> None:
        anomaly_map, score = tiny_answer(self._values("image").reshape(self.runtime.shapes["image"]))
        self._values("anomaly_map")[:] = anomaly_map.ravel() + self.runtime.wrong
        self._values("score")[:] = score

    def _layers(self) -> None:
        steps = {
            "cast": lambda values: values.astype(np.float32),
            "divide": lambda values, by: values / np.float32(by),
            "transpose": lambda values, axes: values.transpose(axes),
        }
        (_, shape), *layers = self.layers or ()
        values = self.memory["crop"].content.reshape(shape)
        for name, *settings in layers:
            values = steps[name](values, *settings)
        self._values("image")[:] = values.ravel() * np.float32(1 - self.runtime.dark)

    def _values(self, name: str) -> np.ndarray:
        return self.memory[name].content.view(np.float32)
