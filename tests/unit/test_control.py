"""What two processes ask of each other over a socket pair."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from agent.between import control
from agent.between.control import MOST_BYTES, Answering, Asking, error_named, pair
from agent.errors import CameraError, CommandError, EngineError, OutboxFull, StorageError
from calibration.errors import InputError, NotRegistered, RecipeError, TaktsightError


class Bench:
    """Both ends in one process. What is told is noted; `asked` may be added to."""

    def __init__(self):
        self.heard = []
        self.hears = threading.Event()
        self.asked = {"double": lambda number: 2 * number}
        ours, theirs = pair()
        self.answering = Answering(ours, self.asked, {"note": self.note, "fail": self.fail})
        self.asking = Asking(theirs)
        self.theirs = theirs

    def note(self, text):
        self.heard.append(text)
        self.hears.set()

    def fail(self):
        raise ZeroDivisionError("boom")

    def close(self):
        self.asking.close()
        self.answering.close()


@pytest.fixture
def bench():
    one = Bench()
    yield one
    one.close()


def test_what_is_asked_is_answered(bench):
    assert bench.asking.ask("double", number=21) == 42
    assert bench.asking.ask("double", number=[1, None]) == [1, None, 1, None]


@pytest.mark.parametrize(
    "kind", [CommandError, EngineError, CameraError, StorageError, OutboxFull, RecipeError, InputError, TaktsightError]
)
def test_an_error_keeps_its_class_and_its_text(bench, kind):
    def fail():
        raise kind("found this, wanted that: do so")

    bench.asked["fail"] = fail
    with pytest.raises(TaktsightError, match=r"^found this, wanted that: do so$") as caught:
        bench.asking.ask("fail")
    assert type(caught.value) is kind
    assert bench.asking.ask("double", number=1) == 2


def test_an_error_that_is_none_of_ours_is_a_command_error_and_the_log_says_more(bench, caplog):
    bench.asked["fail"] = bench.fail
    with pytest.raises(CommandError, match="ZeroDivisionError: boom: see the log"):
        bench.asking.ask("fail")
    assert "asked fail, which could not be done" in caplog.text


@pytest.mark.parametrize("name", ["NotRegistered", "ValueError", "__doc__", "annotations", "no such thing"])
def test_what_cannot_be_raised_again_as_it_was_is_a_command_error(name):
    error = error_named(name, "text")
    assert (type(error), str(error)) == (CommandError, "text")
    assert issubclass(NotRegistered, TaktsightError)


def test_something_unknown_or_with_wrong_arguments_is_refused_and_the_next_is_answered(bench):
    for ask in (lambda: bench.asking.ask("fly"), lambda: bench.asking.ask("double", wrong=1)):
        with pytest.raises(CommandError):
            ask()
    assert bench.asking.ask("double", number=1) == 2


def test_an_answer_that_cannot_be_told_is_an_error_and_the_next_is_answered(bench):
    bench.asked["what"] = object
    with pytest.raises(CommandError, match="not JSON serializable"):
        bench.asking.ask("what")
    assert bench.asking.ask("double", number=1) == 2


def test_a_question_that_cannot_be_told_is_the_askers_mistake(bench):
    with pytest.raises(TypeError):
        bench.asking.ask("double", number=object())
    assert bench.asking.ask("double", number=1) == 2


def test_each_of_several_threads_gets_its_own_answer(bench):
    def ask(number):
        return [bench.asking.ask("double", number=number) for _ in range(50)]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, range(4)))
    assert found == [[2 * number] * 50 for number in range(4)]


def test_what_is_told_is_acted_on_while_a_question_is_being_answered(bench):
    begun, end = threading.Event(), threading.Event()

    def slowly():
        begun.set()
        return end.wait(10)

    bench.asked["slowly"] = slowly
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(bench.asking.ask, "slowly")
        assert begun.wait(10)
        bench.asking.tell("note", text="disk full")
        assert bench.hears.wait(10)
        assert not answer.done()
        end.set()
        assert answer.result(10) is True
    assert bench.heard == ["disk full"]


def test_what_is_told_and_cannot_be_done_is_logged_and_the_next_is_done(bench, caplog):
    bench.asking.tell("fail")
    bench.asking.tell("fly")
    bench.asking.tell("note", text="still here")
    assert bench.hears.wait(10)
    assert "told fail, which could not be done" in caplog.text
    assert "told fly, which could not be done" in caplog.text


@pytest.mark.parametrize("garbage", [b"{", b"\xff\xfe", b"3", b"[1]", b"null", b"{}", b'{"id": 7}', b"x" * 1000])
def test_garbage_stops_neither_questions_nor_orders(bench, garbage):
    bench.theirs.sendall(garbage)
    bench.asking.tell("note", text="still here")
    assert bench.hears.wait(10)
    assert bench.asking.ask("double", number=1) == 2


@pytest.mark.parametrize(
    "garbage", [b"{", b"\xff", b"3", b'{"id": 1}', b'{"id": 1, "error": "X"}', b'"' + b"x" * (MOST_BYTES + 10) + b'"']
)
def test_an_answer_that_cannot_be_read_is_a_command_error(garbage):
    ours, theirs = pair()
    with ours, theirs:
        ours.sendall(garbage)
        with pytest.raises(CommandError, match="the inspection does not answer"):
            Asking(theirs).ask("double", number=1)


def test_an_answer_that_came_too_late_is_not_taken_for_the_next_one(monkeypatch):
    monkeypatch.setattr(control, "ANSWER_S", 0.05)
    ours, theirs = pair()
    with ours, theirs:
        asking = Asking(theirs)
        with pytest.raises(CommandError, match="does not answer"):
            asking.ask("first")
        monkeypatch.setattr(control, "ANSWER_S", 10.0)
        first = json.loads(ours.recv(1000))
        for number, value in ((first["id"], "late"), (first["id"] + 1, "in time")):
            ours.sendall(json.dumps({"id": number, "value": value}).encode())
        assert asking.ask("second") == "in time"


def test_the_other_sides_end_is_told_to_the_one_who_waits():
    ours, theirs = pair()
    begun = threading.Event()

    def end():
        begun.set()
        ours.recv(1000)
        ours.close()

    thread = threading.Thread(target=end)
    thread.start()
    assert begun.wait(10)
    with theirs:
        before_s = time.monotonic()
        with pytest.raises(CommandError, match="does not answer"):
            Asking(theirs).ask("double", number=1)
        assert time.monotonic() - before_s < 10
        thread.join()
        with pytest.raises(CommandError, match="does not answer"):
            Asking(theirs).ask("double", number=1)
        Asking(theirs).tell("note", text="to nobody")


def test_what_was_told_before_the_end_is_heard():
    for _ in range(20):
        one = Bench()
        for number in range(20):
            one.asking.tell("note", text=number)
        one.close()
        assert one.heard == list(range(20))


def test_a_question_under_way_is_carried_out_though_nobody_hears_the_answer(bench):
    begun, end, done = threading.Event(), threading.Event(), threading.Event()

    def slowly():
        begun.set()
        end.wait(10)
        done.set()

    bench.asked["slowly"] = slowly
    bench.theirs.sendall(json.dumps({"id": 1, "what": "slowly", "arguments": {}}).encode())
    assert begun.wait(10)
    bench.close()
    end.set()
    assert done.wait(10)
