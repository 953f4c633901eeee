"""NVIDIA GPUs: kernel module, driver library, TensorRT. None is no fault, unless the station asks for one."""

from __future__ import annotations

import re
from collections.abc import Iterator

from agent.doctor.finding import Finding, fail, ok, warn
from agent.doctor.machine import Case, Machine, text_of, version_of

NEEDS_GPU = ("tensorrt",)  # kinds of engines
NVIDIA, DISPLAY = "0x10de", "0x03"  # PCI: vendor, class

_MODULE = re.compile(r"Kernel Module(?: for \S+)?\s+([\d.]+)")


def gpu(machine: Machine) -> Iterator[Finding]:
    """Yield which GPU, driver and CUDA there are, and whether they fit together."""
    module, library = _module(machine), machine.cuda_driver()
    if module is None and library is None:
        if _on_the_bus(machine):
            yield warn(
                "gpu",
                "an NVIDIA GPU without its driver",
                "a driver, where the GPU is to be used",
                "install the driver of the distribution, then restart the machine",
            )
        else:
            yield ok("gpu", "none")
    elif module is None or library is None:
        missing = "the kernel module is not loaded" if module is None else "libcuda.so.1 is not found"
        yield warn(
            "gpu",
            missing,
            "kernel module and library of one driver",
            "after an update of driver or kernel: restart the machine; in a container: start it with the GPU's devices",
        )
    else:
        yield ok("gpu", f"{_models(machine)}, driver {module}, CUDA up to {library[0]}.{library[1]}, {_tensorrt()}")


def station_gpu(case: Case) -> Iterator[Finding]:
    """Yield whether a station whose engine runs on a GPU has one."""
    machine, engine = case.machine, case.station.engine
    if engine.kind not in NEEDS_GPU:
        return
    lacking = []
    if _module(machine) is None or machine.cuda_driver() is None:
        lacking.append("no working NVIDIA driver")
    missing = [name for name in (engine.runtime, "pycuda") if version_of(name) is None]
    if missing:
        names = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
        lacking.append(" and ".join(names.get(name, name) for name in missing) + " not installed")
    if not lacking:
        yield ok("engine.gpu", f"{_models(machine)} for {engine.kind}")
        return
    yield (warn if engine.fallback else fail)(
        "engine.gpu",
        "; ".join(lacking) + ("; a CPU engine stands in" if engine.fallback else ""),
        f"what engine.kind: {engine.kind} runs on",
        "install the driver, the runtime and pycuda (docs/engines.md), or set engine.kind: auto",
    )


def _module(machine: Machine) -> str | None:
    found = _MODULE.search(machine.text("proc/driver/nvidia/version") or "")
    return found[1] if found else None


def _models(machine: Machine) -> str:
    """Return the names of the GPUs; a Jetson's has none there."""
    texts = [text_of(path) or "" for path in sorted(machine.at("proc/driver/nvidia/gpus").glob("*/information"))]
    found = [model[1].strip() for text in texts if (model := re.search(r"Model:\s*(.+)", text))]
    return ", ".join(found) or "an NVIDIA GPU"


def _on_the_bus(machine: Machine) -> bool:
    for vendor in machine.at("sys/bus/pci/devices").glob("*/vendor"):
        if text_of(vendor) == NVIDIA and (text_of(vendor.with_name("class")) or "").startswith(DISPLAY):
            return True
    return False


def _tensorrt() -> str:
    found = version_of("tensorrt")
    return "TensorRT not installed" if found is None else f"TensorRT {found}"
