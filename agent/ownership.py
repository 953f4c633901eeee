"""What root does in the agent's folders: the agent can use it afterwards, and cannot turn it against root.

Whoever owns a folder may put a link under any name in it, at any moment. So a folder is opened once and files are made
in what was opened, never through a link; an owner is given to an open file, never to a name.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ANEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL


@contextmanager
def opened_folder(path: Path | str, above: int | None = None) -> Iterator[int]:
    """Yield a folder, opened. above: the open folder that it lies in; then it may not be a link. Raises OSError."""
    no_link = 0 if above is None else os.O_NOFOLLOW
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | no_link, dir_fd=above)
    try:
        yield handle
    finally:
        os.close(handle)


def open_in(folder: int, name: str, flags: int) -> int:
    """Return a file of an open folder, opened, and the folder's owner's if root made it. Raises OSError for a link."""
    handle = os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=folder)
    try:
        give_to_owner_of(folder, handle)
    except BaseException:
        os.close(handle)
        raise
    return handle


def put(folder: int, name: str, data: bytes) -> None:
    """Write a file in an open folder and let it take its place once it is on the disk. Raises OSError."""
    temporary = f".{name}.{os.getpid()}.tmp"
    with suppress(FileNotFoundError):  # of one that was cut off, or somebody's link
        os.unlink(temporary, dir_fd=folder)
    try:
        with os.fdopen(open_in(folder, temporary, ANEW), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
        os.fsync(folder)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=folder)


def make_folder(path: Path) -> None:
    """Make a folder and those above it where they are missing; they belong to whom the first one above belongs."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with opened_folder(path.parent) as above:
        try:
            os.mkdir(path.name, dir_fd=above)
        except FileExistsError:
            if not path.is_dir():  # somebody else made it just now
                raise
            return
        with opened_folder(path.name, above) as made:
            give_to_owner_of(above, made)


def give_to_owner_of(folder: int, file: int) -> None:
    """Give an open file or folder of root's to the owner of an open folder; for everybody else, do nothing.

    Raises OSError for a file that has another name elsewhere: root did not make it here.
    """
    owner, found = os.fstat(folder), os.fstat(file)
    wanted = owner.st_uid, owner.st_gid
    if os.geteuid() != 0 or found.st_uid != 0 or (found.st_uid, found.st_gid) == wanted:
        return
    if stat.S_ISREG(found.st_mode) and found.st_nlink > 1:
        raise OSError(errno.EMLINK, os.strerror(errno.EMLINK))
    os.fchown(file, *wanted)
