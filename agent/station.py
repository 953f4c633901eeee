"""One station put together: camera, pipeline, line, and where its verdicts go.

line's delivery thread:  verdicts -> outbox (numbered, durable) -> archive
publishers' threads:     outbox -> broker
command thread:          broker -> commands -> line, between two parts
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from agent.archive import Archive
from agent.audit import AuditLog, run_facts
from agent.capture import FrameCapture
from agent.changeover import Changeover
from agent.clock import StationClock
from agent.command_log import CommandLog
from agent.command_thread import CommandThread
from agent.commands import Commands
from agent.config import Station
from agent.engine import TOLERANCES
from agent.errors import StorageError
from agent.journal import fields
from agent.loop import Line, Settled, Tally
from agent.messages import Alarm, HeatmapPayload, Origin, heatmap_payload, new_id, status_message, verdict_message
from agent.mqtt import MqttPublisher, outbox_consumers
from agent.notify import Supervisor
from agent.operations import LineOperations
from agent.outbox import MemoryOutbox, Outbox
from agent.part_log import PartLog
from agent.pipeline import Pipeline
from agent.publisher import MemoryPublisher, Publisher, Undelivered
from agent.sparkplug_publisher import CONSUMER as SPARKPLUG
from agent.sparkplug_publisher import SparkplugPublisher
from agent.verdict import Outcome, Reason, Verdict

log = logging.getLogger(__name__)

STATUS_EVERY_S = 5.0
DELIVER_AT_END_S = 5.0
STOP_MARGIN_S = 5.0  # for a publisher that ends a little later than it was asked to
STORE_AGAIN_EVERY_S = 1.0
MOST_UNSTORED = 10_000  # verdicts kept in memory while the disk refuses; about 15 MB


@dataclass(frozen=True, slots=True)
class _Draft:
    """A verdict on its way to the outbox."""

    message: dict[str, Any]
    heatmap: HeatmapPayload | None
    settled: Settled


class RunningStation:
    """Everything that one run needs."""

    def __init__(self, station: Station, supervisor: Supervisor | None = None) -> None:
        """Raises what recipe, engine, outbox and archive raise: what cannot judge or remember does not start."""
        self._station = station
        self._supervisor = supervisor or Supervisor()
        self._part_log = PartLog()
        self._run = new_id()
        self._sends_heatmaps = station.mqtt is not None and station.mqtt.heatmaps
        self._clock = StationClock()
        self._audit = AuditLog(station.outbox.folder)
        self._outbox: Outbox | MemoryOutbox = _outbox(station)
        self._command_log = CommandLog(station.outbox.folder, station.name) if station.commands.allow else None
        changeover = Changeover(station.recipes, self._command_log)
        self.pipeline = changeover.first()
        self._warn_of_foreign_thresholds()
        self._warn_of_short_watchdog()
        self._archive = None if station.archive is None else Archive(station.archive)
        self._capture = FrameCapture(station.commands.captures, station.photometric)
        self.line = Line(station.camera.open(), self.pipeline, station.beat, self._deliver, self._come_round)
        self._commands = self._command_thread(changeover)
        self._publishers = self._open_publishers()
        self._unstored: list[_Draft] = []
        self._given_up = 0  # verdicts that were never stored
        self._storing_again_s = 0.0
        self._status_due_s = 0.0

    @property
    def origin(self) -> Origin:
        """Who speaks at this moment: changes with the recipe."""
        return self._origin(self.line.inspector)

    @property
    def lost(self) -> int:
        """Verdicts that could not be stored; what is still in memory goes with the process."""
        return len(self._unstored) + self._given_up

    def stop(self) -> None:
        """Give no more triggers; `run` returns once all is settled and delivered. Safe in a signal handler."""
        self._supervisor.extend(self._station.beat.deadline_ms / 1e3 + STOP_MARGIN_S)
        self.line.stop()

    def run(self, count: int | None) -> tuple[Tally, Undelivered]:
        """Inspect `count` parts (None: until `line.stop`); return what happened and what still waits for the broker."""
        self._audit.append("agent start", new=run_facts(self._run, self.pipeline.recipe, self._station.digest))
        for publisher in self._publishers:
            publisher.start()
        if self._commands is not None:
            self._commands.start()
        self._publish_status("ready")
        log.info("ready: %s", self.origin.recipe, extra=self._as_fields("ready"))
        try:
            tally = self.line.run(count)
        finally:
            self._supervisor.stopping()
            if self._commands is not None:
                self._commands.stop()
            self._storing_again_s = 0.0
            self._store([])
            self._publish_status("stopped")
            log.info("stopped", extra=self._as_fields("stopped"))
            self._audit.tell("agent stop", new={"run": self._run, "digest": self.origin.recipe_digest})
            undelivered = [self._stopped(publisher) for publisher in self._publishers]
            self._outbox.close()
            if self._command_log is not None:
                self._command_log.close()
        return tally, Undelivered(
            verdicts=max((one.verdicts for one in undelivered), default=0),
            heatmaps=max((one.heatmaps for one in undelivered), default=0),
        )

    def _deliver(self, batch: Sequence[Settled]) -> None:
        """Store verdicts, then archive them. Runs in the line's delivery thread."""
        for settled in batch:
            self._part_log.note(settled.verdict, self._origin(settled.inspector).recipe)
        self._store([self._draft(settled) for settled in batch])
        for settled in batch:
            if settled.frame is not None:
                self._capture.take(settled.frame)

    def _come_round(self, heartbeat_ns: int) -> None:
        """Tell those who watch over the line, with or without parts. Runs in the line's delivery thread."""
        self._supervisor.heartbeat(heartbeat_ns)
        self._part_log.sum_up()
        if time.monotonic() >= self._status_due_s:
            self._status_due_s = time.monotonic() + STATUS_EVERY_S
            self._publish_status("running")
            self._supervisor.status(self._summary())

    def _stopped(self, publisher: Publisher) -> Undelivered:
        """Let what waits be delivered for a while, and the service manager know that this takes its time."""
        self._supervisor.extend(DELIVER_AT_END_S + STOP_MARGIN_S)
        return publisher.stop(DELIVER_AT_END_S)

    def _summary(self) -> str:
        tally, held = self.line.tally, self.line.held
        state = self.origin.recipe if held is None else f"{held.reason} ({held.detail})"
        return f"{state}: {tally.triggers} parts, " + ", ".join(
            f"{tally.outcomes[outcome]} {outcome.replace('_', ' ')}" for outcome in Outcome
        )

    def _as_fields(self, state: str) -> dict[str, dict[str, object]]:
        return fields(state=state, recipe=self.origin.recipe, run=self._run)

    def _draft(self, settled: Settled) -> _Draft:
        verdict, origin = settled.verdict, self._origin(settled.inspector)
        stamp = self._clock.stamp(verdict.decided_ns)
        heatmap = None
        if self._sends_heatmaps and verdict.anomaly_map is not None:
            heatmap = heatmap_payload(verdict.anomaly_map, _map_threshold(settled))
        try:
            return _Draft(verdict_message(verdict, origin, stamp, heatmap), heatmap, settled)
        except ValueError as error:
            log.exception("part %d: its verdict cannot be told", verdict.trigger_id)
            fault = Verdict(verdict.trigger_id, Outcome.NO_VERDICT, Reason.FAULT, str(error), part_id=verdict.part_id)
            return _Draft(verdict_message(fault, origin, stamp), None, settled)

    def _store(self, drafts: list[_Draft]) -> None:
        """Store what could not be stored before, and these; where the disk refuses, halt the line and keep them."""
        waited = bool(self._unstored)
        self._unstored += drafts
        if not self._unstored:
            return
        if waited and time.monotonic() < self._storing_again_s:
            self._shed_unstored()
            return
        try:
            messages = self._outbox.store([(draft.message, draft.heatmap) for draft in self._unstored])
        except StorageError as error:
            self._storing_again_s = time.monotonic() + STORE_AGAIN_EVERY_S
            self.line.hold(Reason.HALTED, f"verdicts cannot be stored: {error}")
            self._unstored = [_lean(draft) for draft in self._unstored]
            self._shed_unstored()
            return
        stored, self._unstored = self._unstored, []
        for publisher in self._publishers:
            publisher.wake()
        if self._archive is not None:
            for draft, message in zip(stored, messages, strict=True):
                settled = draft.settled
                self._archive.store(message, settled.verdict, settled.frame, _map_threshold(settled))

    def _shed_unstored(self) -> None:
        """Bound the memory: the newest go, which a halted line has made without looking at a part."""
        self._given_up += max(0, len(self._unstored) - MOST_UNSTORED)
        del self._unstored[MOST_UNSTORED:]

    def _publish_status(self, state: str) -> None:
        held = self.line.held
        if held is not None and state in ("ready", "running"):
            state = str(held.reason)
        message = status_message(self.origin, state, counters=self._counters(), alarms=self._alarms())
        for publisher in self._publishers:
            publisher.publish_status(message)

    def _counters(self) -> dict[str, int]:
        tally = self.line.tally
        return {
            "triggers": tally.triggers,
            **tally.outcomes,
            "stale_frames": tally.stale_frames,
            "late_results": tally.late_results,
            "shed_pictures": tally.shed_pictures,
            "delivery_faults": tally.delivery_faults,
            "archive_failures": 0 if self._archive is None else self._archive.failures,
            "unstored": len(self._unstored),
            "given_up": self._given_up,
            "capture_left": self._capture.left,
            **({} if self._commands is None else self._commands.counters()),
            **self._sparkplug_counters(),
        }

    def _sparkplug_counters(self) -> dict[str, int]:
        found = [publisher.counters() for publisher in self._publishers if isinstance(publisher, SparkplugPublisher)]
        return {f"sparkplug_{name}": number for counters in found for name, number in counters.items()}

    def _alarms(self) -> list[Alarm]:
        alarms = []
        held = self.line.held
        if held is not None:
            alarms.append(Alarm(str(held.reason), held.detail))
        if self._clock.last_step_ms:
            alarms.append(
                Alarm(
                    "clock_stepped", f"the wall clock was moved by {self._clock.last_step_ms / 1e3:.1f} s in this run"
                )
            )
        return alarms

    def _origin(self, inspector: object) -> Origin:
        assert isinstance(inspector, Pipeline)
        return Origin(
            station=self._station.name,
            run=self._run,
            recipe=inspector.recipe.product,
            recipe_digest=inspector.recipe.digest,
            engine=inspector.engine.label,
            simulated=self._station.camera.simulated,
            on_no_verdict=self._station.on_no_verdict,
        )

    def _command_thread(self, changeover: Changeover) -> CommandThread | None:
        if self._command_log is None:
            return None
        operations = LineOperations(
            self.line,
            self.pipeline,
            changeover=changeover,
            capture=self._capture,
            tolerance=TOLERANCES[self._station.engine.precision],
            unstored=lambda: len(self._unstored),
        )
        allow, audited = self._station.commands.allow, self._audit.command
        name, run = self._station.name, self._run
        return CommandThread(
            Commands(operations, self._command_log, station=name, run=run, allow=allow, audited=audited)
        )

    def _open_publishers(self) -> list[Publisher]:
        mqtt, origin = self._station.mqtt, self._origin(self.pipeline)
        if mqtt is None or isinstance(self._outbox, MemoryOutbox):
            return [MemoryPublisher()]
        on_command = None if self._commands is None else self._commands.put
        sparkplug = self._station.sparkplug
        self._outbox.set_consumers((*outbox_consumers(mqtt), *([] if sparkplug is None else [SPARKPLUG])))
        publisher = MqttPublisher(mqtt, origin, self._outbox, on_command=on_command)
        if self._commands is not None:
            self._commands.reply = publisher.publish_reply
        if sparkplug is None:
            return [publisher]
        return [publisher, SparkplugPublisher(mqtt, sparkplug, self._outbox, self._station.outbox.folder)]

    def _warn_of_foreign_thresholds(self) -> None:
        """A threshold belongs to the precision that it was fitted on."""
        fitted_on, label = self.pipeline.recipe.thresholds.fitted_on, self.pipeline.engine.label
        precision = label.split(",")[0].split()[-1]
        if precision not in fitted_on:
            log.warning(
                "thresholds were fitted on %s, this engine is %s: run taktsight-agent replay --scores with this "
                "engine, then taktsight-calibration threshold", fitted_on, label
            )  # fmt: skip

    def _warn_of_short_watchdog(self) -> None:
        """An inspection that takes as long as it may must not be taken for one that hangs."""
        watchdog_s, deadline_s = self._supervisor.watchdog_s, self._station.beat.deadline_ms / 1e3
        if watchdog_s is not None and watchdog_s < 2 * deadline_s:
            log.warning("WatchdogSec is %g s: set it to %g s at least, twice deadline_ms", watchdog_s, 2 * deadline_s)


def _outbox(station: Station) -> Outbox | MemoryOutbox:
    return MemoryOutbox() if station.mqtt is None else Outbox(station.outbox, station.name)


def _map_threshold(settled: Settled) -> float:
    assert isinstance(settled.inspector, Pipeline)
    return settled.inspector.recipe.thresholds.map


def _lean(draft: _Draft) -> _Draft:
    """Return it without pictures: it may have to wait for long."""
    settled = draft.settled
    lean = replace(settled, frame=None, verdict=replace(settled.verdict, picture=None, anomaly_map=None))
    return _Draft({**draft.message, "heatmap": None}, None, lean)
