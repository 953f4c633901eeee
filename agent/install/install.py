"""A station as a service: the steps that make one, and those that take it away again.

All steps are worked out before the first is done, so that a dry run shows what would be done. A file that was changed
by hand is kept: see `install_steps.Record`.
"""

from __future__ import annotations

import importlib.resources
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from agent.install.steps import FILE_MODE, RECORD, Machine, Record, Step, command, digest, write_record
from agent.outbox.folder import kept_rows, outboxes
from calibration.errors import TaktsightError

PREFIX = Path("/opt/taktsight")  # stands in the unit
ETC, STATE, CACHE = Path("/etc/taktsight"), Path("/var/lib/taktsight"), Path("/var/cache/taktsight")
USER = "taktsight"  # its group is called the same
UNITS, PACKAGED_UNITS = Path("/etc/systemd/system"), Path("/usr/lib/systemd/system")
TEMPLATE = "taktsight-agent@.service"
SHARED = {  # name in systemd/: where it goes
    TEMPLATE: UNITS / TEMPLATE,
    "taktsight-compile@.service": UNITS / "taktsight-compile@.service",
    "taktsight.sysusers": Path("/etc/sysusers.d/taktsight.conf"),
    "taktsight.tmpfiles": Path("/etc/tmpfiles.d/taktsight.conf"),
}
FOLDERS = {  # as in taktsight.tmpfiles
    ETC: 0o750,
    ETC / "recipes": 0o750,
    ETC / "certificates": 0o750,
    ETC / "credentials": 0o700,
}
CAMERAS = {"gige": "gige.conf", "usb3": "usb3-vision.conf"}
GPUS = {"nvidia": "nvidia.conf"}
REALTIME = "realtime.conf"
DROP_INS = (*CAMERAS.values(), *GPUS.values(), REALTIME)
NONE = "none"
EXAMPLE, EXAMPLE_NAME = "station.example.yaml", "cell7"
SETTINGS_MODE = 0o640
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")  # a file name, an instance of a unit, a level of an MQTT topic
HIDDEN = ("/home", "/root", "/tmp", "/var/tmp", "/run/user")  # by ProtectHome= and PrivateTmp= of the unit


@dataclass(frozen=True, slots=True)
class Wish:
    """What the service of a station is to have; None leaves what it has."""

    camera: str | None = None  # of CAMERAS, or "none"
    gpu: str | None = None  # of GPUS, or "none"
    realtime: bool | None = None

    def drop_ins(self) -> dict[str, bool]:
        """Return which drop-ins are to be there and which are not; what is not named stays as it is."""
        wanted: dict[str, bool] = {}
        if self.camera is not None:
            wanted |= {name: kind == self.camera for kind, name in CAMERAS.items()}
        if self.gpu is not None:
            wanted |= {name: kind == self.gpu for kind, name in GPUS.items()}
        if self.realtime is not None:
            wanted[REALTIME] = self.realtime
        return wanted


class Installer:
    """Works out the steps for one machine."""

    def __init__(self, machine: Machine, record: Record, prefix: Path = PREFIX) -> None:
        """prefix: the agent's virtual environment, as a path of the machine."""
        self._machine = machine
        self._record = record
        self._prefix = prefix

    def install(self, station: str, wish: Wish) -> list[Step]:
        """Return what makes a station, or brings one up to date: done twice, the second time changes nothing.

        Raises TaktsightError if the name, or the place of the agent's environment, cannot be used.
        """
        if not NAME.fullmatch(station):
            raise TaktsightError(
                f"{station!r}: cannot be the name of a station: letters, digits, '_', '.' and '-', at most 63"
            )
        self._check_prefix()
        return [
            *self._program_is_there(),
            *self._shared_files(),
            *self._user_and_folders(),
            *self._settings(station),
            *self._drop_ins(station, wish),
            *self._enable(station),
            self._note(station, installed=True),
        ]

    def uninstall(self, station: str, *, purge: bool, discard: bool = False) -> list[Step]:
        """Return what takes a station away, and with the last one all that install made.

        Settings, keys and what the station wrote stay, unless purge is set; purge deletes these of a station that was
        taken away before, too. It deletes no verdict that was not delivered, unless discard is set. Raises
        TaktsightError if no such station was installed, or left anything.
        """
        if station not in self._record.stations:
            return self._purge_what_is_left(station, purge=purge, discard=discard)
        last, folder = self._record.stations == [station], drop_in_folder(station)
        own = [path for path in self._record.files if path.parent == folder]
        steps = [*self._disable(station), *self._remove(own), *self._remove_empty(folder)]
        if purge and not discard:
            steps.insert(1, self._nothing_waits(station))
        if last:
            steps += self._remove([path for path in self._record.files if path not in own])
        if self._machine.is_live:
            steps.append(command("systemctl", "daemon-reload"))
        if purge:
            steps += self._purge(station)
        return [*steps, self._note(station, installed=False)]

    def _purge_what_is_left(self, station: str, *, purge: bool, discard: bool) -> list[Step]:
        """Return what deletes the settings, keys and verdicts of a station whose service is gone already."""
        left = NAME.fullmatch(station) and any(self._machine.exists(path) for path in left_by(station))
        if not left:
            found = ", ".join(self._record.stations) or "none"
            raise TaktsightError(f"{station}: no such station was installed; found: {found}")
        if not purge:
            raise TaktsightError(
                f"{station}: its service was taken away before; what it left stays: --purge deletes that too"
            )
        steps = list(self._disable(station)) if self._machine.exists(wanted_by(station)) else []
        if not discard:
            steps.append(self._nothing_waits(station))
        return [*steps, *self._purge(station), self._note(station, installed=False)]

    def _check_prefix(self) -> None:
        if not self._prefix.is_absolute() or _is_hidden(self._prefix):
            raise TaktsightError(
                f"--prefix {self._prefix}: the service sees nothing below {', '.join(HIDDEN)}: give an absolute path "
                f"elsewhere, such as {PREFIX}"
            )

    def _program_is_there(self) -> Iterator[Step]:
        if self._machine.is_live:
            yield Step(f"check   {self._prefix}: the agent is there, where the service sees it", self._check_program)

    def _check_program(self) -> None:
        program, python = (self._prefix / "bin" / name for name in ("taktsight-agent", "python"))
        if not program.exists():
            raise TaktsightError(f"{program}: not found: install the agent there, or say where it is with --prefix")
        if _is_hidden(python.resolve()):
            raise TaktsightError(
                f"{python}: is {python.resolve()}, and the service sees nothing below {', '.join(HIDDEN)}: make "
                f"{self._prefix} with the system's own Python"
            )

    def _shared_files(self) -> Iterator[Step]:
        if self._machine.exists(PACKAGED_UNITS / TEMPLATE):
            yield Step(f"same    {PACKAGED_UNITS / TEMPLATE}: the Debian package's")
            yield from self._remove([path for path in SHARED.values() if path in self._record.files])
            return
        for name, path in SHARED.items():
            yield self._ours(path, shipped(name).replace(f"{PREFIX}/", f"{self._prefix}/"))

    def _user_and_folders(self) -> Iterator[Step]:
        programs = ("systemd-sysusers",), ("systemd-tmpfiles", "--create")
        if self._machine.is_live:
            yield from (command(*program, "taktsight.conf") for program in programs)
            return
        for path, mode in FOLDERS.items():
            if not self._machine.exists(path):
                yield Step(f"folder  {path} ({mode:04o})", partial(self._machine.folder, path, mode))
        if os.geteuid() == 0 and all(shutil.which(program) for program, *_ in programs):
            root = f"--root={self._machine.root}"
            yield from (command(*program, root, "taktsight.conf") for program in programs)
        else:
            yield Step(f"later   user {USER} and owners of folders: by systemd, when this image boots")

    def _settings(self, station: str) -> Iterator[Step]:
        path = ETC / f"{station}.yaml"
        if self._machine.exists(path):
            yield Step(f"keep    {path}: yours")
            return
        text = shipped(EXAMPLE).replace(EXAMPLE_NAME, station)
        yield Step(
            f"write   {path} ({SETTINGS_MODE:04o}, group {USER}): an example, to be edited",
            partial(self._machine.write, path, text, SETTINGS_MODE, USER),
        )

    def _drop_ins(self, station: str, wish: Wish) -> Iterator[Step]:
        wanted = wish.drop_ins()
        for name in DROP_INS:
            path = drop_in_folder(station) / name
            known = path in self._record.files
            if wanted.get(name, known):
                yield self._ours(path, shipped(f"drop-ins/{name}"))
            elif known:
                yield from self._remove([path])

    def _enable(self, station: str) -> Iterator[Step]:
        if self._machine.is_live:
            yield command("systemctl", "daemon-reload")
            yield command("systemctl", "enable", unit(station))
            return
        packaged = self._machine.exists(PACKAGED_UNITS / TEMPLATE)
        target = (PACKAGED_UNITS if packaged else UNITS) / TEMPLATE
        yield Step(f"link    {wanted_by(station)} -> {target}", partial(self._machine.link, wanted_by(station), target))

    def _disable(self, station: str) -> Iterator[Step]:
        if self._machine.is_live:
            yield command("systemctl", "disable", "--now", unit(station))
        else:
            path = wanted_by(station)
            yield Step(f"remove  {path}", partial(self._machine.remove, path))

    def _ours(self, path: Path, text: str) -> Step:
        """Return the step that lays a file of ours, unless it lies there already or was changed by hand."""

        def note() -> None:
            self._record.files[path] = digest(text)

        def write() -> None:
            self._machine.write(path, text)
            note()

        found = self._machine.read(path)
        if found == text:
            return Step(f"same    {path}", note)
        if found is None or digest(found) == self._record.files.get(path):
            return Step(f"write   {path} ({FILE_MODE:04o})", write)
        return Step(f"keep    {path}: changed by hand; to have ours, delete it and install again")

    def _remove(self, paths: Iterable[Path]) -> Iterator[Step]:
        """Yield the steps that delete files of ours; one that was changed by hand is kept, and no longer ours."""
        for path in paths:
            found = self._machine.read(path)
            if found is not None and digest(found) != self._record.files[path]:
                yield Step(f"keep    {path}: changed by hand", partial(self._forget, path))
            else:
                yield Step(f"remove  {path}", partial(self._forget, path, delete=True))

    def _forget(self, path: Path, *, delete: bool = False) -> None:
        if delete:
            self._machine.remove(path)
        self._record.files.pop(path, None)

    def _remove_empty(self, folder: Path) -> Iterator[Step]:
        if self._machine.exists(folder):
            yield Step(f"remove  {folder}, if nothing is left in it", partial(self._machine.remove_empty, folder))

    def _nothing_waits(self, station: str) -> Step:
        folder = STATE / station / "outbox"

        def check() -> None:
            place = self._machine.inside(folder)
            number = sum(1 for one in outboxes(place) for _ in kept_rows(one))
            if number:
                raise TaktsightError(
                    f"{folder}: {number} messages wait or are in quarantine, nothing was deleted: export them with "
                    f"`taktsight-agent outbox {ETC / station}.yaml --export FILE`, then uninstall with --discard"
                )

        return Step(f"check   {folder}: everything was delivered", check)

    def _purge(self, station: str) -> Iterator[Step]:
        others = self._others(station)
        for path in (*left_by(station), *(() if others else (ETC, STATE, CACHE))):
            if self._machine.exists(path):
                yield Step(f"delete  {path}", partial(self._machine.remove, path))
        if others:
            yield Step(f"keep    {ETC}, {STATE}: {', '.join(others)}")
        elif self._machine.is_live and self._machine.group(USER) is not None:
            yield command("userdel", USER)

    def _others(self, station: str) -> list[str]:
        """Return the other stations that are installed, or whose settings or verdicts are still there."""
        left = [path.stem for path in self._machine.inside(ETC).glob("*.yaml")]
        left += [path.name for path in self._machine.inside(STATE).glob("*")]
        return sorted({*self._record.stations, *filter(NAME.fullmatch, left)} - {station})

    def _note(self, station: str, *, installed: bool) -> Step:
        """Return the step that writes down what is installed now; the record is the last thing that is written."""

        def note() -> None:
            others = [name for name in self._record.stations if name != station]
            self._record.stations[:] = sorted([*others, station]) if installed else others
            write_record(self._machine, self._record)

        return Step(f"note    {RECORD}: {station} {'installed' if installed else 'removed'}", note)


def unit(station: str) -> str:
    """Return the name of a station's service."""
    return TEMPLATE.replace("@", f"@{station}")


def drop_in_folder(station: str) -> Path:
    """Return where a station's drop-ins lie."""
    return UNITS / f"{unit(station)}.d"


def left_by(station: str) -> list[Path]:
    """Return where settings, certificate, keys and everything that a station wrote lie."""
    credentials = ETC / "credentials"
    return [
        ETC / f"{station}.yaml",
        ETC / "certificates" / f"{station}.crt",
        credentials / f"{station}.key",
        credentials / f"{station}.password",
        STATE / station,
        CACHE / station,
    ]


def wanted_by(station: str) -> Path:
    """Return the link that `systemctl enable` makes."""
    return UNITS / "multi-user.target.wants" / unit(station)


def shipped(name: str) -> str:
    """Return the text of a file of systemd/, which is part of the package."""
    return (importlib.resources.files("agent") / "systemd" / name).read_text(encoding="utf-8")


def _is_hidden(path: Path) -> bool:
    return any(path.is_relative_to(folder) for folder in HIDDEN)
