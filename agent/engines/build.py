"""From a recipe's graph to a TensorRT plan on this device, kept until anything that it depends on changes.

A plan fits one graph, one version of the runtime, one GPU and one driver: all of them are its key. Beside each plan
lies a JSON file with the key, the plan's digest and what was built. A plan is as good as a program: it is loaded only
from a folder of our own, only if its digest is right, and made anew in every other case.

TensorRT 10 and 11 and TensorRT-RTX are one API here. Precision comes from the graph: networks are strongly typed.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import stat
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agent.engines.cuda import GpuFacts
from agent.engines.engine import EngineSettings
from agent.errors import EngineError
from agent.ownership import make_folder
from calibration.errors import MissingPackage
from calibration.recipe import Recipe
from calibration.recipe_file import canonical, sha256, strict_json, sync_folder

log = logging.getLogger(__name__)

ASKED = 1  # raised whenever `built` or `parsed` ask otherwise of the builder: plans made before are made anew
KEPT_PLANS = 8  # in one folder; the one used longest ago goes first
ASKED_FOR = {"7.5": "SM75"}  # what TensorRT-RTX serves, but not with a plan for which no compute capability was named
IMPORTS: dict[str, Callable[[], Any]] = {
    "tensorrt": lambda: importlib.import_module("tensorrt"),
    "tensorrt_rtx": lambda: importlib.import_module("tensorrt_rtx"),
}


@dataclass(frozen=True, slots=True)
class PlanKey:
    """What a plan depends on. Another recipe with the same graph shares it: thresholds do not cost a compilation."""

    graph: str  # SHA-256 of the ONNX graph, or of what stands for one
    precision: str
    runtime: str  # "tensorrt 10.3.0"
    gpu: str
    compute_capability: str
    driver: str
    workspace_mb: int
    asked: int  # ASKED

    @property
    def stem(self) -> str:
        """Name of its files."""
        return sha256(canonical(asdict(self)))[:24]


@dataclass(frozen=True, slots=True)
class Plan:
    """A serialised engine, and how it came here."""

    data: bytes
    key: PlanKey
    is_new: bool  # built now, not found
    facts: dict[str, Any]  # of its sidecar: recipe, seconds, layers, time


def load_runtime(name: str) -> Any:
    """Return the Python module of the runtime. Raises MissingPackage, EngineError if its libraries do not load."""
    try:
        return IMPORTS[name]()
    except (ImportError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            raise MissingPackage(
                f"{name} is not installed: pip install 'taktsight[{name.replace('_', '-')}]', see docs/engines.md"
            ) from error
        raise EngineError(f"{name} cannot be loaded: {error}: install it anew, see docs/engines.md") from error


def runtime_name(runtime: Any) -> str:
    """Return module and version, such as "tensorrt 10.3.0"."""
    return f"{runtime.__name__} {runtime.__version__}"


def graph_of(recipe: Recipe, precision: str) -> bytes:
    """Return the recipe's graph in this precision. Raises EngineError if it has none."""
    if precision == "f32":
        return recipe.graph
    if precision != "f16":
        raise EngineError(f"tensorrt runs f16 and f32, {precision} found: set engine.precision in station.yaml")
    if recipe.graph_f16 is None:
        tried = recipe.training.get("half_precision")
        why = "it was trained before there were any" if tried is None else "none was close enough to float32"
        raise EngineError(
            f"the recipe of {recipe.product} has no graph in half precision ({why}): set engine.precision: f32, or "
            "train it again"
        )
    return recipe.graph_f16


def plan_for(recipe: Recipe, settings: EngineSettings, runtime: Any, gpu: GpuFacts) -> Plan:
    """Return the recipe's plan for this device, built now if there is none that fits. Raises EngineError."""
    graph = graph_of(recipe, settings.precision)
    facts = {"product": recipe.product, "recipe": recipe.digest}
    return kept_or_built(
        settings.cache, key_of(graph, settings, runtime, gpu), lambda: parsed(runtime, graph), facts=facts
    )


def is_compiled(recipe: Recipe, settings: EngineSettings, runtime: Any, gpu: GpuFacts) -> bool:
    """Return whether a plan of this recipe lies ready; nothing is built or written. Raises EngineError."""
    if settings.cache.is_dir():
        _require_own(settings.cache)
    return _kept(settings.cache, key_of(graph_of(recipe, settings.precision), settings, runtime, gpu)) is not None


def key_of(graph: bytes, settings: EngineSettings, runtime: Any, gpu: GpuFacts) -> PlanKey:
    """Return what a plan of this graph depends on, here and now."""
    return PlanKey(
        graph=sha256(graph),
        precision=settings.precision,
        runtime=runtime_name(runtime),
        gpu=gpu.name,
        compute_capability=gpu.compute_capability,
        driver=gpu.driver,
        workspace_mb=settings.workspace_mb,
        asked=ASKED,
    )


def kept_or_built(folder: Path, key: PlanKey, network: Callable[[], Network], *, facts: dict[str, Any]) -> Plan:
    """Return the plan of this key, built now from a network if there is none. Raises EngineError.

    facts: what is told of it beside its layers and times; "product" names it.
    """
    _own_folder(folder)
    found = _kept(folder, key)
    if found is not None:
        with suppress(OSError):
            os.utime(folder / f"{key.stem}.plan")  # used just now
        return found
    log.warning("compiling %s for %s with %s: a network takes up to minutes", facts["product"], key.gpu, key.runtime)
    began_s = time.monotonic()
    made = network()
    built_utc = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    facts = {**facts, "layers": layer_counts(made), "built_utc": built_utc}
    timing = folder / f"{key.runtime.replace(' ', '-')}-{sha256(key.gpu.encode())[:8]}.timing"
    data = built(made, key.workspace_mb, timing, key.compute_capability)
    facts["seconds"] = round(time.monotonic() - began_s, 1)
    _keep(folder, key, data, facts)
    return Plan(data, key, is_new=True, facts=facts)


@dataclass(frozen=True, slots=True)
class Network:
    """A graph as the runtime has read it."""

    runtime: Any
    builder: Any
    definition: Any
    held: Any  # what must outlive it: the parser, or constants


def empty(runtime: Any) -> tuple[Any, Any, Any]:
    """Return builder, logger and an empty strongly typed network. Raises EngineError."""
    logger = runtime.Logger(runtime.Logger.ERROR)
    try:
        builder = runtime.Builder(logger)
    except TypeError as error:  # what pybind11 makes of a null pointer
        raise EngineError(f"{runtime_name(runtime)} cannot build here: check the driver with nvidia-smi") from error
    return builder, logger, builder.create_network(1 << int(runtime.NetworkDefinitionCreationFlag.STRONGLY_TYPED))


def parsed(runtime: Any, graph: bytes) -> Network:
    """Return the network of a graph: strongly typed, static shapes. Raises EngineError with what the parser says."""
    builder, logger, definition = empty(runtime)
    parser = runtime.OnnxParser(definition, logger)
    if not parser.parse(graph):
        told = "; ".join(parser.get_error(place).desc() for place in range(parser.num_errors))
        raise EngineError(f"{runtime_name(runtime)} does not understand the graph: {told}: report this")
    inputs = [definition.get_input(place) for place in range(definition.num_inputs)]
    loose = [tensor.name for tensor in inputs if -1 in tuple(tensor.shape)]
    if loose:
        raise EngineError(f"the graph leaves the size of {', '.join(loose)} open, need fixed ones: train it again")
    return Network(runtime, builder, definition, parser)


def built(network: Network, workspace_mb: int, timing_cache: Path | None = None, compute_capability: str = "") -> bytes:
    """Return the plan. Raises EngineError.

    timing_cache: file that makes the next build on this GPU quicker; what cannot be used there is left aside.
    compute_capability: of the GPU, "8.9"; "" builds for every one that the runtime takes by itself.
    """
    runtime, config = network.runtime, network.builder.create_builder_config()
    config.set_memory_pool_limit(runtime.MemoryPoolType.WORKSPACE, workspace_mb << 20)
    config.clear_flag(runtime.BuilderFlag.TF32)  # float32 is float32: ten bits are what f16 has
    if hasattr(runtime.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # RTX: without it a CUDA graph cannot hold the plan
        config.set_flag(runtime.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if hasattr(runtime, "ComputeCapability") and compute_capability in ASKED_FOR:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(runtime.ComputeCapability, ASKED_FOR[compute_capability]), 0)
    remembers = timing_cache is not None and "rtx" not in runtime.__name__  # RTX times nothing before it runs
    if remembers and timing_cache is not None:
        known = timing_cache.read_bytes() if timing_cache.is_file() else b""
        cache = config.create_timing_cache(known)
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    plan = network.builder.build_serialized_network(network.definition, config)
    if plan is None:
        raise EngineError(
            f"{runtime_name(runtime)} could not build the plan: see its messages above; with too little memory end "
            "what else uses the GPU, or raise engine.workspace_mb"
        )
    if remembers and timing_cache is not None:
        _write(timing_cache, bytes(config.get_timing_cache().serialize()))
    return bytes(plan)


def layer_counts(network: Network) -> dict[str, int]:
    """Return how many layers there are of each type and output precision: {"CONVOLUTION HALF": 38, ...}."""
    counts: Counter[str] = Counter()
    for place in range(network.definition.num_layers):
        layer = network.definition.get_layer(place)
        kind, precision = str(layer.type).rpartition(".")[2], str(layer.get_output(0).dtype).rpartition(".")[2]
        counts[f"{kind} {precision}"] += 1
    return dict(sorted(counts.items()))


def discard(folder: Path, key: PlanKey) -> None:
    """Delete a plan that the runtime does not load, whatever its digest says."""
    for suffix in (".plan", ".json"):
        (folder / f"{key.stem}{suffix}").unlink(missing_ok=True)


def _own_folder(folder: Path) -> None:
    """Make the folder. Raises EngineError unless nobody else may write there: a plan is as good as a program."""
    try:
        if not folder.is_dir():
            make_folder(folder)
            folder.chmod(0o700)
    except OSError as error:
        raise EngineError(
            f"{folder}: {error.strerror}: set engine.cache to a folder that the agent can write"
        ) from error
    _require_own(folder)


def _require_own(folder: Path) -> None:
    """Raises EngineError if others may write to the folder."""
    found = folder.stat()
    if found.st_uid not in (0, os.geteuid()):
        raise EngineError(
            f"{folder} belongs to uid {found.st_uid}, and a plan is as good as a program: run this as that user "
            "(sudo -u taktsight ...), or set engine.cache to a folder of your own"
        )
    if stat.S_IMODE(found.st_mode) & 0o022:
        raise EngineError(
            f"{folder}: others may write there, and a plan is as good as a program: chmod 700 it and delete what it "
            "holds"
        )


def _kept(folder: Path, key: PlanKey) -> Plan | None:
    """Return the plan of this key, None if there is none or it is not what was built."""
    place, sidecar = folder / f"{key.stem}.plan", folder / f"{key.stem}.json"
    try:
        fields = strict_json(sidecar.read_bytes())
        data = place.read_bytes()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("%s: cannot be used (%s): it is compiled anew", place, error)
        return None
    told = fields if isinstance(fields, dict) else {}
    if told.get("key") != asdict(key) or told.get("sha256") != sha256(data) or not isinstance(told.get("facts"), dict):
        log.warning("%s: damaged or changed since it was compiled: it is compiled anew", place)
        return None
    return Plan(data, key, is_new=False, facts=told["facts"])


def _keep(folder: Path, key: PlanKey, data: bytes, facts: dict[str, Any]) -> None:
    fields = {"key": asdict(key), "sha256": sha256(data), "bytes": len(data), "facts": facts}
    _write(folder / f"{key.stem}.plan", data)
    _write(folder / f"{key.stem}.json", json.dumps(fields, indent=1, sort_keys=True).encode() + b"\n")
    plans = sorted(folder.glob("*.plan"), key=lambda path: path.stat().st_mtime_ns)
    for place in plans[:-KEPT_PLANS]:
        place.unlink(missing_ok=True)
        place.with_suffix(".json").unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> None:
    """Write a file in one step. Raises EngineError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise EngineError(f"{path}: {error.strerror}: free the disk, or set engine.cache to another folder") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
