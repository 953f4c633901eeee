"""The process of a heat: it ends with the race that started it, however that ends."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path


def run_heat(command: list[str]) -> None:
    """Run a heat to its end; what it prints goes to the log beside its file, the last word of the command.

    Its input is a pipe that nobody writes to, and that ends when this process does, killed or not.
    """
    reading, writing = os.pipe()  # not inherited but as the heat's input
    try:
        with Path(command[-1]).with_suffix(".log").open("wb") as log:
            subprocess.run(command, stdin=reading, stdout=log, stderr=log, check=False)
    finally:
        os.close(reading)
        os.close(writing)


def end_with_race() -> None:
    """End this process at once when its input ends."""
    threading.Thread(target=_wait, daemon=True).start()


def _wait() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)
