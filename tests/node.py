"""Programs of the node world for tests: node itself, and packages from npm in a cache outside the tree."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

WANTED = "node and npm are not installed: run `apt-get install nodejs npm`"
QUIET = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
INSTALL_S = 300


def lacking(what: str) -> None:
    """Skip the test, or fail on a CI machine, which must have everything."""
    if os.environ.get("CI") == "true":
        pytest.fail(what)
    pytest.skip(what)


def apt_install(*packages: str) -> None:
    """Install Debian packages on the spot where we may; else do nothing."""
    if os.geteuid() != 0 or not Path("/etc/debian_version").exists():
        return
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "--quiet", *command], env=environment, timeout=INSTALL_S, check=False, **QUIET)


@functools.cache
def node_program() -> str:
    """Return the path of node, installed on the spot where we may, with npm beside it."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        apt_install("nodejs", "npm")
    program = shutil.which("node")
    if program is None or shutil.which("npm") is None:
        lacking(WANTED)
    assert program is not None
    return program


@functools.cache
def node_modules(package: str) -> Path:
    """Return a node_modules folder with this package, "name@version"; from npm on first use, then from the cache."""
    node_program()
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "taktsight-tests"
    folder = caches / package.replace("/", "_")
    if not folder.exists():
        caches.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=caches) as fresh:
            options = ["--no-audit", "--no-fund", "--ignore-scripts", "--no-package-lock", "--fetch-retries=1"]
            done = subprocess.run(
                ["npm", "install", *options, "--prefix", fresh, package], timeout=INSTALL_S, check=False, **QUIET
            )
            if done.returncode != 0:
                lacking(f"npm cannot install {package}: is the registry within reach?")
            with contextlib.suppress(OSError):  # another run was faster
                Path(fresh).rename(folder)
                Path(fresh).mkdir()  # for TemporaryDirectory to remove
    return folder / "node_modules"


def start_node(script: Path, *arguments: str, package: str | None, stdout: Any) -> subprocess.Popen[bytes]:
    """Start a script (CommonJS) that requires this package, or none; what it prints goes to stdout, a file."""
    environment = {**os.environ, **({} if package is None else {"NODE_PATH": str(node_modules(package))})}
    command = [node_program(), str(script), *arguments]
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.DEVNULL
    )


def run_node(script: Path, *arguments: str, package: str | None = None, timeout_s: float = 60.0) -> Any:
    """Run such a script to its end and return the JSON that it printed."""
    with tempfile.TemporaryFile() as printed:
        process = start_node(script, *arguments, package=package, stdout=printed)
        try:
            code = process.wait(timeout_s)
        finally:
            process.kill()
            process.wait()
        printed.seek(0)
        text = printed.read().decode()
    assert code == 0, f"{script.name} ended with {code}: {text[:500]}"
    return json.loads(text)
