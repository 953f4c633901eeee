"""The publish process's work: what the line decided goes to the disk, to the broker, to the archive and to people.

main thread:         ring -> outbox (numbered, durable) -> archive; status, health
publishers' threads: outbox -> broker
command thread:      broker -> commands -> inspect process

A record is released from the ring once outbox and archive have it. How far the outbox is, is written down in the same
transaction; how far the archive is, its last lines tell. So a publish process that was killed in between is followed by
one that leaves nothing out and stores nothing twice.
"""

from __future__ import annotations

import json
import logging
import os
import select
import time
from dataclasses import dataclass, replace
from typing import Any

from agent.audit import AuditLog
from agent.between.control import Asking
from agent.between.record import Charge, Part, decoded
from agent.between.ring import Record, Ring
from agent.clock import StationClock
from agent.commands.commands import Commands
from agent.commands.log import CommandLog
from agent.commands.remote import RemoteOperations
from agent.commands.thread import CommandThread
from agent.config import Station
from agent.errors import InUse, StorageError
from agent.line.capture import FrameCapture
from agent.line.part_log import PartLog
from agent.mqtt.publisher import MqttPublisher, outbox_consumers
from agent.outbox.outbox import MemoryOutbox, Outbox, Taken
from agent.publishing.archive import Archive
from agent.publishing.messages import Alarm, HeatmapPayload, heatmap_payload, numbered, verdict_message
from agent.publishing.publisher import MemoryPublisher, Publisher, Undelivered
from agent.publishing.reporter import Reporter
from agent.sparkplug.publisher import CONSUMER as SPARKPLUG
from agent.sparkplug.publisher import SparkplugPublisher
from agent.verdict import Outcome, Reason, Verdict

log = logging.getLogger(__name__)

DELIVER_AT_END_S = 5.0
STORE_AGAIN_EVERY_S = 1.0
POLL_MS = 50
MOST_AT_ONCE = 64  # records taken in one transaction
LEAST_FREE_MB = 8.0  # that archived pictures leave of their disk, beside twice the outbox's reserve
WAIT_FOR_OUTBOX_S = 10.0  # for the publish process of the run before, which is about to end
DIED = "the inspection ended of itself or was killed: see the station's log"


@dataclass(frozen=True, slots=True)
class Hello:
    """What the inspect process says first."""

    run: str
    charge: Charge
    facts: dict[str, Any]  # `agent.audit.run_facts`
    is_first: bool  # False: a publish process before this one ended of itself


@dataclass(frozen=True, slots=True)
class _Draft:
    """A part on its way to the outbox."""

    message: dict[str, Any]
    heatmap: HeatmapPayload | None
    part: Part


class Publication:
    """Everything that outlives the takt. `run` is for one thread."""

    def __init__(self, station: Station, ring: Ring, wake: int, inspection: Asking, hello: Hello) -> None:
        """Raises what outbox, archive and audit trail raise: a station that cannot remember does not start."""
        self._station = station
        self._ring = ring
        self._wake = wake
        self._inspection = inspection
        self._hello = hello
        self._charge = hello.charge
        self._part_log = PartLog()
        self._sends_heatmaps = station.mqtt is not None and station.mqtt.heatmaps
        self._clock = StationClock(began_ns=ring.began_ns)  # a publish process before this one counted from there, too
        self._outbox = _opened_outbox(station)
        self._audit = AuditLog(station.outbox.folder)
        self._archive = _opened_archive(station)
        self._archived: set[int] = set()  # triggers that a publish process before this one archived and did not release
        self._capture = FrameCapture(station.commands.captures, station.photometric)
        self._command_log = CommandLog(station.outbox.folder, station.name) if station.commands.allow else None
        self._commands = self._command_thread()
        self._publishers = self._open_publishers()
        self._reporter = Reporter(station, ring, hello.charge, self._publishers)
        self._reporter.counters, self._reporter.gauges = self._counters, self._gauges
        self._reporter.alarms, self._reporter.outbox_alarms = self._alarms, self._outbox.alarms
        self._drafts: list[_Draft] = []  # read from the ring, not stored yet
        self._read = 0  # records that they were made of
        self.damaged = 0  # records that were not what was written: memory or a program is at fault
        self._refusal = ""  # why the disk takes no verdicts
        self._storing_again_s = 0.0
        self._about_line: dict[str, Any] = {}
        self._died = False
        if hello.is_first:  # last: what is recorded has all that it needs
            self._audit.append("agent start", new=hello.facts)

    @property
    def unstored(self) -> int:
        """Verdicts that the disk refuses; they wait in shared memory."""
        return self._ring.pending if self._refusal else 0

    def run(self) -> tuple[Undelivered, int]:
        """Publish until the inspect process has ended, then return what waits for the broker and what was never stored.

        An inspect process that ended without a word left parts without a verdict: they get theirs here.
        """
        self._catch_up()
        for publisher in self._publishers:
            publisher.start()
        if self._commands is not None:
            self._commands.start()
        self._reporter.start()
        while self._goes_on():
            self._come_round()
        return self._end()

    def _goes_on(self) -> bool:
        """Wait for work; return False once the inspect process has ended and all that it wrote was seen."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        poll.register(self._inspection.fileno(), 0)  # its end is told without asking
        events = dict(poll.poll(POLL_MS))
        if self._wake in events:
            os.eventfd_read(self._wake)
        self._about_line = json.loads(self._ring.board() or b"{}")
        ended, gone = self._about_line.get("ended", False), self._inspection.fileno() in events
        self._died = gone and not ended
        if not (ended or gone):
            return True
        self._storing_again_s = 0.0
        while self._take():
            pass
        return False

    def _come_round(self) -> None:
        """One round: at most so many parts, then what is due."""
        self._ring.beat()
        self._take()
        self._part_log.sum_up()
        self._reporter.come_round(self._about_line)

    def _take(self) -> bool:
        """Take records from the ring; return True if there may be more at once."""
        if self._archive is not None:
            self._archive.make_room()  # before the outbox has to use its reserve
        if self._read == 0:
            self._read_on(MOST_AT_ONCE)
        if self._read == 0 or (self._refusal and time.monotonic() < self._storing_again_s):
            return False
        return self._store(self._drafts)

    def _read_on(self, most: int) -> None:
        records = self._ring.read(most)
        self._read = len(records)
        self._drafts = [draft for record in records if (draft := self._draft(record)) is not None]

    def _store(self, drafts: list[_Draft]) -> bool:
        """Store parts, archive them and let the ring forget them; where the disk refuses, halt the line."""
        taken = Taken(self._hello.run, self._ring.released + self._read)
        try:
            messages = self._outbox.store([(draft.message, draft.heatmap) for draft in drafts], taken)
        except StorageError as error:
            self._storing_again_s = time.monotonic() + STORE_AGAIN_EVERY_S
            self._refusal = str(error)
            self._inspection.tell("hold", detail=f"verdicts cannot be stored: {error}")
            return False
        self._refusal = ""
        for publisher in self._publishers:
            publisher.wake()
        for draft, message in zip(drafts, messages, strict=True):
            self._keep(draft.part, message)
        self._release()
        return True

    def _release(self) -> None:
        """Let the ring forget what was read: it is stored and archived."""
        self._drafts = []
        self._ring.release(self._read)
        self._read = 0

    def _keep(self, part: Part, message: dict[str, Any]) -> None:
        """Archive a part that is stored, record its frame where somebody asked for it, and tell the log."""
        self._part_log.note(part.verdict, part.charge.origin.recipe)
        self._reporter.note(part)
        if self._archive is not None and part.verdict.trigger_id not in self._archived:
            self._archive.store(message, part.verdict, part.frame, part.charge.map_threshold)
        if part.is_captured and part.frame is not None:
            self._capture.take(part.frame)

    def _catch_up(self) -> None:
        """Archive and release what a publish process before this one has stored and did not come to archive."""
        if self._archive is not None:
            self._archived = self._archive.triggers(self._hello.run, 2 * MOST_AT_ONCE)
        taken = self._outbox.taken
        if taken is None or taken.run != self._hello.run:
            return
        self._read_on(max(0, taken.records - self._ring.released))
        first = self._outbox.last_seq - len(self._drafts) + 1
        for seq, draft in enumerate(self._drafts, start=first):
            self._keep(draft.part, numbered(draft.message, epoch=self._outbox.epoch, seq=seq))
        self._release()

    def _draft(self, record: Record) -> _Draft | None:
        try:
            part = decoded(record.data, record.pictures)
        except (ValueError, KeyError, TypeError):
            self.damaged += 1
            log.exception("record %d in shared memory is damaged: check this machine's memory", record.number)
            return None
        self._charge = part.charge
        verdict, origin = part.verdict, part.charge.origin
        stamp = self._clock.stamp(verdict.decided_ns)
        heatmap = None
        if self._sends_heatmaps and verdict.anomaly_map is not None:
            heatmap = heatmap_payload(verdict.anomaly_map, part.charge.map_threshold)
        try:
            return _Draft(verdict_message(verdict, origin, stamp, heatmap), heatmap, part)
        except ValueError as error:
            log.exception("part %d: its verdict cannot be told", verdict.trigger_id)
            fault = Verdict(verdict.trigger_id, Outcome.NO_VERDICT, Reason.FAULT, str(error), part_id=verdict.part_id)
            return _Draft(verdict_message(fault, origin, stamp), None, replace(part, verdict=fault))

    def _end(self) -> tuple[Undelivered, int]:
        """Speak for parts that a dead inspect process left behind, deliver what can be delivered, close everything."""
        if self._died:
            self._speak_for_the_dead()
        if self._commands is not None:
            self._commands.stop()
        self._reporter.stop()
        self._audit.tell("agent stop", new={"run": self._hello.run, "digest": self._charge.origin.recipe_digest})
        undelivered = [publisher.stop(DELIVER_AT_END_S) for publisher in self._publishers]
        lost = self._ring.pending + int(self._about_line.get("given_up", 0))
        if lost:
            log.error("%d verdicts are lost: %s", lost, self._refusal or "they were given up before")
        self._outbox.close()
        if self._command_log is not None:
            self._command_log.close()
        return Undelivered(
            verdicts=max((one.verdicts for one in undelivered), default=0),
            heatmaps=max((one.heatmaps for one in undelivered), default=0),
        ), lost

    def _speak_for_the_dead(self) -> None:
        """Give every part that the inspect process had taken up and not settled its no_verdict."""
        log.error(DIED)
        stamp = self._clock.stamp()
        drafts = []
        for trigger_id in self._ring.open_triggers():
            verdict = Verdict(trigger_id, Outcome.NO_VERDICT, Reason.CRASHED, DIED)
            message = verdict_message(verdict, self._charge.origin, stamp)
            drafts.append((message, Part(verdict, None, self._charge)))
        try:
            messages = self._outbox.store([(message, None) for message, _ in drafts])
        except StorageError as error:
            log.error("%d parts without a verdict, which cannot be stored: %s", len(drafts), error)
            return
        for (_, part), message in zip(drafts, messages, strict=True):
            self._keep(part, message)
        if self._ring.open_lost:
            log.error("%d more parts were under way, which nobody can name", self._ring.open_lost)

    def _counters(self) -> dict[str, int]:
        return {
            "archive_failures": 0 if self._archive is None else self._archive.failures,
            "unstored": self.unstored,
            "damaged_records": self.damaged,
            "capture_left": self._capture.left,
            **({} if self._commands is None else self._commands.counters()),
        }

    def _gauges(self) -> dict[str, float]:
        gauges = {
            "unstored": float(self.unstored),
            "archive_failures_total": 0.0 if self._archive is None else float(self._archive.failures),
        }
        return gauges if isinstance(self._outbox, MemoryOutbox) else {**gauges, "outbox_waiting": self._outbox.waiting}

    def _alarms(self) -> list[Alarm]:
        alarms = [Alarm("inspection_died", DIED)] if self._died else []
        if self._clock.last_step_ms:
            step_s = self._clock.last_step_ms / 1e3
            alarms.append(Alarm("clock_stepped", f"the wall clock was moved by {step_s:.1f} s in this run"))
        return alarms

    def _command_thread(self) -> CommandThread | None:
        if self._command_log is None:
            return None
        operations = RemoteOperations(self._inspection, self._capture, lambda: self.unstored)
        name, run, allow = self._station.name, self._hello.run, self._station.commands.allow
        return CommandThread(
            Commands(operations, self._command_log, station=name, run=run, allow=allow, audited=self._audit.command)
        )

    def _open_publishers(self) -> list[Publisher]:
        mqtt, origin = self._station.mqtt, self._charge.origin
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


def _opened_outbox(station: Station) -> Outbox | MemoryOutbox:
    """Return the outbox; one that another process uses is waited for: it may be the end of the run before."""
    if station.mqtt is None:
        return MemoryOutbox()
    give_up_s = time.monotonic() + WAIT_FOR_OUTBOX_S
    while True:
        try:
            return Outbox(station.outbox, station.name)
        except InUse:
            if time.monotonic() >= give_up_s:
                raise
            time.sleep(0.1)


def _opened_archive(station: Station) -> Archive | None:
    """Return the archive, if there is one; its pictures leave room for what the outbox takes its reserve from."""
    if station.archive is None:
        return None
    reserve_mb = 0.0 if station.mqtt is None else station.outbox.reserve_mb
    return Archive(station.archive, least_free_mb=LEAST_FREE_MB + 2.0 * reserve_mb)
