"""`taktsight-agent doctor`: what a person, or support, sees of the findings."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

import click
from rich.markup import escape
from rich.table import Table

from agent.doctor.doctor import examine
from agent.doctor.finding import Finding, Grade, counts, has_failed, report
from calibration.console import console, say

COLOURS = {Grade.OK: "green", Grade.WARN: "yellow", Grade.FAIL: "bold red"}
NAME_CHARACTERS = 20
NICENESS = 10  # an agent that runs beside us goes first


@click.command(
    "doctor",
    short_help="Look over this machine and the station.",
    epilog="Example: taktsight-agent doctor station.yaml --json > report.json",
)
@click.argument("station", required=False, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object, for machines and for support.")
def doctor_command(station: Path | None, as_json: bool) -> None:
    """Look over this machine and, where given, STATION: what was found, what was wanted, what to do.

    Exit code 0 if nothing failed, 1 otherwise; warnings do not fail. Nothing is changed; the agent may run meanwhile.
    """
    os.nice(NICENESS)
    findings = []
    for finding in examine(station):
        findings.append(finding)
        if not as_json:
            show(finding)
    if as_json:
        file = None if station is None else str(station)
        version = importlib.metadata.version("taktsight")
        click.echo(
            json.dumps(report(findings, version=version, station_file=file, now_utc=datetime.now(UTC)), indent=1)
        )
    else:
        say(summary(findings))
    sys.stdout.flush()
    if has_failed(findings):
        sys.exit(1)


def show(finding: Finding) -> None:
    """Print a finding: on a terminal under one another, elsewhere on one line, for grep."""
    mark = f"[{COLOURS[finding.grade]}]{finding.grade:4}[/]"
    if not console.is_terminal:
        console.print(f"{mark}  {escape(in_one_line(finding))}", soft_wrap=True)
        return
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=4)
    grid.add_column(width=NAME_CHARACTERS)
    grid.add_column()
    grid.add_row(mark, f"[bold]{escape(finding.name)}[/]", escape(finding.found))
    if finding.wanted:
        grid.add_row("", "[dim]wanted[/]", escape(finding.wanted))
        grid.add_row("", "[dim]do[/]", escape(finding.action))
    console.print(grid)


def in_one_line(finding: Finding) -> str:
    """Return name, what was found and, unless it is ok, what was wanted and what to do."""
    rest = f" | wanted: {finding.wanted} | do: {finding.action}" if finding.wanted else ""
    return f"{finding.name}: {finding.found}{rest}"


def summary(findings: list[Finding]) -> str:
    """Return how many there are of each grade, and the names of those to see to."""
    number = counts(findings)
    parts = [f"{number['ok']} ok"]
    for grade in (Grade.WARN, Grade.FAIL):
        names = ", ".join(finding.name for finding in findings if finding.grade is grade)
        parts.append(f"{number[grade]} {grade}" + (f" ({names})" if names else ""))
    return ", ".join(parts)
