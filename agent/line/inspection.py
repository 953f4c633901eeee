"""The inspect process of one station: camera, engine, line and gate; and the publish process that it keeps alive.

    inspect process    camera -> pipeline -> line -> gate          real time: nothing here waits for disk or network
         | shared memory (agent.between.ring, agent.between.handover)
    publish process    outbox -> MQTT, archive, status, health     agent.publishing.publication

Either may be killed without the other losing a part: what was handed over stays in memory, and parts that a dead
inspect process had taken up get their no_verdict from the publish process.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from agent.audit import run_facts
from agent.between.handover import Handover, Wanted
from agent.between.publish_process import Ended, PublishProcess
from agent.between.record import Charge
from agent.between.ring import Ring
from agent.cameras.genicam import GenicamCamera
from agent.commands.commands import Change
from agent.commands.operations import LineOperations
from agent.config import Station
from agent.engines.engine import TOLERANCES
from agent.engines.parity import thresholds_serve
from agent.journal import fields
from agent.line.beat import Inspector
from agent.line.loop import Line
from agent.line.pipeline import Pipeline
from agent.line.realtime import go_first
from agent.line.states import WIRE_STATE, Event, State, StateMachine
from agent.line.tally import Tally
from agent.notify import Supervisor
from agent.outputs.output import NoOutput
from agent.publishing.messages import Alarm, Origin, alarm_fields, new_id
from agent.recipes.changeover import Changeover
from agent.verdict import Outcome, Reason
from calibration.frame import Frame, Pixels

log = logging.getLogger(__name__)

SLOTS, SLOT_BYTES = 2048, 8192  # 16 MB: 100 s at 20 parts a second
PICTURES_OF_PARTS = 12  # frames with all that belongs to them
LEAST_PICTURE_BYTES, MOST_PICTURE_BYTES = 16 * 2**20, 256 * 2**20
ASKED = ("change_recipe", "pause", "resume", "send_frames", "set_threshold", "self_test")  # of LineOperations
STOP_MARGIN_S = 30.0
POLL_S = 0.05
WARM_UPS = 5
UNSEEN = (
    "{} parts of the beat went by in this run without a verdict, while the agent was put aside: see what suspended "
    "this computer or took it away, and check these parts"
)
STATUS_EVERY_NS = 5 * 10**9
BOARD_EVERY_NS = 10**8


class Inspection:
    """One run of a station. Construct, then `run`."""

    def __init__(self, station_file: Path, station: Station, supervisor: Supervisor | None = None) -> None:
        """Raises what recipe, engine and output raise: what cannot judge does not start."""
        self._refused = go_first(station.realtime)  # before any other thread is there
        self._station = station
        self._supervisor = supervisor or Supervisor()
        self._run = new_id()
        self._states = StateMachine()
        changeover = Changeover(station.recipes)
        pipeline = changeover.first()
        self._states.fire(Event.PREPARE)
        _warm_up(pipeline)
        self._states.fire(Event.PROVE)  # `first` has proven the engine
        self._warn_of_foreign_thresholds(pipeline)
        self._warn_of_short_watchdog()
        self._ring = Ring.make(slots=SLOTS, slot_bytes=SLOT_BYTES, picture_bytes=_picture_bytes(pipeline))
        wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._camera = station.camera.open()
        self._output = NoOutput() if station.output is None else station.output.open(self._camera)
        self._source = None if station.trigger is None else station.trigger.open()
        self._handover = Handover(self._ring, wake, _wanted(station), self._charge, self._halt)
        self.line = Line(
            self._camera,
            pipeline,
            replace(station.beat, source=self._source),
            self._handover.deliver,
            self._come_round,
            output=self._output,
            observer=self._handover,
            states=self._states,
        )
        operations = LineOperations(
            self.line,
            pipeline,
            changeover=changeover,
            tolerance=TOLERANCES[station.engine.precision],
            send_frames=self._handover.send_frames,
        )
        answers, orders = {name: _asked(getattr(operations, name)) for name in ASKED}, {"hold": self._halt}
        self._publisher = PublishProcess(
            station_file, station.data, self._ring, wake, hello=self._hello, asked=answers, told=orders
        )
        self._board_due_ns = self._status_due_ns = 0

    @property
    def origin(self) -> Origin:
        """Who speaks at this moment: changes with the recipe."""
        return self._charge(self.line.inspector).origin

    def stop(self) -> None:
        """Give no more triggers; `run` returns once all is settled and delivered. Safe in a signal handler."""
        self._supervisor.extend(self._station.beat.deadline_ms / 1e3 + STOP_MARGIN_S)
        self.line.stop()

    def run(self, count: int | None) -> tuple[Tally, Ended]:
        """Inspect `count` parts (None: until `stop`); return what happened and what became of the verdicts.

        Raises what keeps the publish process from starting, and CameraError.
        """
        self._publisher.start()
        try:
            self._handover.freeze()
            log.info("ready: %s", self.origin.recipe, extra=self._as_fields("ready"))
            tally = self.line.run(count)
        except BaseException:
            self._say_goodbye()
            self._publisher.end()
            raise
        self._supervisor.stopping()
        self._supervisor.extend(STOP_MARGIN_S)
        self._hand_over_the_rest()
        self._say_goodbye()
        given_up = self._handover.given_up + self._handover.unwritten
        ended = self._publisher.end(given_up, lambda: self._supervisor.extend(STOP_MARGIN_S))
        log.info("stopped", extra=self._as_fields("stopped"))
        return tally, ended

    def _come_round(self, heartbeat_ns: int) -> None:
        """Tell those who watch over the line, with or without parts. Runs in the line's delivery thread."""
        self._supervisor.heartbeat(heartbeat_ns)
        if heartbeat_ns >= self._board_due_ns:
            self._board_due_ns = heartbeat_ns + BOARD_EVERY_NS
            self._handover.came_round(self._about_us())
            self._publisher.look_after()
        if heartbeat_ns >= self._status_due_ns:
            self._status_due_ns = heartbeat_ns + STATUS_EVERY_NS
            self._supervisor.status(self._summary())

    def _hand_over_the_rest(self) -> None:
        """Let the publish process make room for what waits beyond the ring, for a while."""
        give_up_s = time.monotonic() + STOP_MARGIN_S / 2
        while self._handover.unwritten and time.monotonic() < give_up_s:
            self._handover.came_round(self._about_us())
            self._publisher.look_after()
            time.sleep(POLL_S)

    def _say_goodbye(self) -> None:
        """Tell the publish process that nothing more comes."""
        self._handover.came_round({**self._about_us(), "ended": True})

    def _about_us(self) -> dict[str, Any]:
        """Return what the publish process tells the world about this one."""
        tally, state, held = self.line.tally, self._states.state, self.line.held
        return {
            "state": str(held.reason) if held is not None and state is not State.HALTED else WIRE_STATE[state],
            "machine_state": str(state),
            "counters": {
                "triggers": tally.triggers,
                **tally.outcomes,
                "parts_unseen": tally.parts_unseen,
                "stale_frames": tally.stale_frames,
                "late_results": tally.late_results,
                "shed_pictures": tally.shed_pictures,
                "delivery_faults": tally.delivery_faults,
                "publisher_restarts": self._publisher.restarts,
                **self._handover.counters(),
                **self._output.counters(),
                **(self._camera.counters if isinstance(self._camera, GenicamCamera) else {}),
                **({} if self._source is None else self._source.announcements.counters()),
            },
            "alarms": alarm_fields(self._alarms()),
            "given_up": self._handover.given_up + self._handover.unwritten,
        }

    def _alarms(self) -> list[Alarm]:
        held = self.line.held
        alarms = [] if held is None else [Alarm(str(held.reason), held.detail)]
        if self._source is not None and (fault := self._source.announcements.fault):
            alarms.append(Alarm("trigger_down", fault))
        if unseen := self.line.tally.parts_unseen:
            alarms.append(Alarm("parts_unseen", UNSEEN.format(unseen)))
        return alarms + [Alarm("not_realtime", line) for line in self._refused]

    def _halt(self, detail: str) -> None:
        self.line.hold(Reason.HALTED, detail)

    def _summary(self) -> str:
        tally, held = self.line.tally, self.line.held
        state = self.origin.recipe if held is None else f"{held.reason} ({held.detail})"
        return f"{state}: {tally.triggers} parts, " + ", ".join(
            f"{tally.outcomes[outcome]} {outcome.replace('_', ' ')}" for outcome in Outcome
        )

    def _as_fields(self, state: str) -> dict[str, dict[str, object]]:
        return fields(state=state, recipe=self.origin.recipe, run=self._run)

    def _charge(self, inspector: Inspector) -> Charge:
        assert isinstance(inspector, Pipeline)
        recipe = inspector.recipe
        origin = Origin(
            station=self._station.name,
            run=self._run,
            recipe=recipe.product,
            recipe_digest=recipe.digest,
            engine=inspector.engine.label,
            simulated=self._station.camera.simulated,
            on_no_verdict=self._station.beat.on_no_verdict,
        )
        thresholds = recipe.thresholds
        return Charge(origin, thresholds.map, thresholds.good_median, thresholds.good_deviation)

    def _hello(self, is_first: bool) -> dict[str, Any]:
        """Return the first message to a publish process: `agent.publishing.publication.Hello`."""
        inspector = self.line.inspector
        assert isinstance(inspector, Pipeline)
        return {
            "run": self._run,
            "charge": asdict(self._charge(inspector)),
            "facts": run_facts(self._run, inspector.recipe, self._station.digest),
            "is_first": is_first,
        }

    def _warn_of_foreign_thresholds(self, pipeline: Pipeline) -> None:
        """A threshold belongs to the precision that it was fitted on."""
        fitted_on, label = pipeline.recipe.thresholds.fitted_on, pipeline.engine.label
        if not thresholds_serve(fitted_on, label):
            log.warning(
                "thresholds were fitted on %s, this engine is %s: run taktsight-agent replay --scores with this "
                "engine, then taktsight-calibration threshold", fitted_on, label
            )  # fmt: skip

    def _warn_of_short_watchdog(self) -> None:
        """An inspection that takes as long as it may must not be taken for one that hangs."""
        watchdog_s, deadline_s = self._supervisor.watchdog_s, self._station.beat.deadline_ms / 1e3
        if watchdog_s is not None and watchdog_s < 2 * deadline_s:
            log.warning("WatchdogSec is %g s: set it to %g s at least, twice deadline_ms", watchdog_s, 2 * deadline_s)


def _asked(operation: Callable[..., Change]) -> Callable[..., dict[str, Any]]:
    """Return the operation with an answer that JSON can carry."""
    return lambda **arguments: asdict(operation(**arguments))


def _wanted(station: Station) -> Wanted:
    """Return which pictures leave the inspect process."""
    heatmaps = station.mqtt is not None and station.mqtt.heatmaps
    return Wanted(heatmaps, "none" if station.archive is None else station.archive.pictures)


def _picture_bytes(pipeline: Pipeline) -> int:
    """Return how much memory pictures on their way may take: a dozen parts with frame, picture and map."""
    view = pipeline.recipe.view
    height, width = view.reference_size
    frame = height * width * view.channels * (1 if view.bit_depth == 8 else 2)
    of_one_part = frame + view.height * view.width * (view.channels + 4)
    return min(max(PICTURES_OF_PARTS * of_one_part, LEAST_PICTURE_BYTES), MOST_PICTURE_BYTES)


def _warm_up(pipeline: Pipeline) -> None:
    """Go the whole way a few times before the first part: memory, caches and threads are there when it comes."""
    recipe = pipeline.recipe
    gray = np.zeros(recipe.view.reference_size, np.uint8) if recipe.reference is None else recipe.reference.image
    depth = recipe.view.bit_depth
    pixels: Pixels = np.dstack([gray] * 3) if recipe.view.colour else gray
    if depth > 8:
        pixels = np.left_shift(pixels.astype(np.uint16), depth - 8)
    for _ in range(WARM_UPS):
        pipeline.inspect(Frame(pixels, 0, 0, 0, 0, bit_depth=depth))
