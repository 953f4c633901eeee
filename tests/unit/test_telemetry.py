"""What a plant runs is told to nobody outside."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from recipes import tiny_recipe

from agent.engines.engine import EngineSettings, open_engine

PROJECT = Path(__file__).parents[2]
OPENVINO = """
import sys
from recipes import tiny_recipe
from agent.engines.engine import EngineSettings, open_engine
open_engine(tiny_recipe(), EngineSettings("openvino"))
print(*sorted(name for name, module in sys.modules.items() if name.startswith("openvino_telemetry") and module))
"""


def test_onnxruntime_is_told_to_keep_still_before_a_graph_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    order: list[str] = []
    load = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "disable_telemetry_events", lambda: order.append("still"))
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **k: (order.append("loaded"), load(*a, **k))[1])
    open_engine(tiny_recipe(), EngineSettings("onnxruntime"))
    assert order == ["still", "loaded"]


def test_openvino_runs_without_the_telemetry_that_it_brings(tmp_path: Path) -> None:
    """Left alone, `import openvino` makes a client id below HOME and sends an event, without a question."""
    environment = {name: value for name, value in os.environ.items() if name != "CI"}  # it keeps still there
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join((str(PROJECT), str(PROJECT / "tests")))}
    command = [sys.executable, "-c", OPENVINO]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
    assert list(tmp_path.iterdir()) == []
