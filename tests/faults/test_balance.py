"""The ledger of triggers and verdicts balances, whatever happens to frames, processes, gate and disk.

Twice: step by step on a clock of our own, where every step of a script comes wherever the script says, also while a
part is being inspected; and with real threads in real time.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections import Counter
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recipes import write_tiny_recipe

from agent.between.control import Asking, pair
from agent.between.handover import Handover, Wanted
from agent.between.record import Charge
from agent.between.ring import Ring
from agent.cameras.trigger import Announced
from agent.config import read_station
from agent.errors import CameraError, CommandError, EndOfFrames, OutboxFull, OutputError
from agent.line.beat import Beat, Observer
from agent.line.loop import Line
from agent.line.pace import Pace
from agent.outbox.outbox import MemoryOutbox
from agent.publishing.messages import Origin, line_action
from agent.publishing.publication import Hello, Publication
from agent.verdict import Outcome, Reason, Verdict
from calibration.frame import Frame

MS = 1_000_000
DEADLINE_MS, QUEUE = 10.0, 3
PIXELS = np.zeros((16, 16), np.uint8)
MAP = np.ones((16, 16), np.float32)
RUN = "0123456789ab"
CHARGE = Charge(Origin("cell7", RUN, "tiny", "d" * 64, "onnxruntime f32", simulated=True, on_no_verdict="reject"), 0.2)
SAID = {
    "pass": (Outcome.PASS, Reason.SCORE, 0.05),
    "reject": (Outcome.REJECT, Reason.SCORE, 0.5),
    "dark": (Outcome.NO_VERDICT, Reason.TOO_DARK, None),
}


class KilledHere(BaseException):
    """The process ends at this place: no code of ours catches it."""


class Clock:
    """Stands in for the module `time`: every look at it takes a microsecond, now and then a thread is put aside."""

    def __init__(self, seed: int) -> None:
        self.now_ns = time.monotonic_ns()
        self._dice = random.Random(seed)

    def monotonic_ns(self) -> int:
        self.now_ns += 1000 if self._dice.random() < 0.99 else self._dice.randrange(12 * MS)
        return self.now_ns

    def monotonic(self) -> float:
        return self.monotonic_ns() / 1e9


class OnCommand(Pace):
    """Gives a part when it was told to."""

    is_due = False
    within_ns = 8 * MS  # a clock that is put aside for longer comes too late

    def take(self, now_ns: int) -> Announced | None:
        is_due, self.is_due = self.is_due, False
        return Announced(now_ns) if is_due else None


class Steps(Line):
    """A line whose threads go one round when they are told to, and whose parts come when they are told to."""

    rounds = 0

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self._pace = self.pace = OnCommand()

    def _comes_round(self, thread: str) -> bool:
        super()._comes_round(thread)
        self.rounds -= thread != "delivery"
        return self.rounds >= 0

    def step(self, work: str) -> None:
        """Let one thread go one round."""
        outer, self.rounds = self.rounds, 1
        try:
            getattr(self, work)()
        finally:
            self.rounds = outer

    def deliver_all(self) -> None:
        """Let the delivery thread go as far as it can."""
        self._delivery.end()
        self._delivery.run()


class World:
    """One station, step by step: camera, inspector and gate in one, and its publish process."""

    def __init__(self, station, patch, seed: int) -> None:
        self.clock = Clock(seed)
        patch.setattr("agent.line.loop.time", self.clock)
        self.station = station
        self.outbox = MemoryOutbox()
        self._store = self.outbox.store
        self.outbox.store = self.store
        self.ring = Ring.make(slots=6, slot_bytes=4096, picture_bytes=6000)
        self._note_closed = self.ring.note_closed
        self.ring.note_closed = self.note_closed
        self.wake = os.eventfd(0, os.EFD_NONBLOCK)
        wanted = Wanted(heatmaps=True, pictures="all")
        self.handover = Handover(self.ring, self.wake, wanted, lambda _: CHARGE, self.halt)
        self.line = Steps(
            self,
            self,
            Beat(1.0, DEADLINE_MS, QUEUE),
            self.deliver,
            lambda _: self.handover.came_round({}),
            output=self,
            observer=self.handover,
        )
        self.line.states.fire("start")
        self.waiting: list[int] = []  # triggers whose frame the camera has not delivered
        self.arriving: list[Frame] = []
        self.is_down = self.refuses = self.is_full = self.gate_fails = self.outlet_fails = False
        self.while_inspecting: list[tuple] = []
        self.how, self.lasts_ms = "pass", 0
        self.opened: dict[int, int] = {}  # trigger: moment
        self.said: dict[int, str] = {}  # by the inspector, in time or not
        self.told: dict[int, str] = {}  # to the gate
        self.gate_failed: set[int] = set()
        self.faulted: set[int] = set()  # parts whose delivery failed
        self.dies_at = ""
        self.dies_in_line = ""
        self.publication: Publication | None = None
        patch.setattr("agent.publishing.publication._opened_outbox", lambda _: self.outbox)
        self.publish()

    # What the line sees

    def trigger(self, trigger_id: int, until_ns: int | None = None) -> None:
        if self.refuses:
            raise CameraError("not armed")
        self.waiting.append(trigger_id)

    def next_frame(self, timeout_s: float) -> Frame | None:
        if self.is_down:
            raise CameraError("the cable is out")
        return self.arriving.pop(0) if self.arriving else None

    def inspect(self, frame: Frame, deadline_ns: int | None = None) -> Verdict:
        how, lasts_ms, meanwhile = self.how, self.lasts_ms, self.while_inspecting
        self.while_inspecting = []
        for step in meanwhile:
            self.do(*step)
        self.clock.now_ns += lasts_ms * MS
        self.die_if("inspect")
        self.said[frame.trigger_id] = how
        if how == "fail":
            raise ZeroDivisionError("boom")
        outcome, reason, score = SAID[how]
        return Verdict(frame.trigger_id, outcome, reason, score=score, threshold=0.1, anomaly_map=MAP, picture=MAP)

    def act(self, trigger_id: int, action: str, opened_ns: int) -> None:
        assert trigger_id not in self.told, "the gate is told once"
        self.die_if("gate")
        self.told[trigger_id] = action
        self.opened[trigger_id] = opened_ns
        if self.gate_fails:
            self.gate_failed.add(trigger_id)
            raise OutputError("no contact")

    def deliver(self, batch) -> None:
        for settled in batch:
            self.check(settled.verdict)
        self.die_if("deliver")
        if self.outlet_fails:
            self.faulted |= {settled.verdict.trigger_id for settled in batch}
            raise OSError("gone")
        self.handover.deliver(batch)

    def check(self, verdict: Verdict) -> None:
        """Check what is true of a verdict when it leaves the line, the gate having been told before."""
        trigger_id = verdict.trigger_id
        assert self.told[trigger_id] == line_action(verdict, "reject")
        if verdict.reason is Reason.SCORE:
            assert self.said[trigger_id] == verdict.outcome
            assert verdict.decided_ns <= self.opened[trigger_id] + DEADLINE_MS * MS
        if verdict.reason is Reason.LATE:
            assert verdict.decided_ns >= self.opened[trigger_id] + DEADLINE_MS * MS

    def store(self, batch, taken=None):
        if self.is_full:
            raise OutboxFull("disk full")
        self.die_if("before storing")
        messages = self._store(batch, taken or self.outbox.taken)
        self.die_if("after storing")
        return messages

    def note_closed(self, trigger_id: int) -> None:
        self.die_if("after writing")
        self._note_closed(trigger_id)

    def halt(self, detail: str) -> None:
        self.line.hold(Reason.HALTED, detail)

    def die_if(self, where: str) -> None:
        """End a process here; `publish` catches the end of its own."""
        if where in (self.dies_at, self.dies_in_line):
            self.dies_at = self.dies_in_line = ""
            raise KilledHere

    # What a script can do

    def do(self, what: str, number: int) -> None:
        getattr(self, what)(number)

    def part(self, _: int) -> None:
        self.line.pace.is_due = True
        self.line.step("_keep_the_beat")

    def clock_thread(self, _: int) -> None:
        self.line.step("_keep_the_beat")

    def pass_time(self, number: int) -> None:
        self.clock.now_ns += number % 11 * MS

    def expose(self, number: int) -> None:
        """Let a frame come: of a trigger that waits (any, in any order), of one that had its frame, or of none."""
        if number % 8 == 7 or not self.waiting:
            trigger_id = number % 5 if number % 3 else 10**6
        else:
            trigger_id = self.waiting[number % len(self.waiting)]
            if number % 8 != 6:  # 6: it comes twice
                self.waiting.remove(trigger_id)
        self.arriving.append(Frame(PIXELS, 1, trigger_id, 0, self.clock.now_ns))

    def lose(self, number: int) -> None:
        if self.waiting:
            del self.waiting[number % len(self.waiting)]

    def acquire(self, _: int) -> None:
        self.line.step("_acquire")

    def inspection(self, number: int) -> None:
        self.how = ("pass", "pass", "reject", "fail", "dark")[number % 5]
        self.lasts_ms = number % 12 if number % 3 == 0 else 1
        self.line.step("_inspect")

    def delivery(self, number: int) -> None:
        self.outlet_fails = number % 8 == 7
        self.line.deliver_all()
        self.outlet_fails = False

    def whole_way(self, number: int) -> None:
        """Take one part all the way."""
        for step in (self.part, self.expose, self.acquire):
            step(8 * number)
        self.inspection(number)
        self.delivery(0)

    def hold(self, number: int) -> None:
        with suppress(CommandError):
            self.line.hold(Reason.HALTED if number % 4 == 0 else Reason.PAUSED, "as the script says")

    def release(self, _: int) -> None:
        self.line.release()

    def camera(self, number: int) -> None:
        self.is_down, self.refuses = number % 6 == 1, number % 6 == 2

    def disk(self, number: int) -> None:
        self.is_full = number % 5 == 0

    def gate(self, number: int) -> None:
        self.gate_fails = number % 6 == 0

    def publish(self, number: int = 0) -> None:
        """Let the publish process go one round, start it anew, or kill it at some place."""
        places = ("", "", "", "before storing", "after storing", "at once")
        self.dies_at = places[number % len(places)]
        try:
            if self.publication is None:
                self.ours, theirs = pair()
                self.ours.setblocking(False)
                hello = Hello(RUN, CHARGE, {}, is_first=False)
                reader = Ring(os.dup(self.ring.descriptor))
                self.publication = Publication(self.station, reader, self.wake, Asking(theirs), hello)
                self.publication._catch_up()
            if self.dies_at == "at once":
                raise KilledHere
            self.publication._goes_on()
            self.publication._take()
        except KilledHere:
            self.hang_up()
        self.dies_at = ""
        self.hear()

    def hear(self) -> None:
        if self.publication is not None:
            with suppress(BlockingIOError):
                while data := self.ours.recv(10_000):
                    self.halt(json.loads(data)["arguments"]["detail"])

    def hang_up(self) -> None:
        if self.publication is not None:
            self.publication._inspection.close()
            self.publication._ring._let_go()
            self.ours.close()
            self.publication = None

    # The end

    def stop(self) -> None:
        """Do what `Line.run` does after a stop, then all that the publish process has to do."""
        self.is_full = False
        self.line._settle_all(Reason.STOPPING, "the agent was stopped with this part under way")
        for _ in range(QUEUE + 1):
            self.inspection(0)
        self.line.deliver_all()
        self.publish()
        for _ in range(1000):
            if not self.handover.unwritten:
                break
            self.publish()
            self.handover.came_round({})
        self.handover.came_round({"ended": True})
        assert not self.publication._goes_on()
        assert not self.publication._died

    def die(self) -> None:
        """End the inspect process as it stands, with what it has not handed over."""
        self.is_full = False
        self.publish()
        self.ours.close()
        while self.publication._goes_on():
            pass
        assert self.publication._died
        self.publication._speak_for_the_dead()

    def close(self) -> None:
        self.hang_up()
        self.ring.close()
        os.close(self.wake)


WORK = (
    ["part"] * 6
    + ["expose"] * 6
    + ["acquire"] * 6
    + ["inspection"] * 6
    + ["whole_way"] * 8
    + ["clock_thread", "pass_time", "delivery", "publish"] * 3
    + ["lose", "hold", "camera", "camera", "disk", "disk", "gate", "gate"]
    + ["release"] * 6
)
STEP = st.tuples(st.sampled_from(WORK), st.integers(0, 1000))
MOST_MEANWHILE = 4  # steps while a part is being inspected


def long_script(seed: int) -> list:
    """Return a script of some hundred steps: hypothesis itself prefers short ones, which it can explain."""
    dice = random.Random(seed)

    def step() -> tuple[str, int]:
        return dice.choice(WORK), dice.randrange(1000)

    return [(step(), [step() for _ in range(dice.randrange(MOST_MEANWHILE))]) for _ in range(dice.randrange(50, 400))]


SCRIPT = st.lists(st.tuples(STEP, st.lists(STEP, max_size=MOST_MEANWHILE)), max_size=60) | st.builds(
    long_script, st.integers(0, 2**32)
)
PLACES = ("", "inspect", "gate", "deliver", "after writing")


def stored(world: World) -> dict[int, dict]:
    """Return the stored messages by trigger, after checking that none is there twice."""
    messages = list(world.outbox.messages)
    assert [times for times in Counter(message["trigger"] for message in messages).values() if times > 1] == []
    return {message["trigger"]: message for message in messages}


def play(world: World, script) -> None:
    for step, meanwhile in script:
        nested = [one for one in meanwhile if one[0] not in ("inspection", "whole_way")]  # one thread inspects
        world.while_inspecting = nested
        world.do(*step)


def rehearsals(request: pytest.FixtureRequest, most: int, most_by_hand: int) -> settings:
    """Return how many scripts are played: always the same ones, more of them by hand."""
    return settings(
        max_examples=most_by_hand if request.config.getoption("--long") else most,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture
def station(tmp_path, monkeypatch):
    """Settings of a station without a broker."""
    monkeypatch.setattr("agent.line.loop.POLL_S", 0.0)
    monkeypatch.setattr("agent.line.delivery.POLL_S", 0.0)
    monkeypatch.setattr("agent.publishing.publication.POLL_MS", 0)
    monkeypatch.setattr("agent.publishing.publication.STORE_AGAIN_EVERY_S", 0.0)
    write_tiny_recipe(tmp_path / "tiny.recipe")
    (tmp_path / "station.yaml").write_text(
        "station: cell7\nrecipe: tiny.recipe\nrecipes: {unsigned: allow}\ntakt_ms: 10\ncamera: {kind: simulated}\n"
    )
    return read_station(tmp_path / "station.yaml")


def test_at_the_end_of_a_run_every_trigger_has_one_verdict_and_the_gate_was_told_before(
    request: pytest.FixtureRequest, station, monkeypatch
) -> None:
    def balances(script, seed: int) -> None:
        world = World(station, monkeypatch, seed)
        try:
            play(world, script)
            world.stop()
            triggers, messages = set(range(1, world.line.tally.triggers + 1)), stored(world)
            assert set(messages) | world.faulted == triggers
            assert set(messages) & world.faulted == set()
            assert set(world.told) == triggers
            assert world.line.tally.verdicts == len(triggers)
            assert world.ring.pending == 0
            assert world.ring.open_triggers() == sorted(world.faulted)
            for trigger_id, message in messages.items():
                assert world.told[trigger_id] == message["lineAction"]
                assert message["outcome"] != "pass" or world.said[trigger_id] == "pass"
        finally:
            world.close()

    rehearsals(request, 150, 3000)(given(SCRIPT, st.integers(0, 1000))(balances))()


def test_a_killed_inspection_leaves_no_trigger_without_a_verdict_and_none_with_two(
    request: pytest.FixtureRequest, station, monkeypatch
) -> None:
    def balances(script, seed: int, where: str, until: int) -> None:
        world = World(station, monkeypatch, seed)
        try:
            with suppress(KilledHere):
                play(world, script[:until])
                world.dies_in_line = where
                play(world, script[until:])
            world.die()
            triggers, messages = set(range(1, world.line.tally.triggers + 1)), stored(world)
            assert set(messages) | world.faulted == triggers
            for trigger_id, message in messages.items():
                assert message["outcome"] != "pass" or world.told[trigger_id] == "accept"
        finally:
            world.close()

    scripts = (SCRIPT, st.integers(0, 1000), st.sampled_from(PLACES), st.integers(0, 400))
    rehearsals(request, 150, 3000)(given(*scripts)(balances))()


class Conveyor(Observer):
    """A camera, an inspector and a gate in real time: each part has (fate of its frame, judgement, what happens)."""

    def __init__(self, script, deadline_ms: float) -> None:
        self.script, self.deadline_ms = [*script, *[NOTHING] * BEYOND], deadline_ms
        self.parts = len(script)
        self.line: Line | None = None
        self.due: list[tuple[float, int]] = []
        self.lock = threading.Lock()
        self.said: dict[int, str] = {}
        self.told: list[tuple[int, str]] = []
        self.delivered: list[Verdict] = []
        self.broken_until_s = 0.0

    def start(self) -> None:
        pass

    def trigger(self, trigger_id: int, until_ns: int | None = None) -> None:
        if trigger_id > self.parts:
            raise EndOfFrames("no more parts")
        frame = self.script[trigger_id - 1][0]
        delays_ms = {"lost": [], "soon": [0], "late": [2 * self.deadline_ms], "twice": [0, 1]}.get(frame, [0])
        now_s = time.monotonic()
        with self.lock:
            self.due += [(now_s + delay_ms / 1e3, trigger_id) for delay_ms in delays_ms]
            self.due += [(now_s, trigger_id + 1000)] * (frame == "stranger")
        if frame == "down":
            self.broken_until_s = now_s + 0.005
        if frame == "refused":
            raise CameraError("not armed")

    def opened(self, trigger_id: int) -> None:
        extra = self.script[trigger_id - 1][2]
        if extra == "pause":
            self.line.hold(Reason.PAUSED, "as the script says")
        elif extra == "resume":
            self.line.release()
        elif extra == "halt":
            self.line.hold(Reason.HALTED, "as the script says")
        elif extra == "sleep":
            time.sleep(0.004)  # the clock is held up, triggers come in no even beat
        elif extra == "stop":
            self.line.stop()

    def next_frame(self, timeout_s: float) -> Frame | None:
        end_s = time.monotonic() + timeout_s
        while time.monotonic() < end_s:
            if time.monotonic() < self.broken_until_s:
                raise CameraError("the cable is out")
            with self.lock:
                ready = [item for item in self.due if item[0] <= time.monotonic()]
                for item in ready[:1]:
                    self.due.remove(item)
                    return Frame(PIXELS, 1, item[1], 0, time.monotonic_ns())
            time.sleep(0.0005)
        return None

    def inspect(self, frame: Frame, deadline_ns: int | None = None) -> Verdict:
        how = self.script[frame.trigger_id - 1][1]
        if how == "slow":
            time.sleep(self.deadline_ms * 1.5e-3)
        how = "pass" if how == "slow" else how
        self.said[frame.trigger_id] = how
        if how == "fail":
            raise ZeroDivisionError("boom")
        outcome, reason, score = SAID[how]
        return Verdict(frame.trigger_id, outcome, reason, score=score, threshold=0.1)

    def act(self, trigger_id: int, action: str, opened_ns: int) -> None:
        self.told.append((trigger_id, action))

    def deliver(self, batch) -> None:
        for settled in batch:
            assert settled.verdict.trigger_id in dict(self.told)
            self.delivered.append(settled.verdict)
        if any(self.script[settled.verdict.trigger_id - 1][2] == "outlet" for settled in batch):
            raise OSError("gone")  # after the fact: the line goes on

    def stop(self) -> None:
        pass

    def close(self) -> None:
        pass


BEYOND = 3  # triggers after the last part
NOTHING = ("lost", "pass", "")
PART = st.tuples(
    st.sampled_from(["soon"] * 6 + ["lost", "late", "twice", "stranger", "down", "refused"]),
    st.sampled_from(["pass"] * 4 + ["reject", "dark", "fail", "slow"]),
    st.sampled_from([""] * 12 + ["pause", "resume", "resume", "halt", "sleep", "sleep", "outlet"]),
)


@pytest.mark.filterwarnings("error")
def test_with_real_threads_every_trigger_has_one_verdict_too(request: pytest.FixtureRequest, monkeypatch) -> None:
    monkeypatch.setattr("agent.line.loop.POLL_S", 0.01)
    monkeypatch.setattr("agent.line.delivery.POLL_S", 0.01)

    def balances(script, stop_at: int, takt_ms: int, queue_length: int, policy: str) -> None:
        if stop_at < len(script):
            script[stop_at] = (*script[stop_at][:2], "stop")
        deadline_ms = 8.0
        conveyor = Conveyor(script, deadline_ms)
        line = Line(
            conveyor,
            conveyor,
            Beat(takt_ms, deadline_ms, queue_length, on_no_verdict=policy),
            conveyor.deliver,
            output=conveyor,
            observer=conveyor,
        )
        conveyor.line = line
        tally = line.run(len(script) + BEYOND)
        triggers = list(range(1, tally.triggers + 1))
        assert sorted(verdict.trigger_id for verdict in conveyor.delivered) == triggers
        assert sorted(trigger for trigger, _ in conveyor.told) == triggers
        for verdict in conveyor.delivered:
            assert dict(conveyor.told)[verdict.trigger_id] == line_action(verdict, policy)
            if verdict.outcome is not Outcome.NO_VERDICT:
                assert conveyor.said[verdict.trigger_id] == verdict.outcome
                assert verdict.latency_ms <= deadline_ms

    scripts = (
        st.lists(PART, min_size=10, max_size=40),
        st.integers(0, 60),
        st.integers(1, 5),
        st.integers(1, 4),
        st.sampled_from(["reject", "reject", "pass", "stop"]),
    )
    rehearsals(request, 25, 1000)(given(*scripts)(balances))()
