"""What a figure was measured on: every benchmark prints it first."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

PACKAGES = ("taktsight", "torch", "onnxruntime", "openvino", "opencv-python-headless", "numpy")


def describe() -> str:
    """Return processor, cores, system and versions, one line each."""
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0))
    return (
        f"machine: {_processor()}, {cores} cores, Python {platform.python_version()}\nversions: {', '.join(versions)}"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()
