"""Port of the doctor: the machine as it is seen through /sys, /proc, its users, disks and programs.

A test gives a folder in the place of `/` and functions of its own in the place of the kernel's answers.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import pwd
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from agent.cameras.several import file_and_camera
from agent.clock import kernel_says_synchronized
from agent.config import Station

MOST_BYTES = 65536  # read of one file
PROGRAM_TIMEOUT_S = 3.0

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Account:
    """A user as the kernel sees it."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Disk:
    """The file system of a path."""

    free_bytes: int  # for others than root
    free_files: int | None  # None: it does not count them
    is_read_only: bool


def our_account() -> Account:
    """Return the user of this process."""
    uid = os.geteuid()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = f"uid {uid}"
    return Account(name, uid, os.getegid(), tuple(os.getgroups()))


def account_named(name: str) -> Account | None:
    """Return a user of this machine, None if there is none of this name."""
    try:
        found = pwd.getpwnam(name)
    except KeyError:
        return None
    return Account(name, found.pw_uid, found.pw_gid, tuple(os.getgrouplist(name, found.pw_gid)))


def may(account: Account, path: Path, mode: str) -> bool:
    """Return whether a user may read ("r"), write ("w") or enter ("x") a path; of others only root is told."""
    if account.uid == os.geteuid():
        return os.access(path, {"r": os.R_OK, "w": os.W_OK, "x": os.X_OK}[mode])
    done = subprocess.run(
        ["test", f"-{mode}", str(path)],
        user=account.uid,
        group=account.gid,
        extra_groups=account.groups,
        cwd="/",
        stdin=subprocess.DEVNULL,
        timeout=PROGRAM_TIMEOUT_S,
        check=False,
    )
    return done.returncode == 0


def disk_of(path: Path) -> Disk:
    """Return the file system of a path that exists. Raises OSError."""
    found = os.statvfs(path)
    files = found.f_favail if found.f_files else None
    return Disk(found.f_bavail * found.f_frsize, files, bool(found.f_flag & os.ST_RDONLY))


def program_output(command: Sequence[str]) -> str | None:
    """Return what a program prints, None if it is not there, fails, or takes longer than 3 s."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=PROGRAM_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def cuda_driver_version() -> tuple[int, int] | None:
    """Return the newest CUDA that the driver's library speaks, as (12, 4); None if there is no such library."""
    version = ctypes.c_int(0)
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else (version.value // 1000, version.value % 1000 // 10)


@dataclass(frozen=True, slots=True)
class Machine:
    """What probes look at, and nothing else."""

    root: Path = Path("/")
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    processor: str = platform.machine()
    user: Account = field(default_factory=our_account)
    account_named: Callable[[str], Account | None] = account_named
    may: Callable[[Account, Path, str], bool] = may
    disk_of: Callable[[Path], Disk] = disk_of
    run: Callable[[Sequence[str]], str | None] = program_output
    limit: Callable[[int], tuple[int, int]] = resource.getrlimit
    is_synchronized: Callable[[], bool | None] = kernel_says_synchronized
    cuda_driver: Callable[[], tuple[int, int] | None] = cuda_driver_version
    now_utc: Callable[[], datetime] = lambda: datetime.now(UTC)

    def at(self, path: str) -> Path:
        """Return a path below the root."""
        return self.root / path

    def text(self, path: str) -> str | None:
        """Return what a small file below the root says, stripped; None if it cannot be read."""
        return text_of(self.at(path))

    def whole(self, path: str) -> int | None:
        """Return the whole number in a file below the root; None if there is none."""
        return whole_of(self.at(path))


@dataclass(frozen=True, slots=True)
class Case:
    """One station on one machine."""

    machine: Machine
    station: Station
    file: Path

    @property
    def unit(self) -> str | None:
        """Name of the systemd unit that runs this file, None where none does."""
        machine, file = self.machine, file_and_camera(self.file)[0]
        is_ours = file.suffix == ".yaml" and file.absolute().parent == machine.at("etc/taktsight").absolute()
        return f"taktsight-agent@{file.stem}.service" if is_ours else None

    def unit_facts(self) -> dict[str, str]:
        """Return what systemd knows of the unit, empty where there is no systemd or no unit."""
        if self.unit is None or not self.machine.at("run/systemd/system").is_dir():
            return {}
        wanted = (
            "LoadState,ActiveState,SubState,Result,NRestarts,UnitFileState,WatchdogUSec,User,ProtectSystem,"
            "StateDirectory,CacheDirectory,ReadWritePaths,LimitRTPRIO,LimitMEMLOCK,RestrictRealtime"
        )
        said = self.machine.run(["systemctl", "show", self.unit, f"--property={wanted}"]) or ""
        facts = dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
        return facts if facts.get("LoadState") == "loaded" else {}

    def account(self) -> Account:
        """Return the user that the agent runs as: that of its unit; without one, ours or, if we are root, its own."""
        user, facts = self.machine.user, self.unit_facts()
        if user.uid != 0 and not facts:
            return user
        return self.machine.account_named(facts.get("User") or "taktsight") or user

    def can_ask_for(self, account: Account) -> bool:
        """Return whether we are told what a user may do: the kernel tells us of ourselves and, if we are root, all."""
        return self.machine.user.uid in (0, account.uid)


def text_of(path: Path) -> str | None:
    """Return what a small file says, stripped; None if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(MOST_BYTES).decode(errors="replace").strip()
    except OSError:
        return None


def whole_of(path: Path) -> int | None:
    """Return the whole number in a file; None if there is none."""
    try:
        return int(text_of(path) or "")
    except ValueError:
        return None


def version_of(name: str) -> str | None:
    """Return the version of an installed distribution, None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def within(timeout_s: float, call: Callable[[], Answer]) -> Answer:
    """Return what a call returns, in a thread of its own. Raises what it raises, TimeoutError if it hangs."""
    answers: list[Answer] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(call())
        except BaseException as error:  # noqa: BLE001 handed over to who asked
            errors.append(error)

    thread = threading.Thread(target=run, name="taktsight-doctor", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError(f"no answer within {timeout_s:g} s")
    return answers[0]
