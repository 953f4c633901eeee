"""Remote commands: what comes in on cmd/{name} is checked, applied once, audited and answered.

In this order, cheap checks first: retained, name, size, text, JSON, `interface/command.schema.json`; then, for one that
is well-formed: used before, issuer, allowed here, in time. A well-formed command with a new id uses this id up,
refused or not. Then the intent is written, the command applied, the outcome written: nothing is applied that is not in
the audit trail, and an intent without outcome tells that the station ended in between.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

from agent.commands.log import MOST_ISSUERS, CommandLog, Entry
from agent.commands.message import COMMANDS, Command, Refusal, printable, read_command
from agent.errors import StorageError
from calibration.errors import RecipeError, TaktsightError

log = logging.getLogger(__name__)

REPLY_SCHEMA = "taktsight.reply/1"
UNKNOWN = "unknown"  # stands in replies for a name that is none of COMMANDS: nothing foreign goes into a topic

FARTHEST_EXPIRY = timedelta(hours=1)
MOST_DETAIL_CHARACTERS = 500
MOST_VALUE_CHARACTERS = 1000  # of before and after, as JSON
REFUSALS_PER_S = 10
SUMMARY_EVERY_S = 60.0
INTERRUPTED = (
    "interrupted: the station ended before the outcome was written; look at its status whether the command was "
    "applied, then send it with a new id if it was not"
)


@dataclass(frozen=True, slots=True)
class Change:
    """What an operation changed: small JSON values, None where there is nothing to tell."""

    before: Any
    after: Any
    detail: str = ""  # one sentence for a person


class Operations(Protocol):
    """What can be asked of a station. Each call returns when the change holds, applied between two parts.

    Each raises TaktsightError if nothing was changed, or if nobody knows; its text says which, to the one who asked.
    """

    def change_recipe(self, name: str) -> Change:
        """Inspect with the recipe of this file stem in the station's folder of recipes."""

    def pause(self, reason: str) -> Change:
        """Give every part no_verdict, reason paused, until `resume`."""

    def resume(self) -> Change:
        """Inspect again, after a pause or a halt."""

    def capture(self, count: int) -> Change:
        """Keep the pictures of the next `count` parts."""

    def set_threshold(self, score: float | None) -> Change:
        """Reject above this score; None: the recipe's own."""

    def self_test(self) -> Change:
        """Let the engine reproduce the answers that came with the recipe."""


class MemoryOperations:
    """Does everything in memory and lists the calls: for tests, and for rehearsals without a line."""

    def __init__(self, recipes: tuple[str, ...] = ("bottle", "cable")) -> None:
        self.recipes = recipes
        self.recipe = recipes[0]
        self.paused: str | None = None
        self.threshold: float | None = None
        self.calls: list[tuple[str, Any]] = []  # (command, argument)
        self.trouble: Exception | None = None  # raised by every call while it is set

    def change_recipe(self, name: str) -> Change:
        """Raises RecipeError if the name is not in `recipes`."""
        self._note("recipe", name)
        if name not in self.recipes:
            raise RecipeError(
                f"recipe {name!r} not found, have {', '.join(self.recipes)}: send it to the station first"
            )
        change = Change(self.recipe, name)
        self.recipe = name
        return change

    def pause(self, reason: str) -> Change:
        """Keep the reason."""
        self._note("pause", reason)
        change = Change(self.paused, reason)
        self.paused = reason
        return change

    def resume(self) -> Change:
        """Forget the reason."""
        self._note("resume", None)
        change = Change(self.paused, None)
        self.paused = None
        return change

    def capture(self, count: int) -> Change:
        """Take note, no pictures."""
        self._note("capture", count)
        return Change(0, count)

    def set_threshold(self, score: float | None) -> Change:
        """Keep the score."""
        self._note("threshold", score)
        change = Change(self.threshold, score)
        self.threshold = score
        return change

    def self_test(self) -> Change:
        """Always well."""
        self._note("selftest", None)
        return Change(None, None, "all answers reproduced")

    def _note(self, command: str, argument: Any) -> None:
        self.calls.append((command, argument))
        if self.trouble is not None:
            raise self.trouble


_APPLY: dict[str, Callable[[Operations, dict[str, Any]], Change]] = {
    "recipe": lambda operations, arguments: operations.change_recipe(arguments["name"]),
    "pause": lambda operations, arguments: operations.pause(arguments["reason"]),
    "resume": lambda operations, _: operations.resume(),
    "capture": lambda operations, arguments: operations.capture(int(arguments["count"])),  # 5.0 is an integer too
    "threshold": lambda operations, arguments: operations.set_threshold(arguments["score"]),
    "selftest": lambda operations, _: operations.self_test(),
}


class Commands:
    """Answers commands, one at a time, in one thread."""

    def __init__(
        self,
        operations: Operations,
        log: CommandLog,
        *,
        station: str,
        run: str,
        allow: frozenset[str],
        audited: Callable[[Entry], object] = lambda _: None,
        utc_now: Callable[[], datetime] = lambda: datetime.now(UTC),
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """allow: those of COMMANDS that are carried out; the others are refused. Raises ValueError on another name.

        audited: is told the outcome of each that was carried out.
        """
        if not allow <= set(COMMANDS):
            raise ValueError(f"allow {sorted(allow)}: want some of {', '.join(COMMANDS)}")
        self._operations = operations
        self._log = log
        self._station = station
        self._run = run
        self._allow = allow
        self._audited = audited
        self._utc_now = utc_now
        self._unreadable = _Allowance(monotonic_s)
        self._readable = _Allowance(
            monotonic_s
        )  # apart: a flood of nonsense must not silence refusals to known issuers
        self._summary = _Summary(monotonic_s)
        self._unwritten: Entry | None = None  # an outcome that could not be written: goes first, before anything new
        self.refused = 0  # since the run began, those without reply too

    def handle(self, name: str, payload: bytes, retained: bool) -> dict[str, Any] | None:
        """Return the reply (taktsight.reply/1, for cmd/{its "command"}/reply), None where a flood gets none.

        name: last level of the topic. Never raises.
        """
        try:
            return self._answer(read_command(name, payload, retained))
        except Refusal as refusal:
            return self._refuse(name, refusal)

    def _answer(self, command: Command) -> dict[str, Any] | None:
        """Return the reply to a well-formed command. Raises Refusal where its id is not used up."""
        try:
            earlier = self._earlier(command)
            if earlier is not None:
                return self._repeat(command, earlier)
            self._check_id(command)
            self._write_unwritten()
            entry = self._intent(command)
            objection = self._objection(command)
            if objection is not None:
                entry = replace(entry, result="refused", detail=_short(objection), ended_utc=entry.began_utc)
            self._log.add(entry)
        except StorageError as error:
            detail = f"nothing was done, because it could not be recorded: {error}"
            raise Refusal(detail, command.issuer, command.command_id) from error
        if entry.result is not None:
            self._count_refusal(f"{command.name} by {command.issuer}: {entry.detail}")
            return self._reply_to(entry)
        return self._concluded(self._applied(command, entry))

    def _earlier(self, command: Command) -> Entry | None:
        """Return what became of the same issuer's command with the same id."""
        waiting = self._unwritten
        if waiting is not None and (waiting.issuer, waiting.command_id) == (command.issuer, command.command_id):
            return waiting
        return self._log.find(command.issuer, command.command_id)

    def _repeat(self, command: Command, earlier: Entry) -> dict[str, Any] | None:
        """Return the stored reply again. Raises Refusal if it belongs to another command."""
        if (earlier.command, earlier.arguments) != (command.name, command.arguments):
            raise Refusal(
                f"id {command.command_id} was given to another command before ({earlier.command}, "
                f"{earlier.began_utc}): send this one with a new id",
                command.issuer,
                command.command_id,
            )
        if not self._readable.take():
            return None
        if earlier.result is None:
            earlier = replace(earlier, result="failed", detail=INTERRUPTED, ended_utc=_utc_text(self._utc_now()))
            return self._concluded(earlier)
        return self._reply_to(earlier)

    def _check_id(self, command: Command) -> None:
        last_id = self._log.last_id(command.issuer)
        if last_id is None and self._log.is_full():
            raise Refusal(
                f"issuer {command.issuer} is new, and {MOST_ISSUERS} are known, which is the most: use one of those",
                command.issuer,
                command.command_id,
            )
        if last_id is not None and command.command_id <= last_id:
            raise Refusal(
                f"id {command.command_id} found, want one above {last_id}: milliseconds since 1970 is a good one",
                command.issuer,
                command.command_id,
            )

    def _objection(self, command: Command) -> str | None:
        """Return why a new command is not carried out."""
        if command.name not in self._allow:
            allowed = ", ".join(sorted(self._allow)) or "no command"
            return f"{command.name} is not allowed here, {allowed} is: change the station's settings if it should be"
        now = self._utc_now()
        clocks = f"{_utc_text(now)} on this station's clock"
        if command.expires <= now:
            return f"expired at {_utc_text(command.expires)}, it is {clocks}: compare clocks, send with a new id"
        if command.expires - now > FARTHEST_EXPIRY:
            return f"expires at {_utc_text(command.expires)}, want at most 1 h ahead; it is {clocks}: compare clocks"
        return None

    def _intent(self, command: Command) -> Entry:
        return Entry(
            run=self._run,
            began_utc=_utc_text(self._utc_now()),
            command=command.name,
            issuer=command.issuer,
            command_id=command.command_id,
            arguments=command.arguments,
        )

    def _applied(self, command: Command, intent: Entry) -> Entry:
        """Carry the command out and return how it ended."""
        before = after = None
        try:
            change = _APPLY[command.name](self._operations, command.arguments)
            result, detail = "done", change.detail or "done"
            before, after = _storable(change.before), _storable(change.after)
        except TaktsightError as error:
            result, detail = "failed", str(error) or type(error).__name__
        except Exception as error:  # the one broad except round a single command: the next one must find us alive
            log.exception("%s by %s could not be carried out", command.name, command.issuer)
            result, detail = "failed", f"{type(error).__name__}: {error}: see the station's log"
        log.info("%s %s by %s, id %d: %s: %s", command.name, command.arguments, command.issuer, command.command_id,
                 result, _short(detail))  # fmt: skip
        ended = _utc_text(self._utc_now())
        return replace(intent, ended_utc=ended, before=before, after=after, result=result, detail=_short(detail))

    def _concluded(self, entry: Entry) -> dict[str, Any]:
        """Write the outcome, or keep it to be written before anything else is carried out; return the reply."""
        self._audited(entry)
        try:
            self._log.finish(entry)
        except StorageError as error:
            log.error("%s by %s ended, which could not be recorded yet: %s", entry.command, entry.issuer, error)
            self._unwritten = self._unwritten or entry  # an interrupted one can be found again
        return self._reply_to(entry)

    def _write_unwritten(self) -> None:
        if self._unwritten is not None:
            self._log.finish(self._unwritten)
            self._unwritten = None

    def _refuse(self, name: str, refusal: Refusal) -> dict[str, Any] | None:
        """Return the reply to what uses up no id, None if there were too many; what is replied is audited, too."""
        detail = _short(str(refusal))
        command = name if name in COMMANDS else UNKNOWN
        self._count_refusal(f"{command} by {refusal.issuer}: {detail}")
        if not (self._unreadable if refusal.issuer is None else self._readable).take():
            return None
        now, last_id = _utc_text(self._utc_now()), None
        entry = Entry(self._run, now, command, refusal.issuer, ended_utc=now, result="refused", detail=detail)
        try:
            last_id = None if refusal.issuer is None else self._log.last_id(refusal.issuer)
            self._log.add(entry)
        except StorageError as error:
            self._summary.say(f"refusals are not in the audit trail: {error}")
        entry = replace(entry, command_id=refusal.command_id)  # for the reply: in the log it would use up the id
        return {**self._reply_to(entry), "lastId": last_id}

    def _reply_to(self, entry: Entry) -> dict[str, Any]:
        return {
            "schema": REPLY_SCHEMA,
            "station": self._station,
            "run": entry.run,
            "command": entry.command,
            "issuer": entry.issuer,
            "id": entry.command_id,
            "result": entry.result,
            "detail": entry.detail,
            "before": entry.before,
            "after": entry.after,
            "lastId": entry.command_id,  # a new id is always the last
            "creationTime": entry.ended_utc,
        }

    def _count_refusal(self, what: str) -> None:
        self.refused += 1
        self._summary.say(f"command refused: {what}")


class _Allowance:
    """At most REFUSALS_PER_S in any second."""

    def __init__(self, monotonic_s: Callable[[], float]) -> None:
        self._monotonic_s = monotonic_s
        self._taken_s: deque[float] = deque(maxlen=REFUSALS_PER_S)

    def take(self) -> bool:
        """Return whether there is one left, and take it."""
        now_s = self._monotonic_s()
        if len(self._taken_s) == REFUSALS_PER_S and now_s - self._taken_s[0] < 1.0:
            return False
        self._taken_s.append(now_s)
        return True


class _Summary:
    """Log lines that may come in floods: the first at once, then one a minute that counts the others."""

    def __init__(self, monotonic_s: Callable[[], float]) -> None:
        self._monotonic_s = monotonic_s
        self._silent_until_s = -math.inf
        self._unsaid = 0

    def say(self, text: str) -> None:
        """Log the text, or count it."""
        self._unsaid += 1
        now_s = self._monotonic_s()
        if now_s >= self._silent_until_s:
            log.warning("%s (%d such since the last line)", text, self._unsaid)
            self._silent_until_s, self._unsaid = now_s + SUMMARY_EVERY_S, 0


def _storable(value: Any) -> Any:
    """Return a JSON value of bounded size: what is none, or too large, as the beginning of its text."""
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        text = repr(value)
    else:
        if len(text) <= MOST_VALUE_CHARACTERS:
            return json.loads(text)
    return printable(text, MOST_VALUE_CHARACTERS)


def _short(detail: str) -> str:
    return printable(detail, MOST_DETAIL_CHARACTERS)


def _utc_text(moment: datetime) -> str:
    """Return UTC as ISO 8601 with milliseconds and Z."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
