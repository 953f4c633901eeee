import json
import logging
import tempfile
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

import agent
from agent.commands.commands import INTERRUPTED, REFUSALS_PER_S, Commands, MemoryOperations
from agent.commands.log import FILE_NAME, MOST_ISSUERS, CommandLog, Entry
from agent.commands.message import COMMANDS, MOST_BYTES, printable
from agent.errors import StorageError
from calibration.errors import RecipeError

INTERFACE = Path(agent.__file__).parent / "interface"
COMMAND_SCHEMA = json.loads((INTERFACE / "command.schema.json").read_text(encoding="utf-8"))
REPLY_SCHEMA = json.loads((INTERFACE / "reply.schema.json").read_text(encoding="utf-8"))
REPLY = Draft202012Validator(REPLY_SCHEMA)
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
EXAMPLES = {
    "recipe": {"name": "cable"},
    "pause": {"reason": "shift change"},
    "resume": {},
    "capture": {"count": 5},
    "threshold": {"score": 0.25},
    "selftest": {},
}
MOST_ID = 2**53 - 1


class Bench:
    """Commands on a log in a folder, with clocks that are set by hand; every reply is held against the schema."""

    def __init__(self, folder, allow=frozenset(COMMANDS)):
        self.folder = folder
        self.allow = allow
        self.operations = MemoryOperations()
        self.now = NOON
        self.monotonic_s = 0.0
        self.runs = 0
        self.start()

    def start(self):
        self.runs += 1
        self.log = CommandLog(self.folder, "cell7")
        self.commands = Commands(
            self.operations,
            self.log,
            station="cell7",
            run=f"{self.runs:012x}",
            allow=self.allow,
            utc_now=lambda: self.now,
            monotonic_s=lambda: self.monotonic_s,
        )

    def restart(self):
        self.log.close()
        self.start()

    def handle(self, name, payload, retained=False):
        reply = self.commands.handle(name, payload, retained)
        if reply is not None:
            assert list(REPLY.iter_errors(json.loads(json.dumps(reply, allow_nan=False)))) == []
            assert list(reply) == REPLY_SCHEMA["required"]
        return reply

    def send(self, name, command_id=1, **fields):
        self.monotonic_s += 1
        return self.handle(name, payload(name, command_id, now=self.now, **fields))


def payload(name="capture", command_id=1, *, now=NOON, minutes=10, **fields):
    message = {
        "schema": "taktsight.command/1",
        "issuer": "mes",
        "id": command_id,
        "expires": (now + timedelta(minutes=minutes)).isoformat().replace("+00:00", "Z"),
        "arguments": EXAMPLES.get(name, {}),
        **fields,
    }
    return json.dumps(message).encode()


@contextmanager
def bench_in_a_folder_of_its_own():
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        yield bench
        bench.log.close()


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path)
    yield bench
    bench.log.close()


def fill_the_disk(bench):
    pages = bench.log._database.execute("PRAGMA page_count").fetchone()[0]
    bench.log._database.execute(f"PRAGMA max_page_count = {pages}")
    with suppress(StorageError):
        while True:  # until no line fits any more
            bench.log.add(Entry("0" * 12, "", "pause"))


def empty_the_disk(bench):
    bench.log._database.execute("PRAGMA max_page_count = 1000000")


# ---- what is carried out ----


@pytest.mark.parametrize(
    ("name", "called", "before", "after"),
    [
        ("recipe", "cable", "bottle", "cable"),
        ("pause", "shift change", None, "shift change"),
        ("resume", None, None, None),
        ("capture", 5, 0, 5),
        ("threshold", 0.25, None, 0.25),
        ("selftest", None, None, None),
    ],
)
def test_a_good_command_is_carried_out_answered_and_audited(bench, name, called, before, after):
    reply = bench.send(name, 7)
    assert bench.operations.calls == [(name, called)]
    assert reply == {
        "schema": "taktsight.reply/1",
        "station": "cell7",
        "run": "000000000001",
        "command": name,
        "issuer": "mes",
        "id": 7,
        "result": "done",
        "detail": reply["detail"],
        "before": before,
        "after": after,
        "lastId": 7,
        "creationTime": "2026-11-22T12:00:00.000Z",
    }
    (line,) = bench.log.trail()
    assert (line.issuer, line.command_id, line.command, line.arguments) == ("mes", 7, name, EXAMPLES[name])
    assert (line.before, line.after, line.result) == (before, after, "done")
    assert line.began_utc == line.ended_utc == "2026-11-22T12:00:00.000Z"


def test_the_schemas_are_schemas_and_every_example_fits():
    Draft202012Validator.check_schema(COMMAND_SCHEMA)
    Draft202012Validator.check_schema(REPLY_SCHEMA)
    for name in COMMANDS:
        assert Draft202012Validator(COMMAND_SCHEMA).is_valid(json.loads(payload(name)))
        arguments = {"$defs": COMMAND_SCHEMA["$defs"], "$ref": f"#/$defs/{name}Arguments"}
        assert Draft202012Validator(arguments).is_valid(EXAMPLES[name])


def test_the_threshold_goes_back_to_the_recipes_own_with_null(bench):
    bench.send("threshold", 1)
    reply = bench.send("threshold", 2, arguments={"score": None})
    assert (reply["before"], reply["after"], bench.operations.threshold) == (0.25, None, None)


def test_an_integer_written_as_a_float_is_one(bench):
    reply = bench.send("capture", 7.0, arguments={"count": 5.0})
    assert (reply["id"], reply["result"]) == (7, "done")
    assert [type(reply["id"]), *(type(value) for _, value in bench.operations.calls)] == [int, int]


@pytest.mark.parametrize(
    "expires", ["2026-11-22T12:10:00Z", "2026-11-22T13:00:00.000Z", "2026-11-22T12:10:00.1234567Z"]
)
def test_the_usual_ways_to_write_a_time_are_taken(bench, expires):
    assert bench.send("resume", expires=expires)["result"] == "done"


def test_a_failed_operation_says_why_and_later_commands_go_on(bench):
    reply = bench.send("recipe", 1, arguments={"name": "teapot"})
    assert reply["result"] == "failed"
    assert "'teapot' not found" in reply["detail"]
    assert (reply["before"], reply["after"]) == (None, None)
    assert bench.operations.recipe == "bottle"
    assert bench.send("recipe", 2)["result"] == "done"


def test_an_operation_that_breaks_is_failed_with_a_traceback_in_the_log(bench, caplog):
    bench.operations.trouble = ZeroDivisionError("division by zero")
    reply = bench.send("selftest", 1)
    assert reply["result"] == "failed"
    assert reply["detail"].startswith("ZeroDivisionError: division by zero")
    assert caplog.records[0].exc_info is not None
    bench.operations.trouble = None
    assert bench.send("selftest", 2)["result"] == "done"


def test_an_error_without_text_is_named(bench):
    bench.operations.trouble = RecipeError()
    assert bench.send("selftest")["detail"] == "RecipeError"


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, object(), "x" * 5000, ["\n"] * 5000])
def test_whatever_an_operation_returns_the_reply_is_small_json(bench, value):
    bench.operations.threshold = value
    reply = bench.send("threshold")
    assert reply["result"] == "done"
    assert isinstance(reply["before"], str)
    assert len(reply["before"]) <= 1000


def test_foreign_text_is_made_printable_before_it_goes_anywhere(bench, caplog):
    caplog.set_level(logging.INFO)
    reply = bench.send("pause", arguments={"reason": "a\nb\x1b[31m\u202ec\ud800"})
    assert reply["after"] == bench.operations.paused == "a?b?[31m?c?"
    assert "a?b?[31m?c?" in caplog.text
    assert bench.log.trail()[0].arguments == {"reason": "a?b?[31m?c?"}


def test_printable_shortens():
    assert printable("x" * 300, 10) == "xxxxxxx..."
    assert printable("x" * 10, 10) == "x" * 10


# ---- what is refused ----


def refused(bench, name="capture", data=None, retained=False):
    reply = bench.handle(name, payload(name) if data is None else data, retained)
    assert reply["result"] == "refused"
    assert bench.operations.calls == []
    return reply


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no JSON"),
        (b"\xff\xfe", "byte 0 is no UTF-8"),
        (b"\xef\xbb\xbf{}", "no JSON"),
        (b"{} {}", "no JSON"),
        (b" " * (MOST_BYTES + 1), "16385 bytes"),
        (b"[" * 10_000, "10000 opening brackets"),
        (b'{"a":' * 3000, "3000 opening brackets"),
        (b'{"a": 1, "a": 1}', "a key is given twice"),
        (b'{"id": NaN}', "NaN is no number"),
        (b'{"id": -Infinity}', "-Infinity is no number"),
        (b'{"id": 1e999}', "beyond what a float holds"),
        (b'{"id": ' + b"9" * 10_000 + b"}", "10000 digits"),
        (b"[]", "$: [] is not of type 'object'"),
        (b"null", "$: None is not of type 'object'"),
    ],
)
def test_what_is_no_command_is_refused_without_issuer(bench, data, why):
    reply = refused(bench, data=data)
    assert why in reply["detail"]
    assert (reply["issuer"], reply["id"], reply["lastId"]) == (None, None, None)


@pytest.mark.parametrize("name", ["../recipe", "", "RECIPE", "recipe/reply", "reply", "a\nb\x00\ud800" * 100])
def test_another_name_is_refused_and_goes_into_no_topic(bench, name):
    reply = refused(bench, name, payload("recipe"))
    assert reply["command"] == "unknown"
    assert "want one of recipe, pause" in reply["detail"]
    assert reply["detail"].isprintable()


def test_a_retained_command_is_refused(bench):
    assert "without retain" in refused(bench, retained=True)["detail"]


@pytest.mark.parametrize("field", COMMAND_SCHEMA["$defs"]["envelope"]["required"])
def test_a_command_without_one_of_its_fields_is_refused(bench, field):
    message = json.loads(payload())
    del message[field]
    reply = refused(bench, data=json.dumps(message).encode())
    assert f"'{field}' is a required property" in reply["detail"]


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "taktsight.command/2"},
        {"issuer": "mes\n"},
        {"issuer": ""},
        {"issuer": "m" * 33},
        {"issuer": "më"},
        {"issuer": ["mes"]},
        {"id": 0},
        {"id": True},
        {"id": "1"},
        {"id": 1.5},
        {"id": 2**53},
        {"expires": 1795000000},
        {"expires": "2026-11-22T12:10:00+00:00"},
        {"expires": "2026-11-22T12:10:00Z\n"},
        {"expires": "2026-11-22 12:10:00Z"},
        {"expires": "2026-11-22T12:10:00,5Z"},
        {"expires": "\u0662026-11-22T12:10:00Z"},
        {"expires": "2026-13-22T12:10:00Z"},
        {"expires": "2026-11-22T24:10:00Z"},
        {"expires": "0000-11-22T12:10:00Z"},
        {"arguments": None},
        {"arguments": {}},
        {"arguments": {"count": 0}},
        {"arguments": {"count": 1001}},
        {"arguments": {"count": True}},
        {"arguments": {"count": 1, "more": 1}},
        {"colour": "red"},
    ],
    ids=repr,
)
def test_a_command_with_something_wrong_is_refused_and_its_id_stays_free(bench, change):
    reply = refused(bench, data=payload(**change))
    assert reply["detail"].startswith("$")
    assert bench.log.last_id("mes") is None
    assert bench.send("capture", 1)["result"] == "done"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("recipe", {"name": "../bottle"}),
        ("recipe", {"name": ".."}),
        ("recipe", {"name": "/etc/passwd"}),
        ("recipe", {"name": "a\\b"}),
        ("recipe", {"name": "-rf"}),
        ("recipe", {"name": "bottle\n"}),
        ("recipe", {"name": "bottle\x00"}),
        ("recipe", {"name": ""}),
        ("recipe", {"name": "b" * 101}),
        ("recipe", {"name": {"a": "b"}}),
        ("pause", {"reason": ""}),
        ("pause", {"reason": "x" * 201}),
        ("resume", {"now": True}),
        ("threshold", {}),
        ("threshold", {"score": 0}),
        ("threshold", {"score": -1}),
        ("threshold", {"score": False}),
        ("threshold", {"score": "0.5"}),
        ("selftest", []),
    ],
)
def test_arguments_that_do_not_fit_are_refused(bench, name, arguments):
    reply = refused(bench, name, payload(name, arguments=arguments))
    assert reply["detail"].startswith("$.arguments")
    assert (reply["issuer"], reply["id"]) == ("mes", 1)


def test_the_arguments_of_one_command_do_not_fit_another(bench):
    for name in COMMANDS:
        for other in COMMANDS:
            if EXAMPLES[name] != EXAMPLES[other]:
                bench.monotonic_s += 1
                refused(bench, name, payload(other))


def test_only_what_the_station_allows_is_carried_out(tmp_path):
    bench = Bench(tmp_path, allow=frozenset({"capture", "pause"}))
    reply = refused(bench, "threshold")
    assert "threshold is not allowed here, capture, pause is" in reply["detail"]
    assert bench.send("capture", 2)["result"] == "done"
    bench.log.close()


def test_a_name_that_is_no_command_cannot_be_allowed(bench):
    with pytest.raises(ValueError, match="want some of"):
        Commands(bench.operations, bench.log, station="cell7", run="0" * 12, allow=frozenset({"reboot"}))


@pytest.mark.parametrize(
    ("minutes", "why"),
    [(0, "expired at"), (-1, "expired at"), (60.1, "want at most 1 h ahead"), (-(10**6), "expired"), (10**6, "1 h")],
)
def test_a_command_out_of_its_time_is_refused_with_the_stations_time(bench, minutes, why):
    reply = refused(bench, data=payload(minutes=minutes))
    assert why in reply["detail"]
    assert "2026-11-22T12:00:00.000Z on this station's clock" in reply["detail"]
    assert reply["creationTime"] == "2026-11-22T12:00:00.000Z"


def test_a_command_refused_for_its_time_stays_refused_when_the_clock_steps(bench):
    captured = payload(command_id=5, minutes=-30)
    first = refused(bench, data=captured)
    bench.now = NOON - timedelta(hours=1)
    assert refused(bench, data=captured) == first
    bench.restart()
    assert refused(bench, data=captured) == first


def test_an_issuer_too_many_is_refused_and_the_known_ones_go_on(bench):
    for number in range(MOST_ISSUERS):
        bench.send("resume", issuer=f"client{number}")
    reply = bench.send("resume", issuer="one-more")
    assert (reply["result"], reply["lastId"]) == ("refused", None)
    assert "64 are known" in reply["detail"]
    assert bench.send("resume", 2, issuer="client0")["result"] == "done"
    assert len(bench.operations.calls) == MOST_ISSUERS + 1


# ---- a flood ----


def test_a_flood_of_nonsense_gets_ten_replies_a_second(bench):
    replies = [bench.handle("recipe", b"nonsense") for _ in range(1000)]
    assert sum(reply is not None for reply in replies) == REFUSALS_PER_S
    assert bench.commands.refused == 1000
    assert len(bench.log.trail()) == REFUSALS_PER_S
    bench.monotonic_s += 1.0
    assert bench.handle("recipe", b"nonsense") is not None


def test_a_flood_of_nonsense_silences_no_refusal_to_a_known_issuer_and_no_command(bench):
    for _ in range(100):
        bench.handle("recipe", b"nonsense")
    assert bench.handle("capture", payload(minutes=0))["result"] == "refused"
    assert bench.handle("capture", payload(command_id=1, arguments={}))["issuer"] == "mes"
    assert bench.handle("capture", payload(command_id=2))["result"] == "done"


def test_a_flood_of_repeats_is_not_amplified_and_not_written(bench):
    bench.send("capture", 1)
    lines = len(bench.log.trail())
    replies = [bench.handle("capture", payload()) for _ in range(1000)]
    assert sum(reply is not None for reply in replies) == REFUSALS_PER_S
    assert len(bench.log.trail()) == lines
    assert bench.operations.calls == [("capture", 5)]


def test_a_flood_is_two_lines_in_the_log_and_the_second_counts_it(bench, caplog):
    for _ in range(1000):
        bench.handle("recipe", b"nonsense")
    bench.monotonic_s += 61
    bench.handle("recipe", b"nonsense")
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "1000 such" in caplog.records[1].getMessage()


# ---- once each, in order ----


def test_the_same_command_again_gets_the_same_reply_and_has_no_effect(bench):
    first = bench.send("capture", 1)
    bench.send("pause", 2)
    bench.now += timedelta(days=1)
    for _ in range(3):
        assert bench.send("capture", 1) == first
        bench.restart()
    assert bench.operations.calls == [("capture", 5), ("pause", "shift change")]


def test_the_same_id_for_another_command_is_refused(bench):
    bench.send("capture", 1)
    reply = bench.send("capture", 1, arguments={"count": 6})
    assert (reply["result"], reply["lastId"]) == ("refused", 1)
    assert "given to another command" in reply["detail"]
    assert bench.operations.calls == [("capture", 5)]


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("step", [timedelta(0), timedelta(days=-400), timedelta(minutes=5)])
def test_a_lower_id_is_refused_with_the_last_one_whatever_clock_and_restarts_do(bench, restart, step):
    captured = payload(command_id=8)
    bench.send("capture", 9)
    bench.now += step
    if restart:
        bench.restart()
    reply = bench.handle("capture", captured)
    assert (reply["result"], reply["id"], reply["lastId"]) == ("refused", 8, 9)
    assert len(bench.operations.calls) == 1


def test_a_reply_that_was_lost_can_be_asked_for_after_the_command_expired(bench):
    sent = payload(command_id=8)
    first = bench.handle("capture", sent)
    bench.now += timedelta(hours=5)
    bench.restart()
    assert bench.handle("capture", sent) == first


def test_a_command_that_a_crash_interrupted_is_failed_and_not_tried_again(bench):
    bench.operations.trouble = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        bench.send("capture", 3)
    bench.operations.trouble = None
    bench.restart()
    assert bench.log.trail()[0].result is None
    reply = bench.send("capture", 3)
    assert (reply["result"], reply["detail"], reply["run"]) == ("failed", INTERRUPTED, "000000000001")
    assert bench.send("capture", 3) == reply
    assert len(bench.operations.calls) == 1
    assert bench.log.trail()[0].detail == INTERRUPTED


actions = st.one_of(
    st.tuples(st.just("send"), st.sampled_from(["mes", "scada"]), st.integers(1, 30) | st.just(MOST_ID)),
    st.tuples(st.just("replay"), st.integers(0, 1000)),
    st.tuples(st.just("restart")),
    st.tuples(st.just("crash"), st.sampled_from(["mes", "scada"]), st.integers(1, 30)),
    st.tuples(st.just("clock"), st.integers(-100, 100)),
)


def act(bench, action, sent):
    """Do one action; a command's argument tells it apart in the list of calls."""
    bench.monotonic_s += 1
    kind, *values = action
    if kind == "restart":
        bench.restart()
    elif kind == "clock":
        bench.now += timedelta(minutes=values[0])
    elif kind == "replay":
        if sent:
            bench.handle("pause", sent[values[0] % len(sent)])
    else:
        issuer, command_id = values
        arguments = {"reason": f"{issuer} {command_id} {len(sent)}"}
        sent.append(payload("pause", command_id, now=bench.now, issuer=issuer, arguments=arguments))
        bench.operations.trouble = KeyboardInterrupt() if kind == "crash" else None
        try:
            bench.handle("pause", sent[-1])
        except KeyboardInterrupt:
            bench.restart()
        bench.operations.trouble = None


@settings(max_examples=100, deadline=None)
@given(st.lists(actions, max_size=25))
def test_commands_are_applied_once_each_in_the_order_of_their_ids_over_restarts_and_clock_steps(sequence):
    sent = []
    with bench_in_a_folder_of_its_own() as bench:
        for action in sequence:
            act(bench, action, sent)
        applied = [reason.split() for _, reason in bench.operations.calls]
        audited = [(line.issuer, line.command_id) for line in bench.log.trail() if line.result != "refused"]
    for issuer in ("mes", "scada"):
        ids = [int(command_id) for who, command_id, _ in applied if who == issuer]
        assert ids == sorted(set(ids))
    assert [(who, int(command_id)) for who, command_id, _ in applied] == audited[::-1]


# ---- a log that cannot be written ----


def test_nothing_is_done_that_cannot_be_recorded(bench):
    bench.send("capture", 1)
    fill_the_disk(bench)
    reply = bench.send("pause", 2, arguments={"reason": "p" * 200})
    assert (reply["result"], reply["lastId"]) == ("refused", 1)
    assert "nothing was done, because it could not be recorded" in reply["detail"]
    assert bench.operations.calls == [("capture", 5)]
    empty_the_disk(bench)
    assert bench.send("pause", 2, arguments={"reason": "p" * 200})["result"] == "done"


class FillsTheDisk(MemoryOperations):
    """After a call, nothing can be written any more."""

    bench = None

    def capture(self, count):
        change = super().capture(count)
        self.bench.log._database.execute("PRAGMA query_only = ON")
        return change


def test_an_outcome_that_cannot_be_written_is_told_and_written_before_the_next_command(bench):
    bench.operations = FillsTheDisk()
    bench.operations.bench = bench
    bench.restart()
    first = bench.send("capture", 1)
    assert first["result"] == "done"
    assert bench.send("capture", 1) == first
    assert bench.send("resume", 2)["result"] == "refused"
    assert bench.log.trail()[0].result is None
    bench.log._database.execute("PRAGMA query_only = OFF")
    assert bench.send("resume", 2)["result"] == "done"
    assert [line.result for line in bench.log.trail()] == ["done", "done"]
    bench.restart()
    assert bench.send("capture", 1) == first


def test_a_damaged_log_refuses_commands_and_does_not_raise(bench):
    bench.send("capture", 1)
    bench.log._database.execute("UPDATE issuers SET last_id = 0")
    reply = bench.send("capture", 2)
    assert reply["result"] == "refused"
    assert "is damaged" in reply["detail"]
    assert FILE_NAME in reply["detail"]
    assert len(bench.operations.calls) == 1
