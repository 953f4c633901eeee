"""What the scripts of this folder share: where things lie, what the lock files hold, how a program is run."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
BUILD, DIST, LOCKS = PROJECT / "build", PROJECT / "dist", PROJECT / "locks"
NAME = "taktsight"
VERSION: str = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
ENGINES = {"openvino": ("x86_64",), "onnxruntime": ("x86_64", "aarch64")}  # for which machines its wheels exist
EPOCH_1980_S = 315532800  # the oldest time that a zip file can hold
LOCKED = re.compile(r"^(?P<name>[a-z0-9-]+)==(?P<version>\S+?)(?: ;.*?)? \\\n(?P<hashes>(?:    --hash=.*\n)+)", re.M)


def lock_of(engine: str) -> Path:
    """Return the lock file of an agent with this engine."""
    return LOCKS / f"agent-{engine}.txt"


def stem(engine: str, machine: str = "") -> str:
    """Return how the files of a release are called, without suffix."""
    return "-".join(part for part in (NAME, VERSION, engine, machine) if part)


def locked(lock: Path) -> Iterator[re.Match[str]]:
    """Yield the packages of a lock file: `name`, `version`, and their `hashes` as pip wants them."""
    yield from LOCKED.finditer(lock.read_text(encoding="utf-8"))


def run(*command: str | Path, **environment: str) -> None:
    """Run a program below the project's root; what it prints is seen, and its failure ends the script."""
    epoch_s = os.environ.get("SOURCE_DATE_EPOCH") or str(commit_time_s())
    variables = {**os.environ, "SOURCE_DATE_EPOCH": epoch_s, **environment}
    try:
        subprocess.run([str(word) for word in command], cwd=PROJECT, env=variables, check=True)
    except subprocess.CalledProcessError as error:
        sys.exit(f"ended with {error.returncode}: {' '.join(map(str, command))}")


def our_wheel(folder: Path) -> Path:
    """Return the wheel of this project, freshly built into a folder."""
    shutil.rmtree(BUILD / "lib", ignore_errors=True)  # setuptools would pack what was deleted since
    for old in folder.glob(f"{NAME}-*.whl"):
        old.unlink()
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, ".")
    (wheel,) = folder.glob(f"{NAME}-*.whl")
    return wheel


def commit_time_s() -> int:
    """Return the time of the last commit: the same sources make the same archive; 1980 outside a clone."""
    command = ["git", "log", "-1", "--format=%ct"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 and done.stdout.strip() else EPOCH_1980_S


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
