"""Lets torchvision import beside a torch that its compiled part was not built for (PyPI's torchvision, torch for CPU).

torchvision describes its compiled operators at import and fails where they are absent. Two are declared here; nothing
that anomalib runs in this benchmark calls them, and a call fails: they have no implementation.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

OPERATORS = ("nms", "qnms")


def declare_if_needed() -> bool:
    """Declare stand-ins if torchvision's compiled part cannot be loaded; return whether. Call before importing it."""
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("torchvision is not installed: delete the virtual environment and start again")
    compiled = next(Path(found.origin).parent.glob("_C*.so"), None)
    if compiled is not None:
        try:
            torch.ops.load_library(str(compiled))
        except OSError:
            pass
        else:
            return False
    library = torch.library.Library("torchvision", "DEF")
    for operator in OPERATORS:
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)
    return True


_kept: list[torch.library.Library] = []  # a library that is collected takes its operators with it
