"""`taktsight-agent recipes` and `audit`: which recipes a station has, which one judges, and who decided it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from agent.audit import NOTHING, AuditLog
from agent.config import Station, read_station
from agent.engines.engine import open_engine
from agent.recipes.store import SUFFIX, Choice, Prove, RecipeStore, Record
from calibration.console import console, note, say
from calibration.errors import RecipeError, TaktsightError
from calibration.recipe import Recipe

MOST_LINE_CHARACTERS = 500

STATION = click.argument("station", type=click.Path(path_type=Path))


@click.group("recipes", epilog="Example: taktsight-agent recipes list station.yaml")
def recipes_commands() -> None:
    """The recipes of a station: bring them in, choose one, go back."""


@recipes_commands.command(
    "list", short_help="Show the station's recipes.", epilog="Example: taktsight-agent recipes list station.yaml"
)
@STATION
def list_command(station: Path) -> None:
    """Show which recipes STATION has, who signed them, and which one is active."""
    settings = read_station(station)
    store = _store(settings)
    state, listed = store.state(), store.listed()
    if listed:
        table = Table(title=str(store.folder), title_justify="left")
        for heading in ("recipe", "", "product", "revision", "signer", "digest"):
            table.add_column(heading)
        for one in listed:
            mark = "active" if _is(state.active, one.name) else "previous" if _is(state.previous, one.name) else ""
            table.add_row(one.name, mark, *(_facts(one.recipe) if one.recipe is not None else ("refused", "", "", "")))
        console.print(table)
    else:
        say(f"{store.folder}: nothing was added")
    for one in listed:
        if one.trouble:
            note(one.trouble)
    if state.active is None:
        say(f"active: {settings.recipes.recipe}, as {station.name} says: {_of_the_station(store)}")
    if ended := store.ended():
        note(ended)
    if state.threshold is not None:
        digest = state.threshold.digest[:12]
        say(f"threshold: {state.threshold.score:g} as commanded, with the recipe of digest {digest} (see commands)")


@recipes_commands.command(
    "add",
    short_help="Take a recipe in, after every check.",
    epilog="Example: taktsight-agent recipes add station.yaml flange.recipe",
)
@STATION
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--name", help="Under which it is activated and commanded.  [the file's name]")
@click.option("--replace", "replaces", is_flag=True, help="In place of one of the same name that is not in use.")
def add_command(station: Path, recipe: Path, name: str | None, replaces: bool) -> None:
    """Take RECIPE into STATION after every check: signature, digests, self-test on this device's engine."""
    settings = read_station(station)
    name = recipe.name.removesuffix(SUFFIX) if name is None else name
    with _recorded(settings, "recipe add", name) as record:
        added = _store(settings).add(recipe, name, _prove(settings), record, replaces=replaces)
    say(f"added: {_told(added)}")


@recipes_commands.command(
    "activate",
    short_help="Choose the recipe that judges.",
    epilog="Example: taktsight-agent recipes activate station.yaml flange-2",
)
@STATION
@click.argument("name")
def activate_command(station: Path, name: str) -> None:
    """Let the recipe NAME judge from the next start of the agent of STATION; the one before is kept."""
    settings = read_station(station)
    with _recorded(settings, "recipe activate", name) as record:
        old, new = _store(settings).activate(name, _prove(settings), record)
    _tell_change(old, new)


@recipes_commands.command(
    "rollback",
    short_help="Go back to the recipe before.",
    epilog="Example: taktsight-agent recipes rollback station.yaml",
)
@STATION
def rollback_command(station: Path) -> None:
    """Let the recipe judge that was active before, from the next start of the agent of STATION."""
    settings = read_station(station)
    with _recorded(settings, "recipe rollback", None) as record:
        old, new = _store(settings).roll_back(_prove(settings), record)
    _tell_change(old, new)


@recipes_commands.command(
    "verify",
    short_help="Check every recipe of the station.",
    epilog="Example: taktsight-agent recipes verify station.yaml",
)
@STATION
@click.argument("name", nargs=-1)
def verify_command(station: Path, name: tuple[str, ...]) -> None:
    """Check signature, digests and self-test of every recipe of STATION, or of those called NAME."""
    settings = read_station(station)
    store, failed = _store(settings), 0
    for one in name or store.names():
        try:
            recipe = settings.recipes.trust.read(store.path(one))
            _prove(settings)(recipe)
            say(f"ok   {one}: {', '.join(_facts(recipe))}")
        except TaktsightError as error:
            failed += 1
            say(f"FAIL {one}: {error}")
    try:
        active, recipe = store.current()
        say(f"ok   to judge: {active or settings.recipe.name}: {', '.join(_facts(recipe))}")
    except TaktsightError as error:
        failed += 1
        say(f"FAIL to judge: {error}")
    if failed:
        raise RecipeError(f"{failed} recipes found that cannot run here: see above")


@click.command(
    "audit", short_help="Show or prove who changed what.", epilog="Example: taktsight-agent audit station.yaml --verify"
)
@STATION
@click.option("--verify", "verifies", is_flag=True, help="Prove the chain; name the first line that breaks it.")
@click.option("--noted", help="With --verify: digest that was noted down; its line must still be there.")
@click.option("--last", type=click.IntRange(min=1), default=50, show_default=True, help="Show so many of the newest.")
def audit_command(station: Path, verifies: bool, noted: str | None, last: int) -> None:
    """Show who changed what at STATION, oldest first, or prove that nobody changed this account."""
    if noted is not None and not verifies:
        raise click.UsageError("--noted needs --verify")
    trail = AuditLog(read_station(station).outbox.folder)
    if not verifies:
        for fields in list(trail.lines())[-last:]:
            say(_told_line(fields))
        return
    chain = trail.verify(noted)
    say(f"{chain.lines} lines, an unbroken chain; digest of the last: {chain.last}")
    if chain.first != NOTHING:
        note("the oldest lines were dropped when the trail became too long")
    if chain.torn_bytes:
        note(f"{chain.torn_bytes} bytes after it were torn by a power cut; the next line will say so")


@contextmanager
def _recorded(station: Station, what: str, name: str | None) -> Iterator[Record]:
    """Yield what writes a change into the audit trail just before it is made; one that failed is told of, too."""
    trail = AuditLog(station.outbox.folder)

    def record(old: Choice | None, new: Choice | None) -> None:
        trail.append(what, old=_fields(old), new=_fields(new))

    try:
        yield record
    except TaktsightError as error:
        trail.tell(f"{what} failed", new={"name": name, "why": str(error)[:500]})
        raise


def _store(station: Station) -> RecipeStore:
    settings = station.recipes
    return RecipeStore(settings.folder, settings.trust, settings.recipe)


def _prove(station: Station) -> Prove:
    return lambda recipe: open_engine(recipe, station.engine)


def _fields(choice: Choice | None) -> dict[str, Any] | None:
    return None if choice is None else {key: value for key, value in asdict(choice).items() if key != "since_utc"}


def _is(choice: Choice | None, name: str) -> bool:
    return choice is not None and choice.name == name


def _facts(recipe: Recipe) -> tuple[str, str, str, str]:
    signature = recipe.signature
    revision, signer = ("-", "unsigned") if signature is None else (str(signature.revision), signature.key)
    return recipe.product, revision, signer, recipe.digest[:12]


def _told(choice: Choice | None) -> str:
    if choice is None:
        return "none"
    signed = "unsigned" if choice.signer is None else f"revision {choice.revision}, signed by {choice.signer}"
    return f"{choice.name or 'as station.yaml says'}: {choice.product}, {signed}, digest {choice.digest[:12]}"


def _of_the_station(store: RecipeStore) -> str:
    try:
        product, revision, signer, digest = _facts(store.current()[1])
    except TaktsightError as error:
        return f"refused: {error}"
    signed = signer if revision == "-" else f"revision {revision}, signed by {signer}"
    return f"{product}, {signed}, digest {digest}"


def _tell_change(old: Choice | None, new: Choice) -> None:
    say(f"before: {_told(old)}")
    say(f"active: {_told(new)}")
    note("an agent that runs goes on as it is: restart it, or command the recipe over MQTT")


def _told_line(fields: dict[str, Any]) -> str:
    """Return a line of the trail for people: what is new, and what it took the place of."""
    new, old = (_words(fields[key]) for key in ("new", "old"))
    change = f"{new}; before: {old}" if old else new
    line = f"{str(fields['utc']).replace('T', ' ')}  {fields['who']}  {fields['what']}: {change}"
    return line if len(line) <= MOST_LINE_CHARACTERS else line[: MOST_LINE_CHARACTERS - 1] + "…"


def _words(value: Any) -> str:
    """Return a value of the trail in words, digests short; nothing for nothing."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(one)}" for name, one in value.items() if one not in (None, ""))
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text
