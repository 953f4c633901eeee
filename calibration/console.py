"""The terminal side that all three commands share: progress, tables, errors as exit codes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import click
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from calibration.errors import TaktsightError

INTERRUPTED = 130
EXIT_CODES = """Exit codes: 0 done, 2 usage, 3 images or files, 4 station.yaml, 5 recipe, 6 calibration, 7 package
missing, 8 camera, 9 engine, 10 broker, 11 training, 12 parity, 13 outbox, 130 interrupted."""

console = Console(highlight=False, emoji=False)
errors = Console(stderr=True, highlight=False, emoji=False)


def log_to_stderr() -> None:
    """Log warnings of everybody, and what our own packages have to say."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    for package in ("agent", "calibration", "trainer"):
        logging.getLogger(package).setLevel(logging.INFO)


def run_command(command: click.Command, name: str) -> None:
    """Run a click command and leave the process with an exit code that means something."""
    log_to_stderr()
    try:
        command.main(prog_name=name, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except TaktsightError as error:
        errors.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        errors.print("interrupted")
        sys.exit(INTERRUPTED)


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Yield progress(what, done, total): one bar per `what`; plain lines where the output is no terminal."""
    if not console.is_terminal:
        yield _plain_progress()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            kind = what.partition(",")[0]  # "vae, loss 12" goes on with the bar of "vae"
            if kind not in tasks:
                tasks[kind] = bars.add_task(what, total=total)
            bars.update(tasks[kind], description=what, completed=done, total=total)

        yield show


def note(text: str) -> None:
    """Print something that the user should know but that stops nothing."""
    console.print(f"[yellow]note:[/] {escape(text)}", soft_wrap=True)


def say(text: str) -> None:
    """Print one line of plain text."""
    console.print(escape(text), soft_wrap=True)


def latency_table(stage_ms: Mapping[str, Sequence[float]], title: str) -> Table:
    """Return p50, p99 and max per stage, milliseconds."""
    table = Table(title=title, title_justify="left")
    for heading in ("stage", "n", "p50 ms", "p99 ms", "max ms"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for stage, values in stage_ms.items():
        if len(values):
            p50, p99 = np.percentile(np.asarray(values), [50, 99])
            table.add_row(stage, str(len(values)), f"{p50:.1f}", f"{p99:.1f}", f"{max(values):.1f}")
    return table


def _plain_progress() -> Callable[[str, int, int], None]:
    finished: set[str] = set()

    def show(what: str, done: int, total: int) -> None:
        kind = what.partition(",")[0]
        if done >= total and kind not in finished:
            finished.add(kind)
            say(f"{what}: {done}/{total}")

    return show
