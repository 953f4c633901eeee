"""The programs that run in the deadline benchmark: the broker, the MES's side, the hogs; and what the agent uses."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from deadline_figures import Sample

from agent.health.health import memory_bytes

TOPIC = "acme/plant1/hall2/line3/cell7"
PATIENCE_S = 120.0  # for an agent to start, to end, and for the MES to have it all
HOG = "while True: pass"


def sampled(pid: int) -> list[Sample]:
    """Return the two processes' memory and time, or nothing where one of them is not there."""
    try:
        publish = next(child for thread in Path(f"/proc/{pid}/task").iterdir() for child in children_of(thread))
        cpu_s = cpu_seconds(pid) + cpu_seconds(publish)
        whole = [memory_bytes(one) / 2**20 for one in (pid, publish)]
        own = [own_mib(one) for one in (pid, publish)]
    except (OSError, StopIteration, IndexError):  # IndexError: it ended, and has no memory any more
        return []
    return [Sample(time.monotonic(), *whole, *own, cpu_s)]


def children_of(thread: Path) -> list[int]:
    """Return the processes that a thread started."""
    return [int(child) for child in (thread / "children").read_text(encoding="ascii").split()]


def own_mib(pid: int) -> float:
    """Return how much memory a process shares with nobody: no files, not the ring between the two."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


def cpu_seconds(pid: int) -> float:
    """Return how long a process has kept cores busy."""
    after_name = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


def size_of(path: Path) -> int:
    """Return how long a file is; 0 where it is not there yet."""
    return path.stat().st_size if path.exists() else 0


@contextmanager
def broker(folder: Path) -> Iterator[int]:
    """Run mosquitto on a free loopback port; yield the port once it listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    settings = f"listener {port} 127.0.0.1\nallow_anonymous true\nset_tcp_nodelay true\nlog_dest none\n"
    (folder / "mosquitto.conf").write_text(settings)
    with running(["mosquitto", "-c", str(folder / "mosquitto.conf")], folder / "mosquitto.log"):
        give_up_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < give_up_s:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield port


@contextmanager
def subscriber(folder: Path, port: int, count: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run the MES's side: it ends when it has so many parts."""
    command = [str(Path(sys.executable).parent / "taktsight-subscribe"), "run", TOPIC, "--consumer", "mes"]
    command += ["--store", str(folder / "mes.sqlite"), "--port", str(port), "--count", str(count)]
    with running(command, folder / "mes.log") as process:
        yield process


@contextmanager
def hogs() -> Iterator[None]:
    """Keep every core busy."""
    with ExitStack() as stack:
        for _ in os.sched_getaffinity(0):
            stack.enter_context(running([sys.executable, "-c", HOG], Path(os.devnull)))
        yield


@contextmanager
def running(command: list[str], log_file: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program beside us, and end it at the end."""
    with log_file.open("w") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def ended_with(process: subprocess.Popen[bytes], log_file: Path) -> None:
    """Wait for the end of a program; give up on one that fails."""
    try:
        code: int | None = process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        code = None
    if code != 0:
        tail = log_file.read_text(encoding="utf-8")[-3000:]
        raise SystemExit(f"{tail}\n{log_file}: exit code {code}, wanted 0: see above")
