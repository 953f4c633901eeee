"""A real PostgreSQL server for tests, on a free port of the loopback interface, owned by an unprivileged user."""

from __future__ import annotations

import functools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.broker import free_port, wait_until

WANTED = "PostgreSQL is not installed: run `apt-get install postgresql`"
QUIET = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


@functools.cache
def postgres_programs() -> Path:
    """Return the folder of initdb and postgres, installed on the spot where we may; else skip, or fail on CI."""
    folder = _find_programs()
    if folder is None and os.geteuid() == 0 and Path("/etc/debian_version").exists():
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "--yes", "--no-install-recommends", "postgresql"]):
            subprocess.run(["apt-get", "--quiet", *command], env=environment, timeout=300, check=False, **QUIET)
        folder = _find_programs()
    if folder is None and os.environ.get("CI") == "true":
        pytest.fail(WANTED)
    if folder is None:
        pytest.skip(WANTED)
    return folder


def _find_programs() -> Path | None:
    found = [path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb")]
    on_path = shutil.which("initdb")
    return max(found, default=Path(on_path).parent if on_path else None, key=str)


class Postgres:
    """One server with its files in a folder of its own; kill, freeze and start it as the test likes."""

    def __init__(self) -> None:
        self.port = free_port()
        self._programs = postgres_programs()
        self._folder = Path(tempfile.mkdtemp(prefix="taktsight-postgres-"))
        self._user = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}
        self._process: subprocess.Popen[bytes] | None = None
        if self._user:
            owner = pwd.getpwnam("postgres")
            os.chown(self._folder, owner.pw_uid, owner.pw_gid)
        command = [self._programs / "initdb", "-D", self._folder / "data", "-U", "mes", "-A", "trust", "-E", "UTF8"]
        command += ["--no-sync", "--locale=C"]
        subprocess.run(command, check=True, timeout=60, cwd="/", **self._user, **QUIET)

    def url(self, schema: str = "public") -> str:
        """Return the connection string."""
        return f"postgresql://mes@127.0.0.1:{self.port}/postgres?options=-csearch_path%3D{schema}"

    def start(self) -> Postgres:
        """Start the server and wait until it answers."""
        settings = {
            "port": self.port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "fsync": "off",
            "restart_after_crash": "off",
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        command = [self._programs / "postgres", "-D", self._folder / "data", *options]
        self._process = subprocess.Popen(command, cwd="/", **self._user, **QUIET)
        wait_until(self._answers, timeout_s=20.0)
        return self

    def kill(self) -> None:
        """End it at once; what it had committed is there again after the next start."""
        self._end(signal.SIGQUIT)  # SIGKILL would leave its shared memory behind

    def remove(self) -> None:
        """End it and remove its files."""
        self._end(signal.SIGQUIT)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _answers(self) -> bool:
        assert self._process is not None and self._process.poll() is None, "postgres ended at once"
        probe = [self._programs / "pg_isready", "-h", "127.0.0.1", "-p", str(self.port)]
        return subprocess.run(probe, check=False, timeout=10, **QUIET).returncode == 0

    def _end(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)
            self._process.wait(timeout=10)
