"""The demo's line before a GigE Vision camera: our GenTL producer, and the line simulator that replays its parts.

The pictures are those that `camera.kind: simulated` draws, one for each trigger, in their order; what the settings call
lost or late, the camera loses or sends late.
"""

from __future__ import annotations

import random
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import cv2

from agent.simulation.line import LineSettings, SimulatedLine
from calibration.console import progress_bars

SOURCES = Path(__file__).resolve().parents[1] / "agent" / "gentl"
BUILD = Path(__file__).resolve().parents[1] / "build" / "gentl"
PACKAGES = "libaravis-dev libusb-1.0-0-dev gcc pkg-config make"
GVCP_PORT = 3956
SERIAL = "DEMO"
BLOCK = re.compile(r"^camera:\n(?:[ #].*\n|\n(?= ))*", re.MULTILINE)


def build() -> list[str]:
    """Build the producer and the line simulator where they are older than their sources; return the command.

    Ends the program, with what to install, where they cannot be built.
    """
    command = ["make", "--no-print-directory", "-C", str(SOURCES), f"BUILD={BUILD}"]
    lacking = [tool for tool in ("make", "gcc", "pkg-config") if shutil.which(tool) is None]
    if not lacking and subprocess.run(["pkg-config", "--exists", "aravis-0.8"], check=False).returncode != 0:
        lacking = ["libaravis 0.8"]
    if lacking:
        sys.exit(f"{', '.join(lacking)} not found, the GenTL producer is built with it: apt-get install {PACKAGES}")
    built = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if built.returncode != 0:
        sys.exit(f"the GenTL producer cannot be built:\n{built.stdout}{built.stderr}")
    return command


class LineCamera:
    """A camera that sees the first `count` parts of a simulated line, as a process beside us. A context manager."""

    def __init__(self, settings: LineSettings, count: int, folder: Path) -> None:
        """Draw the parts into the folder."""
        folder.mkdir(parents=True)
        line = SimulatedLine(settings)
        with progress_bars() as progress:
            for trigger_id in range(1, count + 1):
                pixels, _ = line.render(line.plan(trigger_id))
                cv2.imwrite(str(folder / f"{trigger_id:06d}.pgm"), pixels)
                progress("pictures", trigger_id, count)
        self.command = [
            *(str(BUILD / "linecam"), "--interface", free_address(), "--serial", SERIAL, "--images", str(folder)),
            *(("--drop", ",".join(map(str, settings.lost))) if settings.lost else ()),
            *(
                ("--late", ",".join(map(str, settings.late)), "--late-ms", f"{settings.late_ms:g}")
                if settings.late
                else ()
            ),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> LineCamera:
        self._process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        if not self._process.stdout.readline().startswith(b"ready"):
            sys.exit("the line simulator did not start")
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            with self._process:
                self._process.terminate()


def before_the_camera(station: str) -> str:
    """Return the text of a station.yaml with this camera in the place of its own."""
    block = (
        "camera:\n"
        "  kind: genicam\n"
        f"  producer: {BUILD / 'taktsight.cti'}\n"
        f"  serial: {SERIAL}\n"
        "  pixel_format: Mono8\n"
        "  trigger: {source: Software}  # the agent triggers, every takt_ms\n"
    )
    changed, count = BLOCK.subn(lambda _: block, station)
    assert count == 1, "one block `camera:` is wanted"
    return changed


def free_address() -> str:
    """Return a loopback address without a camera: GigE Vision has one port, so one camera has all of an address."""
    for _ in range(100):
        address = f"127.{random.randrange(1, 250)}.{random.randrange(256)}.{random.randrange(1, 255)}"
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.bind((address, GVCP_PORT))
            except OSError:
                continue
        return address
    sys.exit("100 loopback addresses are taken: end the line simulators that are left over")
