"""The agent, with an engine that hangs as long as the file `hang` lies in the state folder."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from agent.__main__ import main
from agent.engines import engine
from agent.engines.onnx import OnnxRuntimeEngine

HANG = Path(os.environ.get("STATE_DIRECTORY", "/nonexistent")) / "hang"


class HangingEngine(OnnxRuntimeEngine):
    """ONNX Runtime whose driver never comes back while it hangs; other threads go on."""

    def infer(self, batch: Any) -> Any:
        while HANG.exists():
            time.sleep(0.01)
        return super().infer(batch)


engine.ENGINES["onnxruntime"] = HangingEngine

if __name__ == "__main__":
    main()
