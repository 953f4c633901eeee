"""taktsight-subscribe: the consumer's side, without a program of one's own."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from functools import wraps
from math import inf, isfinite
from pathlib import Path
from typing import Any

import click

from taktsight_subscribe.broker import BrokerOptions, check_topic
from taktsight_subscribe.commands import Reply, send_command
from taktsight_subscribe.console import header, json_line, line, printable, run_command
from taktsight_subscribe.errors import SettingsError
from taktsight_subscribe.gaps import missing_parts
from taktsight_subscribe.postgres_store import PostgresStore
from taktsight_subscribe.sqlite_store import SqliteStore
from taktsight_subscribe.store import Batch, Store
from taktsight_subscribe.subscriber import HEATMAPS_MB, Subscriber

EXIT_CODES = """Exit codes: 0 done, 2 usage, 4 settings, 7 package missing, 10 broker, 12 no reply or too few parts in
time, 13 store, 130 interrupted; gaps: 1 something is missing; send: 3 the station refused, 5 it failed."""
TOO_FEW = 12
RESULT_CODES = {"done": 0, "refused": 3, "failed": 5}

BROKER_OPTIONS = (
    click.option("--host", default="127.0.0.1", show_default=True, help="The MQTT broker."),
    click.option("--port", type=click.IntRange(1, 65535), default=1883, show_default=True, help="Of the broker."),
    click.option("--username", help="At the broker; needs --password-file."),
    click.option("--password-file", type=click.Path(path_type=Path), help="Its first line is the password."),
    click.option("--ca-file", type=click.Path(path_type=Path), help="Given: TLS, the broker's certificate is checked."),
    click.option("--cert-file", type=click.Path(path_type=Path), help="Our certificate, with --key-file."),
    click.option("--key-file", type=click.Path(path_type=Path), help="Private key of --cert-file."),
    click.option("--protocol", type=click.Choice(["5", "3"]), default="5", show_default=True, help="3 is MQTT 3.1.1."),
)
BROKER_FIELDS = ("host", "port", "username", "password_file", "ca_file", "cert_file", "key_file", "protocol")
STORE_OPTION = click.option(
    "--store",
    "store_url",
    default="verdicts.sqlite",
    show_default=True,
    envvar="TAKTSIGHT_STORE",
    help="A SQLite file, or postgresql://user@host/database. Also from TAKTSIGHT_STORE.",
)


class FiniteFloat(click.FloatRange):
    """A number in a range that JSON has: not nan, which click finds in every range, not inf."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number; usage error if it is none."""
        number = float(super().convert(value, param, ctx))
        if not isfinite(number):
            self.fail(f"{value!r} found, need a finite number", param, ctx)
        return number


def with_broker(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the broker's options; it gets them together, as `broker`."""

    @wraps(command)
    def gathered(**options: Any) -> None:
        fields = {name: options.pop(name) for name in BROKER_FIELDS}
        fields["protocol"] = int(fields["protocol"])
        command(broker=fields, **options)

    for option in reversed(BROKER_OPTIONS):
        gathered = option(gathered)
    return gathered


@click.group(epilog=EXIT_CODES)
@click.version_option(package_name="taktsight-subscribe")
def commands() -> None:
    """Receive the verdicts of taktsight stations, and send commands to them."""


@commands.command(
    "run",
    short_help="Store and print every part.",
    epilog="Example: taktsight-subscribe run acme/plant1/+/+/+ --host broker --consumer mes",
)
@click.argument("topic")
@click.option("--consumer", default="mes", show_default=True, help="Our name in the stations' mqtt.consumers.")
@STORE_OPTION
@click.option("--heatmaps", type=click.Path(path_type=Path), help="Folder for the pictures.")
@click.option(
    "--heatmaps-mb",
    type=FiniteFloat(min=0),
    default=HEATMAPS_MB,
    show_default=True,
    help="Of pictures kept; the oldest go first.",
)
@click.option("--count", type=click.IntRange(min=1), help="Stop after so many parts.")
@click.option("--timeout", type=FiniteFloat(min=0), help="Stop after so many seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print each message whole, one line of JSON per part.")
@with_broker
def run_command_line(  # noqa: PLR0913, PLR0917 one parameter per option
    topic: str,
    consumer: str,
    store_url: str,
    heatmaps: Path | None,
    heatmaps_mb: float,
    count: int | None,
    timeout: float | None,
    as_json: bool,
    broker: BrokerOptions,
) -> None:
    """Store and print every part of the stations at TOPIC, where + stands for any word of a level, until stopped."""
    store = open_store(store_url)
    subscriber = Subscriber(topic, consumer=consumer, store=store, heatmaps=heatmaps, heatmaps_mb=heatmaps_mb, **broker)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: subscriber.stop())
    shown = _show(subscriber, inf if count is None else count, inf if timeout is None else timeout, as_json=as_json)
    if count is not None and timeout is not None and shown < count:
        click.echo(f"{shown} of {count} parts within {timeout:g} s", err=True)
        sys.exit(TOO_FEW)


@commands.command(
    "gaps",
    short_help="List the parts that are missing, and why.",
    epilog="Example: taktsight-subscribe gaps --store verdicts.sqlite",
)
@STORE_OPTION
@click.option("--json", "as_json", is_flag=True, help="One line of JSON per gap.")
def gaps_command(store_url: str, as_json: bool) -> None:
    """List the parts that the store does not have, and why; exit code 1 if there are any."""
    with closing(existing_store(store_url)) as store:
        missing = missing_parts(store)
    for gap in missing:
        if as_json:
            click.echo(json.dumps(asdict(gap)))
        else:
            numbers = f"{gap.first}" if gap.first == gap.last else f"{gap.first} to {gap.last}"
            click.echo(f"{gap.station:<12}  {gap.epoch}  {numbers:>17}  {gap.count:>6}  {printable(gap.reason)}")
    if not missing and not as_json:
        click.echo("nothing is missing")
    sys.exit(1 if missing else 0)


@commands.command(
    "move",
    short_help="Take a station's messages from another topic.",
    epilog="Example: taktsight-subscribe move cell7 acme/plant1/hall2/line4/cell7 --store verdicts.sqlite",
)
@click.argument("station")
@click.argument("topic")
@STORE_OPTION
def move_command(station: str, topic: str, store_url: str) -> None:
    """Take the messages of STATION from TOPIC, its new root, and no longer from where it was. End `run` before."""
    check_topic(topic, wildcards=False)
    with closing(existing_store(store_url)) as store:
        known = [epoch.progress for epoch in store.epochs() if epoch.progress.station == station]
        if not known:
            raise SettingsError(f"station: {station!r} is not in this store: name one that is, as `gaps` writes it")
        store.commit(Batch(progress=[replace(one, root=topic) for one in known]))
    was = ", ".join(sorted({one.root for one in known}))
    click.echo(f"{printable(station)}: was at {printable(was)}, is at {topic}")


@commands.group("send", short_help="Send a command to a station: pause, resume, recipe, ...")
@click.argument("topic")
@click.pass_context
def send_group(context: click.Context, topic: str) -> None:
    """Send a command to the station at TOPIC, wait for its reply and print it.

    As in: taktsight-subscribe send acme/plant1/hall2/line3/cell7 pause --reason "new nest" --host broker
    """
    context.obj = topic


def sending(command: Callable[..., dict[str, Any]]) -> Callable[..., None]:
    """Make a function that returns the arguments of a command into one that sends it."""
    name = command.__name__

    @click.option("--issuer", default="mes", show_default=True, help="Who commands, for the station's audit log.")
    @click.option("--timeout", type=FiniteFloat(min=0.1, max=3600), default=10.0, show_default=True)
    @click.option("--json", "as_json", is_flag=True, help="Print the whole reply.")
    @with_broker
    @wraps(command)
    def send(*, broker: BrokerOptions, issuer: str, timeout: float, as_json: bool, **options: Any) -> None:
        topic = click.get_current_context().obj
        reply = send_command(topic, name, command(**options), issuer=issuer, timeout_s=timeout, **broker)
        _print_reply(name, reply, as_json=as_json)
        sys.exit(RESULT_CODES.get(reply.result, 5))

    return send


@send_group.command("recipe")
@click.option("--name", required=True, help="File in the station's recipes folder, without .recipe.")
@sending
def recipe(name: str) -> dict[str, Any]:
    """Change the recipe, between two parts."""
    return {"name": name}


@send_group.command("pause")
@click.option("--reason", required=True, help="For the log and the people at the line.")
@sending
def pause(reason: str) -> dict[str, Any]:
    """Stop inspecting until `resume`."""
    return {"reason": reason}


@send_group.command("resume")
@sending
def resume() -> dict[str, Any]:
    """Go on after `pause`, or after the station has halted itself."""
    return {}


@send_group.command("capture")
@click.option("--count", type=click.IntRange(1, 1000), required=True, help="Parts to record.")
@sending
def capture(count: int) -> dict[str, Any]:
    """Record the next parts at the station."""
    return {"count": count}


@send_group.command("threshold")
@click.option("--score", type=FiniteFloat(), help="Reject above this score; left out: the recipe's own.")
@sending
def threshold(score: float | None) -> dict[str, Any]:
    """Set the threshold, or go back to the recipe's."""
    return {"score": score}


@send_group.command("selftest")
@sending
def selftest() -> dict[str, Any]:
    """Have the station check itself."""
    return {}


def open_store(url: str) -> Store:
    """Return the store of a file name or a connection string, not yet open."""
    return PostgresStore(url) if is_postgres(url) else SqliteStore(url.removeprefix("sqlite:///"))


def existing_store(url: str) -> Store:
    """Return an open store that `run` has made. Raises SettingsError where there is no such file."""
    store = open_store(url)
    if isinstance(store, SqliteStore) and not store.path.is_file():
        raise SettingsError(f"--store: {store.path} is not there: name the file that `run` writes")
    store.open()
    return store


def is_postgres(url: str) -> bool:
    """Return whether this names a PostgreSQL database. Raises SettingsError on another kind of URL."""
    scheme, found, _ = url.partition("://")
    if found and scheme not in {"postgresql", "postgres", "sqlite"}:
        raise SettingsError(f"--store: {scheme}:// is unknown: name a file for SQLite, or postgresql://...")
    return found != "" and scheme != "sqlite"


def _show(subscriber: Subscriber, count: float, timeout_s: float, *, as_json: bool) -> int:
    """Print parts as they come. Returns how many."""
    deadline_s = time.monotonic() + timeout_s
    shown = 0
    with subscriber:
        if not as_json:
            click.echo(header())
        while shown < count:
            verdict = subscriber.next(max(0.0, deadline_s - time.monotonic()))
            if verdict is None:
                break
            click.echo(json_line(verdict) if as_json else line(verdict))
            shown += 1
    return shown


def _print_reply(name: str, reply: Reply, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(reply.message, separators=(",", ":")))
        return
    colour = "green" if reply.result == "done" else "red"
    click.echo(f"{name} {click.style(printable(reply.result), fg=colour, bold=True)}: {printable(reply.detail)}")
    for what in ("before", "after"):
        if reply.message.get(what) is not None:
            click.echo(f"  {what:<6}  {printable(str(reply.message[what]))}")


def main() -> None:
    """Entry point of the console script."""
    run_command(commands, "taktsight-subscribe")


if __name__ == "__main__":
    main()
