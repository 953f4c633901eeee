"""A recipe on its way into a store: a copy that nobody else writes while it is checked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from agent.errors import StorageError
from agent.ownership import ANEW, give_to_owner_of, open_in, opened_folder
from calibration.errors import InputError, RecipeError
from calibration.recipe_file import MAX_BYTES, open_file

STAGING, INCOMING = ".staging", "incoming.recipe"


@dataclass(frozen=True, slots=True)
class Staged:
    """The copy."""

    path: Path  # to read it
    store: int  # the store's folder, open
    staging: int  # the folder in it where the copy lies, open

    def take_in(self, file_name: str) -> None:
        """Let it lie in the store under this name, on the disk. Raises OSError."""
        os.replace(INCOMING, file_name, src_dir_fd=self.staging, dst_dir_fd=self.store)
        os.fsync(self.store)


@contextmanager
def staged(folder: Path, source: Path) -> Iterator[Staged]:
    """Yield a copy of a file, in a store's folder; whatever is left of it in the end goes.

    Raises InputError if the source is no file, or larger than any recipe; StorageError, OSError. A RecipeError that is
    raised about the copy names the source.
    """
    with ExitStack() as opened:
        store = opened.enter_context(opened_folder(folder))
        with suppress(FileExistsError):
            os.mkdir(STAGING, mode=0o700, dir_fd=store)
        try:
            staging = opened.enter_context(opened_folder(STAGING, store))
        except OSError as error:
            raise StorageError(f"{folder / STAGING}: {error.strerror}: not a folder of our own: remove it") from error
        give_to_owner_of(store, staging)
        for left in list(os.scandir(staging)):  # of an earlier attempt that was cut off
            os.unlink(left.name, dir_fd=staging)
        copy = Staged(folder / STAGING / INCOMING, store, staging)
        try:
            _copy(source, staging)
            yield copy
        except RecipeError as error:
            raise RecipeError(str(error).replace(str(copy.path), str(source))) from error
        finally:
            with suppress(FileNotFoundError):
                os.unlink(INCOMING, dir_fd=staging)


def _copy(source: Path, staging: int) -> None:
    """Raises InputError if the source is no file, or larger than any recipe."""
    try:
        reader = open_file(source)
    except OSError as error:
        raise InputError(f"{source}: {error.strerror}: give the path of a recipe") from error
    with reader:
        left = os.fstat(reader.fileno()).st_size
        if left > MAX_BYTES:
            raise InputError(f"{source}: {left} bytes found, a recipe has at most {MAX_BYTES}: give another path")
        with os.fdopen(open_in(staging, INCOMING, ANEW), "wb") as writer:
            while left and (data := reader.read(min(left, 1024**2))):
                writer.write(data)
                left -= len(data)
            writer.flush()
            os.fsync(writer.fileno())
