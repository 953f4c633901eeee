"""What stations say and are told, checked once where it arrives: JSON to frozen dataclasses and back.

Unknown further fields are welcome: a verdict keeps its message whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from math import isfinite
from typing import Any, NamedTuple, TypeGuard

VERDICT_SCHEMA = "taktsight.verdict/1"
MISSING_SCHEMA = "taktsight.missing/1"
STATUS_SCHEMA = "taktsight.status/1"
ACK_SCHEMA = "taktsight.ack/1"
COMMAND_SCHEMA = "taktsight.command/1"
REPLY_SCHEMA = "taktsight.reply/1"

MAX_MESSAGE_BYTES = 1 << 20  # a verdict takes 1 to 7 KB
MAX_NAME_CHARACTERS = 200
MAX_DEPTH = 64  # a verdict has 4; what walks a message by recursion ends at about 480
MAX_REASON_CHARACTERS = 500
MAX_SEQ = (1 << 53) - 1  # the largest whole number that every JSON reader keeps exact
CONSUMER_NAME = re.compile(r"[A-Za-z0-9_-]{1,32}")
EPOCH = re.compile(r"[0-9a-f]{12}")


class Unreadable(ValueError):
    """A message that is not what its topic promises; the text says why."""


class Elsewhere(Unreadable):
    """A message in the name of a station that is known at another topic."""


class Key(NamedTuple):
    """What identifies a verdict for ever."""

    station: str
    epoch: str
    seq: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """One part. Fields that a database column is made of; everything else is in `message`."""

    station: str
    epoch: str  # new for every outbox of the station
    seq: int  # counts within the epoch from 1, without gaps
    run: str | None  # new for every run of the station
    trigger: int | None  # counts the triggers of one run
    outcome: str  # "pass" | "reject" | "no_verdict"
    reason: str | None
    score: float | None  # in the recipe's units
    threshold: float | None
    part_id: str | None
    product: str | None
    created_utc: datetime | None  # by the station's clock: for people. Order by seq
    received_utc: datetime
    text: str  # the message as it came

    @property
    def key(self) -> Key:
        """The idempotency key."""
        return Key(self.station, self.epoch, self.seq)

    @property
    def message(self) -> dict[str, Any]:
        """The whole message, fields that this version does not know included."""
        message: dict[str, Any] = json.loads(self.text)
        return message

    @property
    def heatmap_sha256(self) -> str | None:
        """The digest of the heatmap, if the station has one of this part."""
        link = self.message.get("heatmap")
        digest = link.get("sha256") if isinstance(link, dict) else None
        return digest if isinstance(digest, str) else None


@dataclass(frozen=True, slots=True)
class Missing:
    """The station's word that verdicts first..last will never come."""

    station: str
    epoch: str
    first: int
    last: int
    why: str


@dataclass(frozen=True, slots=True)
class Status:
    """What matters to a consumer in a station's status; None where the station did not say."""

    station: str
    state: str
    epoch: str | None
    first_seq: int | None  # lowest seq that the station still keeps; last_seq + 1 where it keeps none
    last_seq: int | None
    acknowledged: Mapping[str, int] | None  # by consumer, in this epoch; None: the station does not wait for consumers


def read_verdict(payload: bytes, received_utc: datetime) -> Verdict:
    """Return the verdict. Raises Unreadable."""
    text, message = _parsed(payload, VERDICT_SCHEMA)
    outcome = message.get("outcome")
    if not isinstance(outcome, str) or not 1 <= len(outcome) <= 32:
        raise Unreadable(f"outcome {str(outcome)[:40]!r} found, need pass, reject or no_verdict")
    return Verdict(
        station=_station(message),
        epoch=_epoch(message),
        seq=_seq(message, "seq"),
        run=_text_or_none(message.get("run")),
        trigger=_count_or_none(message.get("trigger")),
        outcome=storable(outcome),
        reason=_text_or_none(message.get("reason")),
        score=_number_or_none(message.get("score")),
        threshold=_number_or_none(message.get("threshold")),
        part_id=_text_or_none(message.get("partId")),
        product=_text_or_none(message.get("productId")),
        created_utc=_moment_or_none(message.get("creationTime")),
        received_utc=received_utc,
        text=text,
    )


def read_missing(payload: bytes) -> Missing:
    """Return the notice. Raises Unreadable."""
    _, message = _parsed(payload, MISSING_SCHEMA)
    first, last = _seq(message, "first"), _seq(message, "last")
    if last < first:
        raise Unreadable(f"first {first} lies behind last {last}")
    why = storable(str(message.get("why") or "the station gave no reason"))[:MAX_REASON_CHARACTERS]
    return Missing(_station(message), _epoch(message), first, last, why)


def read_status(payload: bytes) -> Status:
    """Return the status. Raises Unreadable."""
    _, message = _parsed(payload, STATUS_SCHEMA)
    consumers = message.get("consumers")
    acknowledged = None
    if message.get("deliveryMode") == "consumers" and isinstance(consumers, dict):
        waiting = ((name, entry.get("acknowledged")) for name, entry in consumers.items() if isinstance(entry, dict))
        acknowledged = {name: seq for name, seq in waiting if _is_whole(seq)}
    return Status(
        station=_station(message),
        state=str(message.get("state")),
        epoch=None if message.get("epoch") is None else _epoch(message),
        first_seq=_count_or_none(message.get("firstSeq")),
        last_seq=_count_or_none(message.get("lastSeq")),
        acknowledged=acknowledged,
    )


def ack_payload(epoch: str, upto: int, *, resend: bool) -> bytes:
    """Return the acknowledgement of everything up to and including seq `upto`."""
    return encode({"schema": ACK_SCHEMA, "epoch": epoch, "upto": upto, "resend": resend})


def encode(message: Mapping[str, Any]) -> bytes:
    """Return compact JSON."""
    return json.dumps(message, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(errors="replace")


def timestamp(moment: datetime) -> str:
    """Return UTC as ISO 8601 with milliseconds and Z: sorts as text."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def storable(text: str) -> str:
    """Return text that every database takes: NUL and halves of surrogate pairs become U+FFFD."""
    if text.isascii() and "\0" not in text:
        return text
    return "".join("\ufffd" if char == "\0" or "\ud800" <= char <= "\udfff" else char for char in text)


def parse_object(payload: bytes) -> tuple[str, dict[str, Any]]:
    """Return a JSON object as text and parsed. Raises Unreadable on anything else; NaN is no JSON.

    Objects and lists lie at most MAX_DEPTH deep in one another.
    """
    if len(payload) > MAX_MESSAGE_BYTES:
        raise Unreadable(f"{len(payload)} bytes, more than {MAX_MESSAGE_BYTES}")
    try:
        text = payload.decode()
        message = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"not JSON: {str(error)[:200]}") from error
    if not isinstance(message, dict):
        raise Unreadable("not a JSON object")
    if text.count("{") + text.count("[") > MAX_DEPTH and _is_deep(message):
        raise Unreadable(f"objects and lists more than {MAX_DEPTH} deep in one another")
    return text, message


def _parsed(payload: bytes, schema: str) -> tuple[str, dict[str, Any]]:
    text, message = parse_object(payload)
    if message.get("schema") != schema:
        found = str(message.get("schema"))[:60]
        raise Unreadable(
            f"schema {found!r} found, this version reads {schema}: update taktsight-subscribe if it is newer"
        )
    return text, message


def _is_deep(message: dict[str, Any]) -> bool:
    """Return whether there is something more than MAX_DEPTH deep; no recursion of its own."""
    level: list[Any] = [message]
    for _ in range(MAX_DEPTH):
        inner = (value for one in level for value in (one.values() if isinstance(one, dict) else one))
        level = [value for value in inner if isinstance(value, dict | list)]
    return bool(level)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _station(message: dict[str, Any]) -> str:
    station = message.get("station")
    if not isinstance(station, str) or not 1 <= len(station) <= MAX_NAME_CHARACTERS or not station.isprintable():
        raise Unreadable(f"station {str(station)[:40]!r} found, need 1 to {MAX_NAME_CHARACTERS} printable characters")
    return station


def _epoch(message: dict[str, Any]) -> str:
    epoch = message.get("epoch")
    if not isinstance(epoch, str) or not EPOCH.fullmatch(epoch):
        raise Unreadable(f"epoch {str(epoch)[:40]!r} found, need 12 hex digits")
    return epoch


def _seq(message: dict[str, Any], field: str) -> int:
    seq = message.get(field)
    if not _is_whole(seq) or not 1 <= seq <= MAX_SEQ:
        raise Unreadable(f"{field} {str(seq)[:40]!r} found, need a whole number from 1")
    return seq


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _count_or_none(value: Any) -> int | None:
    return value if _is_whole(value) and 0 <= value <= MAX_SEQ else None


def _number_or_none(value: Any) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool) or abs(value) > 1e308 or not isfinite(value):
        return None
    return float(value)


def _text_or_none(value: Any) -> str | None:
    return storable(value) if isinstance(value, str) else None


def _moment_or_none(value: Any) -> datetime | None:
    try:
        moment = datetime.fromisoformat(value)
        return moment.astimezone(UTC) if moment.tzinfo is not None else None
    except (TypeError, ValueError, OverflowError):
        return None
