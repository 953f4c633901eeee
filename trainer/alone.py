"""One run at a time: a hidden file beside what it writes, locked until the run ends and then taken away.

A run that is killed leaves the file behind; it keeps nobody out.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from calibration.errors import InputError


@contextmanager
def alone(lock: Path, refusal: str, advice: str) -> Iterator[None]:
    """Keep every other run out that asks for the same lock, until the block ends.

    Raises InputError with refusal and advice where another run is at work, and where the file cannot be made.
    """
    handle = _locked(lock, refusal, advice)
    try:
        yield
    finally:
        with suppress(OSError):
            lock.unlink()  # while it is locked: whoever opened it meanwhile sees that it is gone
        os.close(handle)


def lock_of(recipe: Path) -> Path:
    """Return where the run that makes this recipe keeps others out."""
    return recipe.with_name(f".{recipe.name}.lock")


def _locked(lock: Path, refusal: str, advice: str) -> int:
    while True:
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise InputError(f"{lock}: {error.strerror}: give a folder that can be written") from error
        try:
            if _held(handle, lock):
                _write_process(handle, lock)
                return handle
        except BlockingIOError as error:
            process = os.pread(handle, 20, 0).decode(errors="replace")
            os.close(handle)
            known = f" (process {process})" if process else ""
            raise InputError(f"{refusal}{known}: {advice}") from error
        os.close(handle)


def _held(handle: int, lock: Path) -> bool:
    """Return whether the file that was just locked is still the one that others find. Raises BlockingIOError."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # a file system without locks keeps nobody out
        return True
    try:
        return os.path.samestat(os.fstat(handle), lock.stat())
    except FileNotFoundError:
        return False


def _write_process(handle: int, lock: Path) -> None:
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
    except OSError as error:
        os.close(handle)
        raise InputError(f"{lock}: {error.strerror}: give a folder that can be written") from error
