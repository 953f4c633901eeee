"""What keeps the inspect process on its beat, and what is said where the machine does not let it."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import resource
import subprocess
import sys
import weakref

import pytest

from agent.line import realtime
from agent.line.realtime import ALL_EVERY, PUBLISH_NICE, YOUNG_EVERY, RealtimeSettings, StillHeap, go_first, step_back


def in_a_process(program, *, nice=0):
    """Run a program of its own, so that this one keeps its place; return what it printed."""
    preamble = f"import os\nos.nice({nice})\n"
    command = [sys.executable, "-W", "error", "-c", preamble + program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture
def refusing(monkeypatch):
    """The machine refuses everything."""

    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    class Library:
        def __init__(self, *_, **__):
            pass

        def mlockall(self, _):
            ctypes.set_errno(errno.ENOMEM)
            return -1

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    monkeypatch.setattr(os, "setpriority", refuse)
    monkeypatch.setattr(ctypes, "CDLL", Library)


def test_settings_that_ask_for_nothing_touch_nothing(refusing):
    assert go_first(RealtimeSettings()) == []


def test_what_the_machine_refuses_is_told_and_logged_and_never_raised(refusing, caplog):
    refused = go_first(RealtimeSettings(priority=50, cpus=(0, 1), lock_memory=True))
    assert refused == [
        "realtime.cpus [0, 1]: Operation not permitted: name CPUs of this machine",
        "realtime.priority 50: Operation not permitted: raise LimitRTPRIO, or ask for 0 where the kernel "
        "allows none (doctor, real_time)",
        "realtime.lock_memory: Cannot allocate memory: raise LimitMEMLOCK",
    ]
    assert [record.getMessage() for record in caplog.records] == refused


@pytest.mark.parametrize("cpus", [(9999,), (-1,), (2**40,)])
def test_a_cpu_that_is_not_there_is_told(cpus):
    before = os.sched_getaffinity(0)
    (refused,) = go_first(RealtimeSettings(cpus=cpus))
    assert refused.startswith(f"realtime.cpus [{cpus[0]}]: ")
    assert refused.endswith(": name CPUs of this machine")
    assert os.sched_getaffinity(0) == before


def test_what_the_settings_ask_holds_for_every_thread_that_comes_after():
    told = in_a_process("""
import threading
from agent.line.realtime import RealtimeSettings, go_first
cpu = min(os.sched_getaffinity(0))
assert go_first(RealtimeSettings(cpus=(cpu,))) == []
found = []
thread = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0) == {cpu}))
thread.start()
thread.join()
print(*found)
""")
    assert told == ["True"]


def test_the_publish_process_steps_back_to_an_ordinary_place_and_leaves_the_other_its_cpus():
    told = in_a_process("""
from agent.line.realtime import RealtimeSettings, go_first, step_back
before = os.sched_getaffinity(0)
taken = {min(before)}
go_first(RealtimeSettings(priority=1, cpus=tuple(taken)))
step_back(RealtimeSettings(cpus=tuple(taken)))
others = set(range(os.cpu_count())) - taken
after = os.sched_getaffinity(0)
print(os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0), after == others or not others & before)
""")
    assert told == [str(os.SCHED_OTHER), str(PUBLISH_NICE), "True"]


def test_a_process_that_was_started_nicer_stays_so():
    assert in_a_process(
        "from agent.line.realtime import RealtimeSettings, step_back\nstep_back(RealtimeSettings())\n"
        "print(os.getpriority(os.PRIO_PROCESS, 0))",
        nice=12,
    ) == ["12"]


def test_a_machine_that_refuses_to_let_it_step_back_is_told_to_the_log_alone(refusing, caplog, monkeypatch):
    monkeypatch.setattr(os, "getpriority", lambda *_: 0)
    step_back(RealtimeSettings())
    assert "Operation not permitted" in caplog.text


class Node:
    """Something that can be in a cycle."""


def cycle():
    """Return a weak reference to one of two objects that nothing else refers to."""
    one, other = Node(), Node()
    one.other, other.other = other, one
    return weakref.ref(one)


@pytest.fixture
def heap():
    made = StillHeap()
    made.freeze()
    yield made
    gc.unfreeze()
    gc.enable()


def test_nothing_is_collected_by_itself(heap):
    assert not gc.isenabled()
    assert gc.get_freeze_count() > 0
    found = [cycle() for _ in range(5000)]
    assert all(one() is not None for one in found)


def test_young_garbage_goes_every_few_parts(heap):
    garbage = cycle()
    for _ in range(YOUNG_EVERY - 1):
        heap.rested()
    assert garbage() is not None
    heap.rested()
    assert garbage() is None


def test_garbage_that_has_grown_old_goes_too(heap):
    one, other = Node(), Node()
    one.other, other.other = other, one
    old = weakref.ref(one)
    for _ in range(3 * YOUNG_EVERY):
        heap.rested()
    del one, other
    for _ in range(ALL_EVERY - 3 * YOUNG_EVERY - 1):
        heap.rested()
    assert old() is not None
    heap.rested()
    assert old() is None


def test_what_was_there_before_is_not_looked_at_again():
    kept = [Node() for _ in range(1000)]
    heap = StillHeap()
    heap.freeze()
    try:
        assert gc.get_freeze_count() >= len(kept)
        assert not any(found is kept[0] for found in gc.get_objects())
    finally:
        gc.unfreeze()
        gc.enable()


def test_the_module_names_linux_constants_as_mlockall_wants_them():
    assert (realtime.LOCK_NOW, realtime.LOCK_LATER) == (1, 2)


def test_a_process_that_was_given_its_cpus_by_somebody_else_keeps_them():
    told = in_a_process("""
from agent.line.realtime import RealtimeSettings, step_back
taken = {min(os.sched_getaffinity(0))}
os.sched_setaffinity(0, taken)
step_back(RealtimeSettings())
print(os.sched_getaffinity(0) == taken)
""")
    assert told == ["True"]


@pytest.mark.parametrize(("limit", "priority"), [(0, 0), (10, 10), (30, 20), (resource.RLIM_INFINITY, 20)])
def test_a_station_that_names_no_priority_takes_what_its_unit_allows(monkeypatch, limit, priority):
    asked = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    monkeypatch.setattr(os, "sched_setscheduler", lambda _pid, _policy, given: asked.append(given.sched_priority))
    assert go_first(RealtimeSettings()) == []
    assert asked == [priority] * (priority > 0)
    assert go_first(RealtimeSettings(priority=0)) == []
    assert len(asked) == (priority > 0)
