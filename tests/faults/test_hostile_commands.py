"""100,000 hostile messages: nothing raises, and only what is valid, fresh and allowed has an effect.

What is valid is decided a second time by the oracle below, which shares no code with the agent: plain comparisons
in place of the JSON Schema, and a dictionary in place of the log.
"""

import json
import random
import re
from datetime import UTC, datetime, timedelta

import pytest

from agent.commands.commands import Commands, MemoryOperations
from agent.commands.log import CommandLog

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
ALLOWED = frozenset({"recipe", "pause", "capture", "threshold"})
ARGUMENTS = {
    "recipe": {"name": "cable"},
    "pause": {"reason": "shift change"},
    "resume": {},
    "capture": {"count": 5},
    "threshold": {"score": 0.25},
    "selftest": {},
}
NAMES = [*ARGUMENTS, "../recipe", "recipe/reply", "", "unknown", "Recipe", "recipe\n", "#", "+", "\ud800", "r" * 70_000]
VALUES = [
    *(None, True, False, 0, -1, 1, 1.0, 0.5, -0.0, 1e308, 2**53, 2**53 - 1, 2**64, 10**19, "", "5", "\ud800", "\u202e"),
    *(
        "../../etc/passwd",
        "a\x00b",
        "x" * 5000,
        "{" * 300,
        [],
        {},
        [[[]]],
        {"count": 5},
        {"name": {"name": 1}},
        ["mes"],
    ),
    *("mes\n", "taktsight.command/1", "2026-11-22T12:10:00Z", "2026-11-22T11:59:59.999Z", "2026-11-22T13:00:00.001Z"),
    *("2026-11-22T12:60:00Z", "2026-11-22T12:00:00.000Z", "9999-12-31T23:59:59Z", "0000-00-00T00:00:00Z", "bottle", 7),
]
RAW = [b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"1" * 25, b"[" * 5000, b'{"a":' * 900, b"-0", b"01", b'"\\ud800"']


class Fuzz:
    """Hostile messages from a seed; a good command now and then, so that the state moves."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.last_id = 1_700_000_000_000

    def message(self):
        """Return (name, payload, retained)."""
        dice = self.random.random()
        name = self.random.choice(list(ARGUMENTS)) if dice < 0.9 else self.random.choice(NAMES)
        return name, self.payload(name), self.random.random() < 0.02

    def payload(self, name):
        kind = self.random.choice(
            [self.flipped, self.cut, self.swapped, self.swapped, self.raw, self.twice, self.noise]
        )
        if self.random.random() < 0.03:
            return json.dumps(self.good(name)).encode()
        return kind(name)

    def good(self, name):
        self.last_id += self.random.choice([0, 1, 1, 1, 1000])
        return {
            "schema": "taktsight.command/1",
            "issuer": self.random.choice(["mes", "scada", "m-2"]),
            "id": self.last_id - (5 if self.random.random() < 0.1 else 0),
            "expires": "2026-11-22T12:10:00.000Z",
            "arguments": ARGUMENTS.get(name, {}),
        }

    def flipped(self, name):
        data = bytearray(json.dumps(self.good(name)).encode())
        for _ in range(self.random.choice([1, 1, 2, 8])):
            data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
        return bytes(data)

    def cut(self, name):
        data = json.dumps(self.good(name)).encode()
        start, end = sorted(self.random.choices(range(len(data) + 1), k=2))
        return self.random.choice([data[:end], data[start:], data[:start] + data[end:], data + data[:end]])

    def swapped(self, name):
        """Another value, another type, a key too many, a key too few: at the top or in the arguments."""
        message = self.good(name)
        message["arguments"] = dict(message["arguments"])
        place = self.random.choice([message, message["arguments"]])
        key = self.random.choice([*place, "more", "__proto__", "\ud800"])
        if self.random.random() < 0.15:
            place.pop(key, None)
        else:
            place[key] = self.random.choice(VALUES)
        return json.dumps(message).encode()

    def raw(self, name):
        """JSON that Python would not write in place of one value."""
        parts = json.dumps(self.good(name)).encode().split(b": ")
        place = self.random.randrange(1, len(parts))
        rest = parts[place].find(b",")
        parts[place] = self.random.choice(RAW) + (parts[place][rest:] if rest >= 0 else b"}")
        return b": ".join(parts)

    def twice(self, name):
        message = json.dumps(self.good(name))
        key = self.random.choice(["id", "issuer", "schema", "arguments"])
        return f'{{"{key}": {json.dumps(self.random.choice(VALUES))}, {message[1:]}'.encode()

    def noise(self, name):
        size = self.random.choice([0, 1, 10, 100, 1000, 16_385])
        return self.random.randbytes(size) if self.random.random() < 0.5 else b'{"a":[1,' * (size // 8)


class Oracle:
    """Says whether a message is a valid, fresh, allowed command, and remembers which ids are used up."""

    def __init__(self):
        self.last_ids = {}

    def argument(self, name, payload, retained):
        """Return the call that the message should lead to, None if it should lead to none."""
        message = None if retained or name not in ARGUMENTS or len(payload) > 16_384 else strict_json(payload)
        if not isinstance(message, dict) or not well_formed(name, message):
            return None
        issuer, number = message["issuer"], message["id"]
        if number <= self.last_ids.get(issuer, 0) or (issuer not in self.last_ids and len(self.last_ids) >= 64):
            return None
        self.last_ids[issuer] = number
        expires = moment(message["expires"])
        if name not in ALLOWED or not NOON < expires <= NOON + timedelta(hours=1):
            return None
        value = next(iter(message["arguments"].values()))
        return name, "".join(c if c.isprintable() else "?" for c in value) if name == "pause" else value


def moment(expires):
    whole = datetime.strptime(expires[:19] + "+0000", "%Y-%m-%dT%H:%M:%S%z")
    return whole + timedelta(seconds=float("0" + expires[19:-1]))


def strict_json(payload):
    def closed(pairs):
        assert len({key for key, _ in pairs}) == len(pairs)
        return dict(pairs)

    def whole(digits):
        assert len(digits) <= 20
        return int(digits)

    try:
        return json.loads(payload.decode(), object_pairs_hook=closed, parse_int=whole)
    except (ValueError, AssertionError, RecursionError):
        return None


def is_whole(value, most):
    return type(value) in (int, float) and value == value // 1 and 1 <= value <= most


def well_formed(name, message):
    if set(message) != {"schema", "issuer", "id", "expires", "arguments"} or message["schema"] != "taktsight.command/1":
        return False
    issuer, expires, arguments = message["issuer"], message["expires"], message["arguments"]
    if not isinstance(issuer, str) or not re.fullmatch("[A-Za-z0-9_-]{1,32}", issuer):
        return False
    if not is_whole(message["id"], 2**53 - 1) or not isinstance(expires, str):
        return False
    if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?Z", expires):
        return False
    try:
        moment(expires)
    except ValueError:
        return False
    return isinstance(arguments, dict) and set(arguments) == set(ARGUMENTS[name]) and fits(name, arguments)


def fits(name, arguments):
    value = next(iter(arguments.values()), None)
    if name == "recipe":
        return isinstance(value, str) and re.fullmatch("[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", value) is not None
    if name == "pause":
        return isinstance(value, str) and 1 <= len(value) <= 200
    if name == "capture":
        return is_whole(value, 1000)
    if name == "threshold":
        return value is None or (type(value) in (int, float) and 0 < value < float("inf"))
    return True


class Attack:
    """A station with a fresh log, the oracle beside it, and a clock that counts messages."""

    def __init__(self, folder):
        self.folder = folder
        self.oracle = Oracle()
        self.operations = MemoryOperations()
        self.expected = []
        self.replies = self.messages = 0
        self.start()

    def start(self):
        self.log = CommandLog(self.folder, "cell7")
        self.commands = Commands(
            self.operations,
            self.log,
            station="cell7",
            run="0123456789ab",
            allow=ALLOWED,
            utc_now=lambda: NOON,
            monotonic_s=lambda: self.messages / 1000,
        )

    def restart(self):
        self.log.close()
        self.start()

    def send(self, message):
        self.messages += 1
        call = self.oracle.argument(*message)
        self.expected += [] if call is None else [call]
        reply = self.commands.handle(*message)
        assert self.operations.calls[-1:] == self.expected[-1:], message
        assert len(self.operations.calls) == len(self.expected), message
        assert call is None or reply["result"] in ("done", "failed")
        self.replies += reply is not None


def test_of_100_000_hostile_messages_only_the_valid_fresh_allowed_ones_have_an_effect(tmp_path):
    fuzz = Fuzz(seed=7)
    effects = 0
    for block in range(100):  # afresh now and then: a flipped bit soon makes an id that is the highest for ever
        attack = Attack(tmp_path / str(block))
        for number in range(1000):
            if number == 500:
                attack.restart()
            attack.send(fuzz.message())
        last_ids = {issuer: attack.log.last_id(issuer) for issuer in attack.oracle.last_ids}
        attack.log.close()
        assert last_ids == attack.oracle.last_ids
        assert attack.replies < 500
        assert sum(file.stat().st_size for file in attack.folder.iterdir()) < 2e6
        effects += len(attack.expected)
    assert effects > 2000  # the fuzz reached what it was to protect


@pytest.mark.parametrize("size", [16 * 1024, 10_000_000])
@pytest.mark.parametrize(
    "pattern", [b'"', b"\\", b'"\\"', b"[", b"{", b'{"a":', b"9", b"\xf0\x9f\x98\x80", b" ", b"-", b"\x00"]
)
def test_one_pattern_over_and_over_is_refused(tmp_path, pattern, size):
    log, operations = CommandLog(tmp_path, "cell7"), MemoryOperations()
    target = Commands(operations, log, station="cell7", run="0" * 12, allow=ALLOWED)
    payload = pattern * (size // len(pattern))
    for wrapped in (payload, b'{"issuer": "mes", "arguments": ' + payload, b'{"issuer": "' + payload + b'"}'):
        assert target.handle("pause", wrapped, False)["result"] == "refused"
    assert operations.calls == []
    log.close()
