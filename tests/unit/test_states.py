"""In which state a station is, and every way from one to another."""

from __future__ import annotations

import time
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.errors import CommandError
from agent.line.beat import Beat
from agent.line.loop import Line
from agent.line.states import TRANSITIONS, WIRE_STATE, Event, State, StateMachine
from agent.verdict import Reason

WAYS = """
Preoperational       prepare Initialized
Initialized          prove   Ready
Initialized          fail    Error
Ready                start   ContinuousExecution
Ready                pause   Ready
Ready                fail    Error
ContinuousExecution  start   ContinuousExecution
ContinuousExecution  pause   Ready
ContinuousExecution  fail    Error
Error                fail    Error
Error                confirm ContinuousExecution
Halted               pause   Halted
Halted               fail    Halted
Preoperational       stop    Halted
Initialized          stop    Halted
Ready                stop    Halted
ContinuousExecution  stop    Halted
Error                stop    Halted
Halted               stop    Halted
"""
EXPECTED = {(way[0], way[1]): way[2] for line in WAYS.split("\n") if (way := line.split())}
TO = {
    State.PREOPERATIONAL: (),
    State.INITIALIZED: (Event.PREPARE,),
    State.READY: (Event.PREPARE, Event.PROVE),
    State.EXECUTING: (Event.PREPARE, Event.PROVE, Event.START),
    State.ERROR: (Event.PREPARE, Event.PROVE, Event.START, Event.FAIL),
    State.HALTED: (Event.STOP,),
}


def machine(state):
    """Return one in this state."""
    made = StateMachine()
    for event in TO[state]:
        made.fire(event)
    assert made.state is state
    return made


@pytest.mark.parametrize(("state", "event"), list(product(State, Event)))
def test_every_pair_of_state_and_event_goes_where_it_should_or_is_refused(state, event):
    one = machine(state)
    target = EXPECTED.get((str(state), str(event)))
    if target is None:
        with pytest.raises(CommandError, match=f"^{event} is not possible in state {state}: .* is$"):
            one.fire(event)
        assert one.state is state
    else:
        assert str(one.fire(event)) == str(one.state) == target


def test_the_table_has_no_other_way():
    assert {(str(state), str(event)): str(to) for (state, event), to in TRANSITIONS.items()} == EXPECTED


def test_a_refusal_names_the_ways_there_are():
    with pytest.raises(CommandError, match="start is not possible in state Error: confirm, fail, stop is"):
        machine(State.ERROR).fire(Event.START)


def test_every_state_has_a_word_on_the_wire():
    assert set(WIRE_STATE) == set(State)


@given(st.lists(st.sampled_from(Event), max_size=60))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_whatever_happens_the_fail_safe_state_is_left_by_a_person_or_the_end_only(events):
    one = StateMachine()
    went = [(None, one.state)]
    for event in events:
        try:
            one.fire(event)
        except CommandError:
            assert one.state is went[-1][1]
            continue
        went.append((event, one.state))
    for (_, before), (event, after) in pairwise(went):
        assert EXPECTED[str(before), str(event)] == after
        if before is State.ERROR and after is not State.ERROR:
            assert event in (Event.CONFIRM, Event.STOP)
        if before is State.HALTED:
            assert after is State.HALTED
        if after is State.EXECUTING and before is not State.EXECUTING:
            assert before in (State.READY, State.ERROR)


class NoParts:
    """A camera without parts, and an inspector that is never asked."""

    def start(self):
        pass

    def next_frame(self, timeout_s):
        time.sleep(timeout_s)

    def stop(self):
        pass


def line(state):
    """Return a line in this state, held as that state wants it."""
    made = Line(NoParts(), NoParts(), Beat(20.0, 20.0), lambda batch: None, states=machine(State.READY))
    if state is not State.READY:
        made.states.fire(Event.START)
    if state is State.ERROR:
        made.hold(Reason.HALTED, "disk full")
    if state is State.HALTED:
        made.states.fire(Event.STOP)
    assert made.states.state is state
    return made


@pytest.mark.parametrize(
    ("state", "reason", "after", "held"),
    [
        (State.READY, Reason.PAUSED, State.READY, Reason.PAUSED),
        (State.READY, Reason.HALTED, State.ERROR, Reason.HALTED),
        (State.EXECUTING, Reason.PAUSED, State.READY, Reason.PAUSED),
        (State.EXECUTING, Reason.HALTED, State.ERROR, Reason.HALTED),
        (State.ERROR, Reason.PAUSED, State.ERROR, Reason.HALTED),
        (State.ERROR, Reason.HALTED, State.ERROR, Reason.HALTED),
        (State.HALTED, Reason.PAUSED, State.HALTED, Reason.PAUSED),
        (State.HALTED, Reason.HALTED, State.HALTED, Reason.HALTED),
    ],
)
def test_a_line_that_is_held_is_in_the_state_that_says_so(state, reason, after, held):
    one = line(state)
    one.hold(reason, "as asked")
    assert (one.states.state, one.held.reason) == (after, held)


@pytest.mark.parametrize("reasons", [[Reason.PAUSED], [Reason.HALTED], [Reason.PAUSED, Reason.HALTED]])
def test_a_line_that_is_released_executes(reasons):
    one = line(State.EXECUTING)
    for reason in reasons:
        one.hold(reason, "as asked")
    one.release()
    assert (one.states.state, one.held) == (State.EXECUTING, None)


@pytest.mark.parametrize("state", [State.READY, State.EXECUTING, State.HALTED])
def test_releasing_a_line_that_is_not_held_changes_nothing(state):
    one = line(state)
    one.release()
    assert (one.states.state, one.held) == (state, None)


def test_a_run_begins_with_start_and_ends_with_stop():
    one = line(State.READY)
    one.stop()
    one.run(None)
    assert one.states.state is State.HALTED


@pytest.mark.parametrize(("reason", "during"), [(Reason.PAUSED, State.READY), (Reason.HALTED, State.ERROR)])
def test_a_line_that_was_held_before_its_run_does_not_start_by_itself(reason, during):
    seen = []

    class Looking(NoParts):
        def stop(self):
            seen.append(one.states.state)

    one = Line(Looking(), Looking(), Beat(20.0, 20.0), lambda batch: None)
    one.hold(reason, "not yet")
    one.stop()
    one.run(None)
    assert seen == [during]


@pytest.mark.parametrize("state", [State.PREOPERATIONAL, State.INITIALIZED])
def test_a_line_whose_engine_is_not_proven_does_not_run(state):
    one = Line(NoParts(), NoParts(), Beat(20.0, 20.0), lambda batch: None, states=machine(state))
    with pytest.raises(CommandError, match="start is not possible"):
        one.run(None)
