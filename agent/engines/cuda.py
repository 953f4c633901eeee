"""Port: the GPU, as little of it as an engine needs. pycuda stands behind it; graphs come from the driver itself.

The driver is asked before anything else: without one, the runtime of TensorRT ends the process instead of raising.
The process has one GPU and its primary context, never given back: any thread makes it current for a moment, works, and
lets it go. Every engine has a stream of its own. Memory and streams are released with the context current, because
pycuda leaks them otherwise.
Source: CUDA driver API 12, cuda.h (CUresult); pycuda 2026.1, src/cpp/cuda.hpp.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import importlib
import importlib.util
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from agent.errors import EngineError
from calibration.errors import MissingPackage

LIBRARY = "libcuda.so.1"
MODULE_FILE = Path("/proc/driver/nvidia/version")
CAPTURE_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: what goes on the default stream, as weights do, neither waits for the stream
#                   nor spoils what it captures
GRAPH_CALLS = (
    "cuStreamBeginCapture_v2",
    "cuStreamEndCapture",
    "cuGraphInstantiateWithFlags",  # since CUDA 11.4
    "cuGraphLaunch",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
)
NO_DEVICE = "no GPU is visible: check nvidia-smi; a service may reach it after taktsight-agent install --gpu nvidia"
RESTART = "restart the machine: driver and kernel module must be of one version"
ADVICE = {  # CUresult: (what cuGetErrorString calls it, what to do)
    1: ("invalid argument", "report this: taktsight passed the driver what it does not take"),
    2: ("out of memory", "end what else uses the GPU, or take a recipe with a smaller --size"),
    3: ("initialization error", RESTART),
    4: ("driver shutting down", "the driver is shutting down: restart the agent"),
    34: (
        "CUDA driver is a stub library",
        "the toolkit's stub of libcuda.so.1 was loaded: take it off the library path",
    ),
    35: (
        "CUDA driver version is insufficient for CUDA runtime version",
        "update the NVIDIA driver: it is older than the CUDA that TensorRT was built for",
    ),
    46: (
        "CUDA-capable device(s) is/are busy or unavailable",
        "another process has the GPU for itself: nvidia-smi -c 0, or end that process",
    ),
    100: ("no CUDA-capable device is detected", NO_DEVICE),
    101: ("invalid device ordinal", NO_DEVICE),
    200: ("device kernel image is invalid", "the plan is of another GPU: run taktsight-agent compile anew"),
    201: ("invalid device context", "the GPU was reset: restart the agent"),
    209: (
        "no kernel image is available for execution on the device",
        "this GPU is older or newer than TensorRT supports: see its support matrix",
    ),
    214: (
        "uncorrectable ECC error encountered",
        "the GPU's memory is failing: nvidia-smi -q -d ECC, restart, replace the card",
    ),
    218: ("a PTX JIT compilation failed", "update the NVIDIA driver"),
    222: (
        "the provided PTX was compiled with an unsupported toolchain",
        "update the NVIDIA driver: it is older than the CUDA that TensorRT was built for",
    ),
    304: ("OS call failed or operation not supported on this OS", "see the kernel's log: dmesg | grep -i nvrm"),
    400: ("invalid resource handle", "the GPU was reset: restart the agent"),
    700: (
        "an illegal memory access was encountered",
        "restart the agent; if it comes again, run taktsight-agent compile anew and report it",
    ),
    701: ("too many resources requested for launch", "end what else uses the GPU"),
    702: (
        "the launch timed out and was terminated",
        "a display hangs on this GPU: take another one, or run without a desktop",
    ),
    716: ("misaligned address", "restart the agent; if it comes again, run taktsight-agent compile anew"),
    719: ("unspecified launch failure", "restart the agent; dmesg | grep -i xid says what the GPU met"),
    800: ("operation not permitted", "let the service reach the devices: taktsight-agent install --gpu nvidia"),
    801: ("operation not supported", "this GPU or driver lacks what was asked for: update the driver"),
    802: ("system not yet initialized", "start nvidia-fabricmanager or nvidia-persistenced, then the agent"),
    803: ("system has unsupported display driver / cuda driver combination", RESTART),
    804: (
        "forward compatibility was attempted on non supported HW",
        "update the NVIDIA driver, or take the CUDA compat package away",
    ),
    900: ("operation not permitted when stream is capturing", "report this with the detector's name"),
    901: ("operation failed due to a previous error during capture", "report this with the detector's name"),
    999: ("unknown error", "restart the machine; dmesg | grep -i nvrm says more"),
}

_MODULE = re.compile(r"Kernel Module(?: for \S+)?\s+([\d.]+)")


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """What a plan belongs to."""

    name: str  # "NVIDIA L4"
    compute_capability: str  # "8.9"
    driver: str  # "560.35.03, CUDA 12.6"
    memory_mb: int


class Gpu(Protocol):
    """One GPU with one stream, used by one thread at a time."""

    facts: GpuFacts
    stream: int  # handle, for TensorRT

    def beside(self) -> Gpu:
        """Return the same GPU with a stream of its own: for an engine that is laid out while another one infers."""

    def release(self) -> None:
        """Give the stream back; the GPU must be current."""

    def current(self) -> AbstractContextManager[None]:
        """Make the GPU this thread's own for a moment; everything below wants that."""

    def page_locked(self, shape: tuple[int, ...], kind: Any = np.float32) -> NDArray[Any]:
        """Return host memory that the GPU reads and writes by itself. kind: of its values, as NumPy names it."""

    def memory(self, n_bytes: int) -> Any:
        """Return device memory; int() of it is its address, and it is released with its last reference."""

    def upload(self, memory: Any, array: NDArray[Any]) -> None:
        """Begin to copy a page-locked array to the device."""

    def download(self, array: NDArray[Any], memory: Any) -> None:
        """Begin to copy device memory into a page-locked array."""

    def wait(self) -> None:
        """Return once everything that was begun is done."""

    def captured(self, work: Callable[[], None]) -> Callable[[], None] | None:
        """Return what plays `work` again as one CUDA graph, None where this driver cannot."""


@functools.cache
def open_gpu() -> Gpu:
    """Return the first GPU of this machine, the same at every call. Raises EngineError, MissingPackage."""
    probe_driver()
    if importlib.util.find_spec("pycuda") is None:
        raise MissingPackage("pycuda is not installed: pip install 'taktsight[tensorrt]', see docs/engines.md")
    try:
        driver = importlib.import_module("pycuda.driver")
    except ImportError as error:  # built for another CUDA, Python or NumPy
        raise EngineError(
            f"pycuda cannot be loaded: {error}: build it anew on this machine, see docs/engines.md"
        ) from error
    gpu = PycudaGpu(driver, ctypes.CDLL(LIBRARY))
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(gpu))  # never given back: pycuda would do it wrongly
    return gpu


def probe_driver(load: Callable[[str], Any] = ctypes.CDLL) -> int:
    """Return how many GPUs the driver knows, at least 1. Raises EngineError if there is no driver, or no GPU."""
    try:
        library = load(LIBRARY)
    except OSError as error:
        raise EngineError(
            f"no NVIDIA driver: {LIBRARY} cannot be loaded: install the driver, or set engine.kind: auto"
        ) from error
    check("cuInit", library.cuInit(0))
    count = ctypes.c_int(0)
    check("cuDeviceGetCount", library.cuDeviceGetCount(ctypes.byref(count)))
    if count.value < 1:
        raise EngineError(told("cuDeviceGetCount", 100))
    return count.value


def check(call: str, status: int) -> None:
    """Raises EngineError, naming the call, unless the driver answered 0."""
    if status:
        raise EngineError(told(call, status))


def told(call: str, status: int) -> str:
    """Return what a status of the driver means, and what to do about it."""
    name, advice = ADVICE.get(status, ("not in our list", "see CUresult in NVIDIA's documentation"))
    return f"{call}: CUDA status {status} ({name}): {advice}"


def told_by_pycuda(error: Exception) -> str:
    """Return the same for an error of pycuda, which carries the driver's words alone: "cuMemAlloc failed: ..."."""
    longest_first = sorted(ADVICE, key=lambda status: -len(ADVICE[status][0]))  # some words are the start of others
    for status in longest_first:
        if ADVICE[status][0] in str(error):
            return told(str(error).partition(" failed")[0], status)
    return f"{error}: restart the agent"


class PycudaGpu:
    """The first GPU through pycuda."""

    def __init__(self, driver: Any, library: Any, module_file: Path = MODULE_FILE) -> None:
        """driver: the module pycuda.driver. library: libcuda, for what pycuda does not know. Raises EngineError."""
        self._driver, self._library = driver, library
        try:
            driver.init()
            device = driver.Device(0)
            self._context = device.retain_primary_context()
            major, minor = device.compute_capability()
            self.facts = GpuFacts(
                device.name(), f"{major}.{minor}", _driver_version(driver, module_file), device.total_memory() >> 20
            )
            with self.current():
                self._stream = driver.Stream(NON_BLOCKING)
        except driver.Error as error:
            raise EngineError(told_by_pycuda(error)) from error
        self.stream = int(self._stream.handle)

    def beside(self) -> PycudaGpu:
        """Return the same GPU with a stream of its own."""
        other = copy.copy(self)
        with self.current():
            other._stream = self._driver.Stream(NON_BLOCKING)
            other.stream = int(other._stream.handle)
        return other

    def release(self) -> None:
        """Give the stream back."""
        self._stream = None

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the GPU this thread's own for a moment. Raises EngineError in place of pycuda's errors."""
        try:
            self._context.push()
            try:
                yield
            finally:
                self._context.pop()
        except self._driver.Error as error:
            raise EngineError(told_by_pycuda(error)) from error

    def page_locked(self, shape: tuple[int, ...], kind: Any = np.float32) -> NDArray[Any]:
        """Return page-locked zeros."""
        array: NDArray[Any] = self._driver.pagelocked_empty(shape, kind)
        array.fill(0)
        return array

    def memory(self, n_bytes: int) -> Any:
        """Return device memory."""
        return self._driver.mem_alloc(n_bytes)

    def upload(self, memory: Any, array: NDArray[Any]) -> None:
        """Begin to copy to the device."""
        self._driver.memcpy_htod_async(memory, array, self._stream)

    def download(self, array: NDArray[Any], memory: Any) -> None:
        """Begin to copy from the device."""
        self._driver.memcpy_dtoh_async(array, memory, self._stream)

    def wait(self) -> None:
        """Return once all is done; other threads of Python run meanwhile."""
        self._stream.synchronize()

    def captured(self, work: Callable[[], None]) -> Callable[[], None] | None:
        """Return what plays `work` again, None where capturing is refused. `work` must have run once before."""
        library, stream = self._library, ctypes.c_void_p(self.stream)
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        if not all(hasattr(library, call) for call in GRAPH_CALLS):
            return None
        if library.cuStreamBeginCapture_v2(stream, CAPTURE_THREAD_LOCAL):
            return None
        try:
            work()
        except (EngineError, self._driver.Error):  # what cannot be captured; run as it is, it worked a moment ago
            library.cuStreamEndCapture(stream, ctypes.byref(graph))
            return None
        if library.cuStreamEndCapture(stream, ctypes.byref(graph)):
            return None
        refused = library.cuGraphInstantiateWithFlags(ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        library.cuGraphDestroy(graph)
        return None if refused else _Replay(library, executable, stream)


class _Replay:
    """A captured graph."""

    def __init__(self, library: Any, executable: ctypes.c_void_p, stream: ctypes.c_void_p) -> None:
        self._library, self._executable, self._stream = library, executable, stream

    def __call__(self) -> None:
        check("cuGraphLaunch", self._library.cuGraphLaunch(self._executable, self._stream))

    def __del__(self) -> None:
        self._library.cuGraphExecDestroy(self._executable)


def _driver_version(driver: Any, module_file: Path) -> str:
    """Return the kernel module's version, where it tells, and the newest CUDA that the driver speaks."""
    cuda = driver.get_driver_version()
    try:
        found = _MODULE.search(module_file.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        found = None
    spoken = f"CUDA {cuda // 1000}.{cuda % 1000 // 10}"
    return f"{found[1]}, {spoken}" if found else spoken
