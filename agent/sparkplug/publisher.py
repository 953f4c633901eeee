"""Verdicts in Sparkplug B, beside the native topics: births, deaths, and one DDATA for every row of the outbox.

    caller's threads               Sparkplug thread                      paho's thread, one for each connection
    wake, publish_status -> events -> births, DDATA ------------------> socket
                                     events <------------------------- connected, subscribed, message, passed, lost

As in `agent.mqtt.publisher`, callbacks only post to a queue, and one thread owns all the rest. Every connection has a
client of its own: the last will (NDEATH with this connection's bdSeq) cannot be changed on one, and nothing that was
meant for one may go out on the next before its birth.

What this path promises, and what not. The specification sends data with QoS 0, so nobody confirms a verdict. What comes
nearest: after some DDATA we unsubscribe from a topic that we never subscribed to. A broker handles the packets of a
connection in order, so its answer proves that it has read all DDATA before; then, and only then, they are acknowledged
to the outbox. After a broken connection the rest is sent again, so a host may get a verdict twice and tells by
`Verdict/Epoch` and `Verdict/Seq`. Lost without a trace are verdicts that the broker read and could not hand on: no host
listened, its queue was full, the access list said no (QoS 0 has no answer for that), or the host died and the broker
had not noticed yet. With `primary_host`, verdicts wait in the outbox while that host is known to be offline, no more.
Where every verdict must arrive, use the native topics with acknowledging consumers.

Readings of the specification (Eclipse Sparkplug 3.0.0), strict where there was a choice: on a clean end NDEATH is
published and DISCONNECT asks for the will too (MQTT 5), so hosts see it twice with the same bdSeq; STATE counts only
inside the namespace, as JSON, and not if older than the one before; aliases are not used; DCMD is not subscribed to.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from agent.errors import StorageError
from agent.mqtt import client as mqtt_client
from agent.mqtt.client import MqttSettings, load_credentials
from agent.outbox.database import Row
from agent.outbox.outbox import Outbox
from agent.publishing.publisher import Undelivered
from agent.sparkplug.link import BirthNumbers, Down, Link, LinkEvent, Passed, Ready, Received
from agent.sparkplug.messages import (
    MOST_COMMAND_BYTES,
    HostState,
    SparkplugSettings,
    asks_for_rebirth,
    birth_metrics,
    device_metrics,
    host_state,
    row_metrics,
    status_metrics,
)
from agent.sparkplug.payload import MalformedPayload, decode
from calibration.errors import SettingsError

__all__ = ["CONSUMER", "SparkplugPublisher", "SparkplugSettings"]

log = logging.getLogger(__name__)

CONSUMER = "@sparkplug"  # its name in the outbox; none that a consumer of ours can have
BIRTH_NUMBER_FILE = "sparkplug-bdseq"
WINDOW = 64  # rows sent and not yet known to have reached the broker
COUNTERS = ("births", "rebirths", "rows", "historical", "refused", "ignoredCommands", "ignoredStates")
REPORT_EVERY_S = 60.0
POLL_S, STOPPING_POLL_S = 0.25, 0.02
STORAGE_RETRY_S = 1.0
GOODBYE_S = 1.0  # kept back from the time to stop, for the deaths; at most a quarter of it


@dataclass(frozen=True, slots=True)
class _Status:
    message: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Stop:
    drain_until_s: float  # time.monotonic()
    deadline_s: float


_Event = LinkEvent | _Status | _Stop | None  # None: something new waits in the outbox


class SparkplugPublisher:
    """Tells a host in Sparkplug B what the outbox holds, in which the station registers CONSUMER for it.

    start, wake, publish_status and stop are those of `agent.publishing.publisher`; it takes no commands of ours.

    folder: writable; keeps the number of the last birth over restarts.

    Raises SettingsError if a password or certificate cannot be read.
    """

    def __init__(self, mqtt: MqttSettings, settings: SparkplugSettings, outbox: Outbox, folder: Path) -> None:
        self._teller = _Teller(mqtt, settings, outbox, BirthNumbers(folder / BIRTH_NUMBER_FILE))

    def start(self) -> None:
        """Begin to connect; returns at once."""
        self._teller.start()

    def wake(self) -> None:
        """Look into the outbox: something new was stored."""
        self._teller.events.put(None)

    def publish_status(self, message: dict[str, Any]) -> None:
        """Make this the station's status: `Station/...`, now and in every birth."""
        self._teller.events.put(_Status(dict(message)))

    def counters(self) -> dict[str, int]:
        """Return what was counted since the start; any thread may ask."""
        return dict(self._teller.counts)

    def stop(self, timeout_s: float) -> Undelivered:
        """Send what waits if a host listens, say goodbye, and return what still waits; never raises."""
        if self._teller.is_alive():
            deadline_s = time.monotonic() + timeout_s
            self._teller.events.put(_Stop(deadline_s - min(GOODBYE_S, timeout_s / 4), deadline_s))
            self._teller.join(timeout_s)
        return Undelivered(verdicts=self._teller.waiting, heatmaps=0)


class _Teller(threading.Thread):
    """The one thread that connects and sends. All its fields are its own, but for `events`, `counts` and `waiting`."""

    def __init__(self, mqtt: MqttSettings, settings: SparkplugSettings, outbox: Outbox, numbers: BirthNumbers) -> None:
        super().__init__(name="taktsight-sparkplug", daemon=True)
        self.events: SimpleQueue[_Event] = SimpleQueue()
        self.counts: Counter[str] = Counter(
            dict.fromkeys(
                ("births", "rebirths", "rows", "historical", "refused", "ignoredCommands", "ignoredStates"), 0
            )
        )
        self.waiting = 0
        self._mqtt, self._settings, self._outbox, self._numbers = mqtt, settings, outbox, numbers
        load_credentials(mqtt)  # what cannot work shall fail now
        self._link: Link | None = None
        self._retry_at_s, self._retry_s = 0.0, float(mqtt_client.RECONNECT_MIN_S)
        self._quiet_storage_until_s = 0.0
        self._host: HostState | None = None  # what the primary host said last, on this connection
        self._is_born = self._is_rebirth_due = False
        self._status: dict[str, Any] | None = None
        self._status_is_due = False
        self._epoch = ""
        self._sent = self._acknowledged = 0  # numbers of this epoch
        self._question: tuple[int, int] | None = None  # to the broker: message id, highest number sent before
        self._passed = 0  # highest number that the broker has read
        self._historical_upto = 0  # stored before the present birth
        self._latest: dict[str, Any] | None = None  # the newest verdict we know of
        self._stop_asked: _Stop | None = None
        self._state = ""
        self._quiet_until_s: dict[str, float] = {}

    def run(self) -> None:
        """Send until asked to stop, then say goodbye."""
        while self._has_work():
            self._handle_events()
            self._keep_connected()
            try:
                self._tell()
            except StorageError as error:
                self._quiet_storage_until_s = time.monotonic() + STORAGE_RETRY_S
                self._note("storage", logging.ERROR, f"cannot read the outbox, trying again: {error}")
        self._say_goodbye()

    def _has_work(self) -> bool:
        if self._stop_asked is None:
            return True
        return self._is_born and self.waiting > 0 and time.monotonic() < self._stop_asked.drain_until_s

    def _handle_events(self) -> None:
        """Wait a moment for an event, then handle all that are there by now."""
        try:
            self._handle(self.events.get(timeout=POLL_S if self._stop_asked is None else STOPPING_POLL_S))
            for _ in range(self.events.qsize()):  # and no more: a flood of commands must not keep us from sending
                self._handle(self.events.get_nowait())
        except Empty:
            pass

    def _handle(self, event: _Event) -> None:
        if isinstance(event, LinkEvent) and event.link is not self._link:
            return  # of a connection that we have left
        match event:
            case Ready():
                event.link.is_ready = True
                waits = self._settings.primary_host is not None
                self._note("connected", logging.INFO, "connected" + ", waiting for the primary host" * waits)
            case Received():
                self._receive(event)
            case Passed():
                if self._question is not None and event.mid == self._question[0]:
                    self._passed, self._question = self._question[1], None
            case Down():
                level = logging.ERROR if event.state == "refused" else logging.WARNING
                self._note(event.state, level, f"{event.state}: {event.why}; verdicts wait in the outbox")
                event.link.is_ready = False  # nobody is there to say goodbye to
                self._drop_link()
            case _Status():
                self._status, self._status_is_due = event.message, True
            case _Stop():
                self._stop_asked = event

    # The connection

    def _keep_connected(self) -> None:
        """Connect if we are not, and it is time to try again."""
        if self._link is not None or self._stop_asked is not None or time.monotonic() < self._retry_at_s:
            return
        try:
            self._link = Link(self._mqtt, self._settings, self._numbers.next(), self.events.put)
        except SettingsError as error:  # a certificate is being replaced
            self._note("refused", logging.ERROR, f"cannot connect, trying again: {error}")
            self._drop_link()
        else:
            self._link.connect()

    def _drop_link(self) -> None:
        """Leave the connection, whatever its state, and forget all that was true on it alone."""
        if self._link is not None:
            self._link.end()
        self._link = self._host = self._question = None
        self._is_born = self._is_rebirth_due = False
        self._sent = self._passed = self._acknowledged
        self._retry_at_s = time.monotonic() + self._retry_s
        self._retry_s = min(2 * self._retry_s, mqtt_client.RECONNECT_MAX_S)

    def _receive(self, message: Received) -> None:
        """Take in a command or the state of the primary host; whatever is neither is ignored and counted."""
        counter = "ignoredStates" if message.topic == self._settings.host_topic() else "ignoredCommands"
        try:
            if message.payload is None:
                raise MalformedPayload(f"more than {MOST_COMMAND_BYTES} bytes")
            if counter == "ignoredStates":
                self._receive_state(host_state(message.payload))
            elif not message.retained and asks_for_rebirth(decode(message.payload)):
                self._is_rebirth_due = True
            else:
                self.counts[counter] += 1
        except MalformedPayload as error:
            self.counts[counter] += 1
            log.debug("ignored a message on %s: %s", message.topic, error)

    def _receive_state(self, state: HostState) -> None:
        if self._host is not None and state.timestamp_ms < self._host.timestamp_ms:
            self.counts["ignoredStates"] += 1  # the will of an older connection of the host
            return
        self._host = state
        if not state.online and self._is_born:  # NDEATH, disconnect, and start over: message-flow-...-phid-offline
            self._note("host", logging.WARNING, f"primary host {self._settings.primary_host} is offline; verdicts wait")
            self._end_birth()
            self._retry_s = float(mqtt_client.RECONNECT_MIN_S)
            self._drop_link()

    # What is said on it

    def _tell(self) -> None:
        """Say what there is to say, if anybody is there to hear it. Raises StorageError."""
        if time.monotonic() < self._quiet_storage_until_s:
            return
        self._look_into_outbox()
        link = self._link
        if link is None or not link.is_ready:
            return
        if self._settings.primary_host is not None and not (self._host and self._host.online):
            return
        if not self._is_born or self._is_rebirth_due:
            self._give_birth(link)
        if self._status_is_due and self._status is not None:
            self._status_is_due = False
            now_ms = _now_ms()
            link.publish("DDATA", status_metrics(self._status, now_ms), now_ms)
        self._send_rows(link)
        if self._question is None and self._sent > self._passed:
            mid = link.ask_whether_passed()
            self._question = None if mid is None else (mid, self._sent)

    def _look_into_outbox(self) -> None:
        """Acknowledge what the broker has read, and start over if the outbox had to."""
        epoch = self._outbox.epoch
        if epoch != self._epoch:  # the first time, or a damaged database was replaced
            stands_at = self._outbox.acknowledged().get(CONSUMER)
            if stands_at is None:
                raise StorageError(f"the outbox does not wait for a consumer {CONSUMER!r}: set_consumers comes first")
            self._sent = self._passed = self._acknowledged = stands_at
            self._historical_upto, self._question, self._epoch = 0, None, epoch
        if self._passed > self._acknowledged:
            if not self._outbox.acknowledge(CONSUMER, self._passed):
                self._epoch = ""  # replaced this moment: look again where we stand
                raise StorageError(f"seq {self._passed} of epoch {epoch} is not the outbox's any more")
            self._acknowledged = self._passed
        self.waiting = self._outbox.last_seq - self._acknowledged

    def _give_birth(self, link: Link) -> None:
        """Send NBIRTH and DBIRTH; whatever is stored by now is history from here on."""
        self.counts["rebirths" if self._is_born else "births"] += 1
        self._historical_upto = self._outbox.last_seq
        for row in self._outbox.read(self._historical_upto - 1, 1):
            if row.topic == "verdict":
                self._latest = _message(row)
        now_ms = _now_ms()
        link.begin_session()
        link.publish("NBIRTH", birth_metrics(link.bdseq, now_ms), now_ms)
        link.publish("DBIRTH", device_metrics(self._latest, self._status, now_ms), now_ms)
        self._is_born, self._is_rebirth_due, self._status_is_due = True, False, False
        self._retry_s = float(mqtt_client.RECONNECT_MIN_S)
        self._note("born", logging.INFO, f"born with bdSeq {link.bdseq}")

    def _send_rows(self, link: Link) -> None:
        """Send rows in order, as many as may be unconfirmed."""
        room = WINDOW - (self._sent - self._passed)
        if room <= 0 or self._outbox.last_seq <= self._sent:
            return
        for row in self._outbox.read(self._sent, room):
            historical = row.seq <= self._historical_upto
            message = _message(row)
            now_ms = _now_ms()
            metrics = row_metrics(row.topic, message, historical=historical, now_ms=now_ms)
            if link.publish("DDATA", metrics, now_ms):
                self.counts["rows"] += 1
                self.counts["historical"] += historical
            else:
                self.counts["refused"] += 1
                log.error("row %d is larger than the broker takes: it is left out of Sparkplug", row.seq)
            self._sent = row.seq
            if row.topic == "verdict":
                self._latest = message

    def _end_birth(self) -> None:
        if self._link is not None and self._is_born:
            self._link.publish("DDEATH", (), _now_ms())
            self._is_born = False

    def _say_goodbye(self) -> None:
        """Send the deaths if there is a connection, and wait for them no longer than was asked for."""
        if self._link is None or self._stop_asked is None:
            return
        self._end_birth()
        self._link.end(deadline_s=self._stop_asked.deadline_s)

    def _note(self, state: str, level: int, text: str) -> None:
        """Log the state of the connection when it changes, the same state at most once a minute."""
        now_s = time.monotonic()
        if state != self._state and now_s >= self._quiet_until_s.get(state, 0.0):
            self._quiet_until_s[state] = now_s + REPORT_EVERY_S
            log.log(level, "Sparkplug at %s:%d: %s", self._mqtt.host, self._mqtt.port, text)
        self._state = state


def _message(row: Row) -> dict[str, Any]:
    """Return a row's JSON object; the outbox has checked that it is what was stored."""
    message = json.loads(row.payload)
    return message if isinstance(message, dict) else {}


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
