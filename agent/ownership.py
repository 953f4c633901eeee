"""What root does in a station's folders must stay usable for the agent, which runs as another user."""

from __future__ import annotations

import os
from pathlib import Path


def make_folder(folder: Path) -> None:
    """Make a folder and those above it where they are missing; they belong to whom the first one above belongs."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        give_to_owner_of(folder.parent, folder)


def give_to_owner_of(folder: Path, path: Path | int) -> None:
    """Give a path or an open file that root made to the owner of a folder; for everybody else, do nothing."""
    if os.geteuid() == 0:
        owner = folder.stat()
        os.chown(path, owner.st_uid, owner.st_gid)
