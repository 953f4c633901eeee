"""What an installation is made of: files below a root folder, systemd's commands, and a record of what was written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from calibration.errors import TaktsightError

RECORD = Path("/etc/taktsight/installed.json")
RECORD_FORMAT = 1
COMMAND_S = 120.0  # `systemctl disable --now` waits for the agent, which has 30 s to end
FILE_MODE = 0o644


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that is done, and the line that tells of it beforehand."""

    told: str
    do: Callable[[], None] = lambda: None


@dataclass(slots=True)
class Record:
    """Which stations were installed, and the digest of each file as it was written, by its path on the machine."""

    stations: list[str] = field(default_factory=list)
    files: dict[Path, str] = field(default_factory=dict)


class Machine:
    """The machine itself, or the image of one in a folder, where nothing runs and files alone are laid."""

    def __init__(self, root: Path = Path("/")) -> None:
        """root: the machine's / as seen from here. Raises TaktsightError if there is no such folder."""
        if not root.is_dir():
            raise TaktsightError(f"--root {root}: not found: give the folder that holds the machine's /etc and /opt")
        self.root = root.resolve()
        self.is_live = self.root == Path("/")

    def inside(self, path: Path) -> Path:
        """Return where a path of the machine lies, seen from here.

        Raises TaktsightError if a link on the way leads out of the image.
        """
        place = self.root / path.relative_to("/")
        if not place.parent.resolve().is_relative_to(self.root):
            raise TaktsightError(f"{place}: leads out of {self.root}: make the link in the image a relative one")
        return place

    def exists(self, path: Path) -> bool:
        """Tell whether something lies there, a dangling link too."""
        return os.path.lexists(self.inside(path))

    def read(self, path: Path) -> str | None:
        """Return the text of a file, None if there is none; raises TaktsightError if it cannot be read."""
        try:
            return self.inside(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise TaktsightError(f"{path}: cannot be read ({error}): run it as root, a dry run too") from error

    def write(self, path: Path, text: str, mode: int = FILE_MODE, group: str | None = None) -> None:
        """Write a file in one step, with the folders above it; an unknown group leaves it to root's own."""
        place = self.inside(path)
        place.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{place.name}.", dir=place.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                os.fchmod(file.fileno(), mode)
                if group is not None and (number := self.group(group)) is not None and os.geteuid() == 0:
                    os.fchown(file.fileno(), 0, number)
                os.fsync(file.fileno())
            Path(name).replace(place)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def link(self, path: Path, target: Path) -> None:
        """Let a path be a link to another path of the machine."""
        place = self.inside(path)
        place.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        place.symlink_to(target)

    def folder(self, path: Path, mode: int) -> None:
        """Make a folder and those above it, where they are missing."""
        place = self.inside(path)
        if not place.is_dir():
            place.mkdir(parents=True)
            place.chmod(mode)

    def remove(self, path: Path) -> None:
        """Delete a file, a link or a whole folder; a link is never followed, and what is not there is fine."""
        place = self.inside(path)
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)

    def remove_empty(self, path: Path) -> None:
        """Delete a folder in which nothing lies."""
        with contextlib.suppress(OSError):
            self.inside(path).rmdir()

    def group(self, name: str) -> int | None:
        """Return the number of a group, as this machine's /etc/group has it."""
        for line in (self.read(Path("/etc/group")) or "").splitlines():
            fields = line.split(":")
            if fields[0] == name and len(fields) > 2 and fields[2].isdigit():
                return int(fields[2])
        return None


def command(*arguments: str) -> Step:
    """Return the step that runs a program; what it says when it fails is the error's text."""

    def run() -> None:
        try:
            done = subprocess.run(
                arguments, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=COMMAND_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise TaktsightError(f"{shlex.join(arguments)}: {error}: this needs a machine with systemd") from error
        if done.returncode != 0:
            raise TaktsightError(f"{shlex.join(arguments)}: ended with {done.returncode}: {done.stderr.strip()}")

    return Step(f"run     {shlex.join(arguments)}", run)


def digest(text: str) -> str:
    """Return the SHA-256 of a file's text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def read_record(machine: Machine) -> Record:
    """Return what was installed, nothing where nothing was; raises TaktsightError if the record is not one of ours."""
    text = machine.read(RECORD)
    if text is None:
        return Record()
    try:
        fields = json.loads(text)
        if fields["format"] != RECORD_FORMAT:
            raise ValueError(f"format {fields['format']}")
        files = {Path(str(path)): str(found) for path, found in fields["files"].items()}
        return Record([str(name) for name in fields["stations"]], files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TaktsightError(
            f"{RECORD}: not a record of format {RECORD_FORMAT} ({error}): delete it; what is installed then counts as "
            "written by hand"
        ) from error


def write_record(machine: Machine, record: Record) -> None:
    """Write what is installed now; where nothing is, delete the record."""
    if not record.stations:
        machine.remove(RECORD)
        return
    files = {str(path): record.files[path] for path in sorted(record.files)}
    fields = {"format": RECORD_FORMAT, "stations": record.stations, "files": files}
    machine.write(RECORD, json.dumps(fields, indent=2) + "\n")
