"""`taktsight-agent install` and `uninstall`: a station as a service of systemd, and back again."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from agent.install.install import (
    CAMERAS,
    ETC,
    GPUS,
    NONE,
    PREFIX,
    REALTIME,
    Installer,
    Wish,
    drop_in_folder,
    shipped,
    unit,
)
from agent.install.steps import Machine, Step, read_record
from calibration.console import note, say
from calibration.errors import TaktsightError


def _common_options(function: Callable[..., None]) -> Callable[..., None]:
    options: tuple[Callable[[Any], Any], ...] = (
        click.argument("station"),
        click.option("--dry-run", is_flag=True, help="Show every step, do none."),
        click.option(
            "--root", type=click.Path(path_type=Path), default="/", help="Root folder of an image; nothing is started."
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


@click.command(
    "install",
    short_help="Make a station a service, or bring it up to date.",
    epilog="Example: taktsight-agent install cell7 --camera gige --dry-run",
)
@_common_options
@click.option("--camera", type=click.Choice([*CAMERAS, NONE]), help="What its service may reach.  [as it is]")
@click.option("--gpu", type=click.Choice([*GPUS, NONE]), help="For TensorRT.  [as it is]")
@click.option("--realtime/--no-realtime", default=None, help="CPUs of its own, before all else.  [as it is]")
@click.option(
    "--prefix",
    type=click.Path(path_type=Path),
    default=PREFIX,
    show_default=True,
    help="The agent's virtual environment, as the service finds it.",
)
def install_command(station: str, dry_run: bool, root: Path, prefix: Path, **wish: Any) -> None:
    """Make STATION a service, or bring it up to date: unit, user, folders, drop-ins, an example of its settings.

    Needs root. What you wrote or changed is kept, and each step is told. The station is enabled, not started.
    """
    machine = Machine(root)
    steps = Installer(machine, read_record(machine), prefix).install(station, Wish(**wish))
    _carry_out(steps, machine, dry_run=dry_run)
    if wish["realtime"] and machine.is_live:
        _note_missing_cpus(station)
    if not dry_run and machine.is_live:
        say(f"next: edit {ETC / station}.yaml, bring its recipe and keys, then `systemctl restart {unit(station)}`")


@click.command(
    "uninstall",
    short_help="Take a station's service away.",
    epilog="Example: taktsight-agent uninstall cell7 --dry-run",
)
@_common_options
@click.option("--purge", is_flag=True, help="Delete its settings, keys, verdicts and recipes too.")
@click.option("--discard", is_flag=True, help="With --purge: also verdicts that were not delivered.")
def uninstall_command(station: str, dry_run: bool, root: Path, purge: bool, discard: bool) -> None:
    """Stop STATION and take its service away; with the last station, all that install made.

    Needs root. Settings, keys and everything that the station wrote stay, unless --purge is given.
    """
    if discard and not purge:
        raise click.UsageError("--discard needs --purge")
    machine = Machine(root)
    steps = Installer(machine, read_record(machine)).uninstall(station, purge=purge, discard=discard)
    _carry_out(steps, machine, dry_run=dry_run)


def _carry_out(steps: list[Step], machine: Machine, *, dry_run: bool) -> None:
    if not dry_run and machine.is_live and os.geteuid() != 0:
        raise TaktsightError("this needs root: run it with sudo; --dry-run shows what would be done")
    for step in steps:
        say(step.told)
        if not dry_run:
            try:
                step.do()
            except OSError as error:
                raise TaktsightError(f"{error}: mend it and run the command again: what was done is kept") from error
    if dry_run:
        note("a dry run: nothing was changed")


def _note_missing_cpus(station: str) -> None:
    """A service that is bound to CPUs that the machine lacks does not start."""
    path = drop_in_folder(station) / REALTIME
    found = re.search(
        r"^CPUAffinity=(.*)$", path.read_text() if path.exists() else shipped(f"drop-ins/{REALTIME}"), re.M
    )
    missing = [] if found is None else [cpu for cpu in found[1].split() if int(cpu) >= (os.cpu_count() or 1)]
    if missing:
        note(f"{path}: CPUAffinity= names CPU {', '.join(missing)}, which this machine lacks: set CPUs that it has")
