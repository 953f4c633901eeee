"""What the doctor looks at alike for the gate and for the trigger: packages, and the chip that has a pin."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from agent.doctor.finding import Finding, fail, ok
from agent.doctor.machine import version_of


def lacking(topic: str, package: str, extra: str) -> Iterator[Finding]:
    """Yield a finding where the package of an extra is not installed."""
    if not version_of(package):
        yield fail(topic, f"{package} is not installed", package, f"pip install 'taktsight[{extra}]'")


def pin(topic: str, chip: Path, line: int) -> Iterator[Finding]:
    """Yield whether the chip that has this line is there and ours to use; the line is not touched."""
    if not chip.is_char_device():
        yield fail(
            topic,
            f"{chip}: no such device",
            "the chip that has the line",
            f"name it in {topic}.chip (gpiodetect lists them); a unit lets it through by the drop-in of docs/output.md",
        )
    elif not os.access(chip, os.R_OK | os.W_OK):
        yield fail(topic, f"{chip}: not ours to use", "read and write", "give the user the chip's group")
    else:
        yield ok(topic, f"{chip} line {line} not touched: gpioinfo tells whether it is free")
