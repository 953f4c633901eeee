"""From the bytes of cmd/{name} to a well-formed command, or a refusal that says why not. Nothing here has an effect."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator

COMMANDS = ("recipe", "pause", "resume", "capture", "threshold", "selftest")
MOST_BYTES = 16 * 1024
MOST_BRACKETS = 256  # a command has 2, and its texts room for 200; json's own limit, about 1000, ends in RecursionError
MOST_DIGITS = 20  # ids have at most 16
MOST_QUOTED_CHARACTERS = 200  # of foreign text in one place


@dataclass(frozen=True, slots=True)
class Command:
    """A well-formed command: it fits `interface/command.schema.json`, nothing more."""

    name: str
    issuer: str
    command_id: int
    expires: datetime  # UTC
    arguments: dict[str, Any]  # texts made printable


class Refusal(Exception):
    """The message is refused and uses up no id; issuer and id are None where they could not be read."""

    def __init__(self, detail: str, issuer: str | None = None, command_id: int | None = None) -> None:
        super().__init__(detail)
        self.issuer = issuer
        self.command_id = command_id


def read_command(name: str, payload: bytes, retained: bool) -> Command:
    """Return the command in a message on cmd/{name}. Raises Refusal, and nothing else."""
    if retained:
        raise Refusal("retained message found, want one sent for now: publish without retain, and clear the topic")
    if name not in COMMANDS:
        raise Refusal(f"command {printable(name, 50)!r} found, want one of {', '.join(COMMANDS)}")
    if len(payload) > MOST_BYTES:
        raise Refusal(f"{len(payload)} bytes found, want at most {MOST_BYTES}")
    value = _parsed(payload)
    error = next(_validator(name).iter_errors(value), None)
    if error is not None:
        what = printable(f"{error.json_path}: {error.message}")
        raise Refusal(f"{what}: see command.schema.json, {name}", *_sender(value))
    sender = str(value["issuer"]), int(value["id"])  # 7.0 is an integer too
    try:
        expires = datetime.fromisoformat(value["expires"])
    except ValueError as error:
        raise Refusal(f"$.expires: {value['expires']} is no time: {error}", *sender) from error
    arguments = {
        key: printable(given) if isinstance(given, str) else given for key, given in value["arguments"].items()
    }
    return Command(name, *sender, expires, arguments)


def printable(text: str, most: int = MOST_QUOTED_CHARACTERS) -> str:
    """Return the beginning of a foreign text, fit for a log line: one line, no control or direction characters."""
    short = text if len(text) <= most else text[: most - 3] + "..."
    return "".join(character if character.isprintable() else "?" for character in short)


def _parsed(payload: bytes) -> Any:
    try:
        text = payload.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refusal(f"byte {error.start} is no UTF-8: send JSON in UTF-8") from error
    brackets = text.count("{") + text.count("[")
    if brackets > MOST_BRACKETS:
        raise Refusal(f"{brackets} opening brackets found, want at most {MOST_BRACKETS}: a command has 2")
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"no JSON as wanted here: {printable(str(error))}: send one object, no key twice") from error


def _sender(value: Any) -> tuple[str | None, int | None]:
    """Return issuer and id of what does not fit the schema, as far as they do; no id without issuer."""
    if not isinstance(value, dict) or not _validator("issuer").is_valid(value.get("issuer")):
        return None, None
    return value["issuer"], int(value["id"]) if _validator("id").is_valid(value.get("id")) else None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits, want at most {MOST_DIGITS}")
    return int(digits)


def _real(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError("a number beyond what a float holds")
    return number


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_whole, parse_float=_real, parse_constant=_constant, strict=True
)
_SCHEMA = json.loads((Path(__file__).parents[1] / "interface" / "command.schema.json").read_text(encoding="utf-8"))


@cache
def _validator(definition: str) -> Draft202012Validator:
    from jsonschema import Draft202012Validator  # noqa: PLC0415 only who is commanded needs it

    return Draft202012Validator({"$defs": _SCHEMA["$defs"], "$ref": f"#/$defs/{definition}"})
