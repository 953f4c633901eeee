"""The GenTL producer and the line simulator of agent/gentl for tests: built on the spot, started, told what to do."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import random
import shutil
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from node import apt_install
from numpy.typing import NDArray

from demo.line_camera import free_address

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "agent" / "gentl"
BUILD = ROOT / "build" / "gentl"
PACKAGES = ("libaravis-dev", "libusb-1.0-0-dev", "gcc", "pkg-config", "make")
WANTED = f"the GenTL producer cannot be built: run `apt-get install {' '.join(PACKAGES)}`"


@functools.cache
def producer() -> Path:
    """Return taktsight.cti, built from source where it is not there or older; else skip, or fail on a CI machine."""
    _build("taktsight.cti", needs_aravis=True)
    return BUILD / "taktsight.cti"


@functools.cache
def linecam_program() -> Path:
    """Return the line simulator, which needs no libaravis; built, or skipped, as the producer is."""
    _build("linecam", needs_aravis=False)
    return BUILD / "linecam"


def _build(target: str, *, needs_aravis: bool) -> None:
    if not _tools_are_there(needs_aravis):
        apt_install(*PACKAGES)
    if not _tools_are_there(needs_aravis):
        if os.environ.get("CI") == "true":
            pytest.fail(WANTED)
        pytest.skip(WANTED)
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / ".lock").open("w") as lock:  # another test run may build the same
        fcntl.flock(lock, fcntl.LOCK_EX)
        built = subprocess.run(
            ["make", "-C", str(SOURCES), f"BUILD={BUILD}", str(BUILD / target)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert built.returncode == 0, built.stdout + built.stderr


def _tools_are_there(needs_aravis: bool) -> bool:
    if not all(shutil.which(tool) for tool in ("make", "gcc", "pkg-config")):
        return False
    return not needs_aravis or subprocess.run(["pkg-config", "--exists", "aravis-0.8"], check=False).returncode == 0


def write_picture(path: Path, pixels: NDArray[np.uint8] | NDArray[np.uint16], maximum: int | None = None) -> None:
    """Write (H, W) gray as PGM or (H, W, 3) RGB as PPM; maximum: the brightest level, of the type if not given."""
    magic = b"P5" if pixels.ndim == 2 else b"P6"
    height, width = pixels.shape[:2]
    level = maximum or int(np.iinfo(pixels.dtype).max)
    data = pixels.astype(">u2" if level > 255 else np.uint8).tobytes()
    path.write_bytes(magic + b"\n%d %d\n%d\n" % (width, height, level) + data)


class Wire:
    """A network cable of our own, with the far end in a network namespace: pull it out, plug it in. Needs root."""

    def __init__(self) -> None:
        self.far_address = f"10.{random.Random().randrange(200, 250)}.{os.getpid() % 256}.2"
        self._near_address = self.far_address[:-1] + "1"
        self._name = f"gtl{os.getpid() % 100000}"
        self.at_far_end = ("ip", "netns", "exec", self._name)

    def pull(self) -> None:
        """Pull the cable out."""
        assert self._ip("link", "set", f"{self._name}a", "down")

    def plug(self) -> None:
        """Plug it in again."""
        assert self._ip("link", "set", f"{self._name}a", "up")

    def __enter__(self) -> Wire:
        near, far = f"{self._name}a", f"{self._name}b"
        steps = (
            ("netns", "add", self._name),
            ("link", "add", near, "type", "veth", "peer", "name", far, "netns", self._name),
            ("addr", "add", f"{self._near_address}/24", "dev", near),
            ("link", "set", near, "up"),
            ("-n", self._name, "addr", "add", f"{self.far_address}/24", "dev", far),
            ("-n", self._name, "link", "set", far, "up"),
        )
        if shutil.which("ip") is None or os.geteuid() != 0 or not all(self._ip(*step) for step in steps):
            self.__exit__()
            pytest.skip("no network namespace can be made here: needs root and the package iproute2")
        return self

    def __exit__(self, *_: object) -> None:
        if shutil.which("ip") is not None:
            self._ip("link", "del", f"{self._name}a")
            self._ip("netns", "del", self._name)

    @staticmethod
    def _ip(*arguments: str) -> bool:
        done = subprocess.run(
            ["ip", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=10,
            check=False,
        )
        return done.returncode == 0


class Linecam:
    """One camera as a process; kill it, start it again, tell it what happens at the line."""

    def __init__(
        self,
        images: Path,
        *options: str,
        serial: str | None = None,
        address: str | None = None,
        wire: Wire | None = None,
    ) -> None:
        """images: a folder of PGM and PPM files, or a list of them; options: as `linecam --help` has them.

        wire: the camera is at its far end; otherwise it is at a loopback address.
        """
        self._wire = wire
        self.address = wire.far_address if wire is not None else address or free_address()
        self.serial = serial or "T" + self.address.replace(".", "")
        self._options = ("--images", str(images), "--serial", self.serial, "--interface", self.address, *options)
        self._process: subprocess.Popen[bytes] | None = None
        self._command_port = 0

    @property
    def pid(self) -> int:
        """The process that is the camera."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> Linecam:
        """Start the camera and wait until it answers."""
        self._command_port = random.Random().randrange(20000, 60000)  # nobody else has this address
        self._process = subprocess.Popen(
            [
                *(() if self._wire is None else self._wire.at_far_end),
                str(linecam_program()),
                *self._options,
                "--command-port",
                str(self._command_port),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline_s = time.monotonic() + 10
        while True:
            try:
                self.command("status", timeout_s=0.2)
            except OSError:
                assert self._process.poll() is None, f"linecam ended at once: {' '.join(self._options)}"
                assert time.monotonic() < deadline_s, "linecam does not answer"
                time.sleep(0.02)
            else:
                return self

    def command(self, text: str, timeout_s: float = 5.0) -> str:
        """Return the answer to a command; `help` lists them. Raises OSError if none comes."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.settimeout(timeout_s)
            client.connect((self.address, self._command_port))
            client.send(text.encode())
            return client.recv(4096).decode()

    def tell(self, text: str) -> None:
        """Give a command that must work."""
        answer = self.command(text)
        assert answer == "ok", f"{text}: {answer}"

    def status(self) -> dict[str, str]:
        """Return what the camera has done: frame_id, triggers, line1, missed, acquiring, controller, outputs."""
        return dict(pair.split("=", 1) for pair in self.command("status").split())

    def kill(self) -> None:
        """End it as a power cut would; does nothing if it does not run."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(timeout=5)
            self._process = None

    def __enter__(self) -> Linecam:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()


class Library:
    """taktsight.cti function by function, for what no client would do: bad handles, wrong orders, small buffers."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(producer()))
        self.system = ctypes.c_void_p()
        self.interface = ctypes.c_void_p()

    def __call__(self, function: str, *arguments: object) -> int:
        """Return the GenTL code of a call."""
        return int(getattr(self._library, function)(*arguments))

    def must(self, function: str, *arguments: object) -> None:
        """Call what must succeed."""
        code = self(function, *arguments)
        assert code == 0, f"{function}: {code} {self.last_error()}"

    def last_error(self) -> str:
        """Return the text of the last failure in this thread."""
        size, code, text = ctypes.c_size_t(2048), ctypes.c_int32(), ctypes.create_string_buffer(2048)
        assert self("GCGetLastError", ctypes.byref(code), text, ctypes.byref(size)) == 0
        return text.value.decode()

    def open_device(self, serial: str) -> ctypes.c_void_p:
        """Return the camera with this serial number, open for control."""
        self.must("TLOpen", ctypes.byref(self.system))
        self.must("TLOpenInterface", self.system, b"taktsight-network", ctypes.byref(self.interface))
        self.must("IFUpdateDeviceList", self.interface, None, ctypes.c_uint64(1000))
        device = ctypes.c_void_p()
        self.must("IFOpenDevice", self.interface, f"taktsight-linecam-{serial}".encode(), 3, ctypes.byref(device))
        return device

    def open_stream(self, device: ctypes.c_void_p) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
        """Return the data stream of a camera and its new-buffer event."""
        stream, event = ctypes.c_void_p(), ctypes.c_void_p()
        self.must("DevOpenDataStream", device, b"stream0", ctypes.byref(stream))
        self.must("GCRegisterEvent", stream, 1, ctypes.byref(event))
        return stream, event

    def __enter__(self) -> Library:
        self.must("GCInitLib")
        return self

    def __exit__(self, *_: object) -> None:
        self.must("GCCloseLib")
