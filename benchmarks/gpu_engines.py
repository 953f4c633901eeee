"""The engines that gpu.py measures, and the state of the GPU that they run on."""

from __future__ import annotations

import importlib.metadata
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from agent.engines.build import load_runtime, plan_for
from agent.engines.cuda import open_gpu
from agent.engines.engine import INPUT, MAP, RUNTIMES, SCORE, Engine, EngineSettings, load_engine
from agent.engines.tensorrt import crop_plan
from calibration.errors import TaktsightError
from calibration.recipe import Recipe

if TYPE_CHECKING:  # it takes seconds, and most processes here do without
    import torch

STATE = (  # of the GPU, for nvidia-smi
    "name", "driver_version", "pstate", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit",
    "temperature.gpu", "utilization.gpu",
)  # fmt: skip
ON_THE_GPU = (
    *(f"{runtime} {precision}" for runtime in RUNTIMES for precision in ("f16", "f32")), "onnxruntime cuda",
)  # fmt: skip
EAGER, COMPILED = ("torch f16", "torch f32"), ("torch.compile f16", "torch.compile f32")
ON_THE_CPU = ("onnxruntime", "openvino")
AGENTS = (*ON_THE_GPU, *ON_THE_CPU)

Opened = tuple[Engine, float | None, float | None]


def opened(name: str, path: Path, recipe: Recipe, module: torch.nn.Module | None) -> Opened:
    """Return an engine, the seconds that compiling took, and those of a start with the plan at hand."""
    kind, _, precision = name.partition(" ")
    if kind in RUNTIMES:
        cache = path.parent / "engines" / kind
        return compiled(recipe, EngineSettings("tensorrt", precision, runtime=kind, cache=cache))
    if name in ("onnxruntime", "openvino"):
        return load_engine(recipe, EngineSettings(name, threads=2)), None, None
    if name == "onnxruntime cuda":
        return OnnxRuntimeOnGpu(recipe.graph), None, None
    assert module is not None
    began_s = time.monotonic()
    engine = Torch(module, precision, compiled=name in COMPILED)
    engine.infer(recipe.selftest.batches[:1])
    return engine, time.monotonic() - began_s if name in COMPILED else None, None


def compiled(recipe: Recipe, settings: EngineSettings) -> Opened:
    """Return an engine of TensorRT, what compiling took, and a start with the plan at hand."""
    gpu, runtime = open_gpu(), load_runtime(settings.runtime)
    began_s = time.monotonic()
    with gpu.current():
        plan_for(recipe, settings, runtime, gpu.facts)
    crop_plan(recipe, settings, runtime, gpu)
    built_s = time.monotonic() - began_s
    began_s = time.monotonic()
    return load_engine(recipe, settings), built_s, time.monotonic() - began_s


class Torch:
    """The network itself on the GPU, its input page-locked as TensorRT's is."""

    def __init__(self, module: torch.nn.Module, precision: str, *, compiled: bool) -> None:
        import torch

        if not torch.cuda.is_available():
            raise TaktsightError("torch sees no GPU")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.torch = torch
        self.is_half = precision == "f16"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        module = module.to("cuda").eval()
        self.module = torch.compile(module, mode="reduce-overhead") if compiled else module  # with CUDA graphs
        self.host: torch.Tensor | None = None
        self.label = f"torch{'.compile' if compiled else ''} {precision}, {torch.cuda.get_device_name()}"

    def infer(self, batch: np.ndarray) -> tuple[np.ndarray, float]:
        """Return (anomaly_map (h', w'), score) of one part, from host memory to host memory."""
        torch = self.torch
        if self.host is None:
            self.host = torch.empty(batch.shape, dtype=torch.float32, pin_memory=True)
        self.host.copy_(torch.from_numpy(batch))
        with torch.inference_mode(), torch.autocast("cuda", dtype=torch.float16, enabled=self.is_half):
            anomaly_map, score = self.module(self.host.to("cuda", non_blocking=True))
        return anomaly_map.float().cpu().numpy()[0, 0], float(score.float().cpu()[0])

    def gpu_mb(self) -> int:
        """Return what torch has taken for it, weights and all."""
        return self.torch.cuda.max_memory_reserved() >> 20


class OnnxRuntimeOnGpu:
    """The float32 graph in ONNX Runtime with CUDA."""

    def __init__(self, graph: bytes) -> None:
        import onnxruntime
        import torch  # noqa: F401 brings along the CUDA libraries that onnxruntime-gpu loads

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise TaktsightError("this onnxruntime is without CUDA: it is another package, onnxruntime-gpu")
        self.session = onnxruntime.InferenceSession(
            graph, providers=[("CUDAExecutionProvider", {"use_tf32": 0}), "CPUExecutionProvider"]
        )
        if "CUDAExecutionProvider" not in self.session.get_providers():
            raise TaktsightError("onnxruntime could not load its CUDA libraries, see its messages above")
        self.label = "onnxruntime cuda f32"

    def infer(self, batch: np.ndarray) -> tuple[np.ndarray, float]:
        """Return (anomaly_map (h', w'), score) of one part."""
        anomaly_map, score = self.session.run([MAP, SCORE], {INPUT: batch})
        return anomaly_map[0, 0], float(score[0])


def free_mb() -> float | None:
    """Return how much memory the GPU has left, None where nobody can tell."""
    try:
        with open_gpu().current():
            import pycuda.driver

            return pycuda.driver.mem_get_info()[0] / 2**20
    except (TaktsightError, ImportError):
        number = (smi("memory.free") or "").partition(" ")[0]  # "80995 MiB"
        return float(number) if number.isdigit() else None


def gpu_in_words() -> str:
    """Return GPU, driver, what runs on it, and the state that it is in; some of it also where pycuda is missing."""
    try:
        facts = open_gpu().facts
        words = (
            f"{facts.name}, compute capability {facts.compute_capability}, driver {facts.driver}, {facts.memory_mb} MB"
        )
    except TaktsightError as error:
        words = f"none for TensorRT ({error})"
    for package in ("tensorrt", "tensorrt-rtx", "pycuda", "onnxruntime-gpu"):
        try:
            words += f"; {package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"{words}; {smi(*STATE) or 'no nvidia-smi'}"


def smi(*fields: str) -> str | None:
    """Return what nvidia-smi says of the first GPU, None where there is none, as on a Jetson."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def torch_sees_a_gpu() -> bool:
    """Return whether the rows of torch will be more than a note."""
    import torch

    return torch.cuda.is_available()
