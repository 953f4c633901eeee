"""The terminal side: one aligned line per part, warnings on stderr, errors as exit codes."""

from __future__ import annotations

import json
import logging
import sys

import click

from taktsight_subscribe.errors import SubscriberError
from taktsight_subscribe.messages import Verdict

INTERRUPTED = 130
MAX_CAUSE_CHARACTERS = 60

LABELS = {"pass": ("PASS", "green"), "reject": ("REJECT", "red"), "no_verdict": ("NO VERDICT", "yellow")}
COLUMNS = (("utc", 8), ("station", 12), ("seq", 7), ("part", 14), ("outcome", 10), ("score", 9), ("threshold", 9))
RIGHT = {"seq", "score", "threshold"}


def run_command(command: click.Command, name: str) -> None:
    """Run a click command and leave the process with an exit code that means something."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Plain())
    log = logging.getLogger("taktsight_subscribe")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        command.main(prog_name=name, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except SubscriberError as error:
        click.secho("error: ", fg="red", bold=True, nl=False, err=True)
        click.echo(printable(str(error)), err=True)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(INTERRUPTED)


def header() -> str:
    """Return the heading of the lines."""
    return "  ".join([*(_padded(name, name) for name, _ in COLUMNS), "cause"])


def line(verdict: Verdict) -> str:
    """Return one line for a person."""
    moment = verdict.created_utc or verdict.received_utc
    label, colour = LABELS.get(verdict.outcome, (verdict.outcome, "yellow"))
    cells = {
        "utc": f"{moment:%H:%M:%S}",
        "station": verdict.station,
        "seq": str(verdict.seq),
        "part": verdict.part_id or "-",
        "outcome": label,
        "score": _figure(verdict.score),
        "threshold": _figure(verdict.threshold),
    }
    padded = {name: _padded(name, printable(cell)) for name, cell in cells.items()}
    padded["outcome"] = click.style(padded["outcome"], fg=colour, bold=True)
    return "  ".join([*padded.values(), _cause(verdict)]).rstrip()


def json_line(verdict: Verdict) -> str:
    """Return the message as one line of JSON, all its fields."""
    return json.dumps(verdict.message, separators=(",", ":"))


def printable(text: str) -> str:
    """Return text without control characters: a message must not steer the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _padded(column: str, text: str) -> str:
    width = dict(COLUMNS)[column]
    return f"{text:>{width}}" if column in RIGHT else f"{text:<{width}}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _cause(verdict: Verdict) -> str:
    """Return why, in a few words: nothing for a pass."""
    if verdict.outcome == "pass":
        return ""
    reason = "" if verdict.reason == "score" else verdict.reason
    cause = ": ".join(printable(str(part)) for part in (reason, verdict.message.get("detail")) if part)
    return cause if len(cause) <= MAX_CAUSE_CHARACTERS else cause[: MAX_CAUSE_CHARACTERS - 1] + "…"


class _Plain(logging.Formatter):
    """`warning: text`; mere notes without a word before them."""

    def format(self, record: logging.LogRecord) -> str:
        text = printable(record.getMessage())
        if record.levelno < logging.WARNING:
            return text
        return click.style("warning: ", fg="yellow", bold=True) + text if sys.stderr.isatty() else f"warning: {text}"
