"""Journal entries over a real socket, as journald reads them, and what is told of single parts."""

import logging
import os
import socket
import subprocess
import sys

import pytest

from agent.journal import LONGEST_VALUE, JournalHandler, encoded, fields, log_to_journal, stderr_is_journal
from agent.line.part_log import SUM_UP_EVERY_S, PartLog
from agent.verdict import Outcome, Reason, Verdict


def decoded(datagram):
    """Read an entry by the protocol's description, independent of the writer."""
    entry = {}
    while datagram:
        line, _, rest = datagram.partition(b"\n")
        name, is_short, value = line.partition(b"=")
        if not is_short:
            length = int.from_bytes(rest[:8], "little")
            value, rest = rest[8 : 8 + length], rest[8 + length :]
            assert rest[:1] == b"\n"
            rest = rest[1:]
        entry[name.decode()] = value.decode()
        datagram = rest
    return entry


@pytest.fixture
def journal(tmp_path):
    """The end of journald."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
        one.bind(str(tmp_path / "socket"))
        one.settimeout(1)
        yield one


@pytest.fixture
def log(tmp_path, journal):
    handler = JournalHandler(tmp_path / "socket", station="cell7")
    logger = logging.Logger("agent.test")
    logger.addHandler(handler)
    yield logger
    handler.close()


def received(journal):
    return decoded(journal.recv(2**20))


def test_an_entry_carries_message_priority_place_and_fields(log, journal):
    log.warning("part %d: %s", 7, "late", extra=fields(verdict="no_verdict", reason="late", score=None))
    entry = received(journal)
    assert entry["MESSAGE"] == "part 7: late"
    assert (entry["PRIORITY"], entry["SYSLOG_IDENTIFIER"], entry["LOGGER"]) == ("4", "taktsight-agent", "agent.test")
    assert entry["CODE_FUNC"] == "test_an_entry_carries_message_priority_place_and_fields"
    own = {name: value for name, value in entry.items() if name.startswith("TAKTSIGHT_")}
    assert own == {"TAKTSIGHT_STATION": "cell7", "TAKTSIGHT_VERDICT": "no_verdict", "TAKTSIGHT_REASON": "late"}


def test_no_value_can_forge_a_field(log, journal):
    log.info("bad\nTAKTSIGHT_VERDICT=pass", extra=fields(part="P1\nPRIORITY=0"))
    entry = received(journal)
    assert entry["MESSAGE"] == "bad\nTAKTSIGHT_VERDICT=pass"
    assert entry["TAKTSIGHT_PART"] == "P1\nPRIORITY=0"
    assert entry["PRIORITY"] == "6"
    assert "TAKTSIGHT_VERDICT" not in entry


def test_an_exception_brings_its_traceback(log, journal):
    try:
        raise RuntimeError("out of order")
    except RuntimeError:
        log.exception("part 3")
    lines = received(journal)["MESSAGE"].splitlines()
    assert lines[0] == "part 3"
    assert lines[-1] == "RuntimeError: out of order"


def test_a_long_value_is_cut_between_characters():
    entry = decoded(encoded({"MESSAGE": "ä" * LONGEST_VALUE + "x"}))
    assert entry["MESSAGE"] == "ä" * (LONGEST_VALUE // 2)
    assert decoded(encoded({"MESSAGE": "a" + "ä" * LONGEST_VALUE}))["MESSAGE"][-1] == "ä"


def test_what_a_slow_journal_missed_is_counted_and_said(log, journal):
    handler = log.handlers[0]
    while not handler.missed:  # nobody reads: the socket's queue fills up
        log.info("x" * 4096)
    log.info("another")
    missed = handler.missed
    assert missed == 2
    received(journal)
    log.info("again")
    journal.setblocking(False)
    last = {}
    while True:
        try:
            last = received(journal)
        except BlockingIOError:
            break
    assert (last["MESSAGE"], last["TAKTSIGHT_MISSED"]) == ("again", str(missed))
    assert handler.missed == 0


def test_a_journal_that_is_gone_stops_nothing(tmp_path):
    handler = JournalHandler(tmp_path / "nobody")
    handler.handle(logging.makeLogRecord({"msg": "x", "levelno": logging.INFO}))
    assert handler.missed == 1
    handler.close()


def test_stderr_is_the_journal_if_its_device_and_inode_are_those_named(tmp_path):
    with (tmp_path / "stderr").open("w") as stream:
        state = os.fstat(stream.fileno())
        assert stderr_is_journal(stream, f"{state.st_dev}:{state.st_ino}")
        assert not stderr_is_journal(stream, f"{state.st_dev}:{state.st_ino + 1}")
        assert not stderr_is_journal(stream, "")
    assert not stderr_is_journal(stream, "1:1")  # closed


def test_beside_the_journal_logs_stay_plain_lines():
    handlers = list(logging.getLogger().handlers)
    assert not log_to_journal(station="cell7")
    assert logging.getLogger().handlers == handlers


def test_a_pipe_of_the_same_variable_is_not_taken_for_the_journal():
    """A child inherits JOURNAL_STREAM, but its stderr may lead elsewhere."""
    program = "from agent.journal import stderr_is_journal; raise SystemExit(stderr_is_journal())"
    environment = {**os.environ, "JOURNAL_STREAM": "8:12345"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def verdict(trigger, reason=Reason.LATE):
    if reason is Reason.SCORE:
        return Verdict(trigger, Outcome.REJECT, reason, "unlike good parts", score=0.51234567, threshold=0.4)
    return Verdict(trigger, Outcome.NO_VERDICT, reason, "no answer", part_id="P1")


class Parts:
    """A part log on a clock that a test moves."""

    def __init__(self):
        self.now_s = 100.0
        self.log = PartLog(monotonic=lambda: self.now_s)

    def see(self, *verdicts):
        for one in verdicts:
            self.log.note(one, "bottle")
            self.log.sum_up()


@pytest.fixture
def parts(caplog):
    caplog.set_level(logging.INFO)
    return Parts()


def test_parts_that_pass_are_not_told(parts, caplog):
    parts.see(Verdict(1, Outcome.PASS, Reason.SCORE, score=0.1, threshold=0.4))
    assert caplog.records == []


def test_parts_of_a_held_line_are_not_told_one_by_one(parts, caplog):
    parts.see(verdict(1, Reason.PAUSED), verdict(2, Reason.HALTED))
    assert caplog.records == []


def test_the_first_of_a_kind_is_told_with_its_fields(parts, caplog):
    parts.see(verdict(1, Reason.SCORE), verdict(2))
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert caplog.messages == [
        "part 1: reject, score 0.512, threshold 0.400: unlike good parts",
        "part 2: no_verdict, late: no answer",
    ]
    assert caplog.records[0].taktsight_fields == {
        "TAKTSIGHT_VERDICT": "reject",
        "TAKTSIGHT_REASON": "score",
        "TAKTSIGHT_RECIPE": "bottle",
        "TAKTSIGHT_TRIGGER": 1,
        "TAKTSIGHT_SCORE": "0.512346",
    }


def test_repeated_ones_are_counted_and_summed_up_once_a_minute(parts, caplog):
    for second in range(150):
        parts.now_s = 100.0 + second
        parts.see(verdict(second))
    assert caplog.messages == [
        "part 0: no_verdict, late: no answer",
        "60 more parts: no_verdict, late, in 60 s",
        "60 more parts: no_verdict, late, in 60 s",
    ]


def test_a_kind_that_was_quiet_for_a_minute_is_news_again(parts, caplog):
    parts.see(verdict(1))
    parts.now_s += SUM_UP_EVERY_S
    parts.log.sum_up()
    parts.see(verdict(2))
    assert len(caplog.messages) == 2
