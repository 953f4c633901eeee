"""Verdicts over MQTT: at least once, in order, without ever holding up the line.

    caller's thread            delivery thread                      paho's network thread
    publish_verdict -> Backlog -> at most WINDOW in flight -------> socket
                                  events <------------------------- on_connect, on_disconnect, on_publish

paho calls back while it holds its own locks (a lock around publish() that on_publish also took hung after 1450
messages), so callbacks only post to a queue and one thread owns all delivery. What was in flight when the connection
broke is sent again by paho on the next connection; nothing new follows until that is confirmed, so order holds.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from paho.mqtt.client import Client
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from agent.messages import HeatmapPayload, Origin, heatmap_topic, status_message
from agent.mqtt_client import MqttSettings, begin_connecting, build_client
from agent.publisher import Backlog, Kind, Parcel, Undelivered

__all__ = ["MqttPublisher", "MqttSettings"]

log = logging.getLogger(__name__)

WINDOW = 16  # messages in flight; below mosquitto's and paho's own limit of 20
HEATMAP_EXPIRY_S = 3600
REPORT_EVERY_S = 60.0
GOODBYE_S = 1.0  # kept back from the time to stop, for the last status; at most a quarter of it
POLL_S, STOPPING_POLL_S = 0.25, 0.02
PACKET_OVERHEAD_BYTES = 128  # fixed header, lengths and properties: under 60 for what is sent here
NO_SUBSCRIBERS = 0x10  # MQTT 5: accepted, but nobody listens
FIRST_FAILURE = 0x80  # MQTT 5: this reason code and all above are refusals


@dataclass(frozen=True, slots=True)
class _Up:
    window: int
    max_packet_bytes: int | None


@dataclass(frozen=True, slots=True)
class _Down:
    state: str  # "lost" | "absent" | "refused"
    why: str


@dataclass(frozen=True, slots=True)
class _Answer:
    mid: int
    code: int
    meaning: str


@dataclass(frozen=True, slots=True)
class _Status:
    message: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Stop:
    drain_until_s: float  # time.monotonic()
    deadline_s: float


_Event = _Up | _Down | _Answer | _Status | _Stop | None  # None: something new waits in the backlog


class MqttPublisher:
    """A Publisher over MQTT. Topics below the root: `verdict`, `heatmap/{seq}`, `status` (retained, with last will).

    Raises SettingsError if a password or certificate cannot be read.
    """

    def __init__(self, settings: MqttSettings, origin: Origin) -> None:
        self._settings = settings
        self._backlog = Backlog(settings.max_waiting_verdicts)
        self._delivery = _Delivery(settings, origin, self._backlog)

    def start(self) -> None:
        """Begin to connect; returns at once."""
        self._delivery.connect()
        self._delivery.start()

    def publish_verdict(self, message: dict[str, Any], heatmap: HeatmapPayload | None) -> None:
        """Encode the message and let it wait for the broker."""
        root = self._settings.topic
        picture = None
        if heatmap is not None and self._settings.heatmaps:
            topic = f"{root}/{heatmap_topic(message['seq'])}"
            picture = Parcel(Kind.HEATMAP, topic, heatmap.data, heatmap.content_type)
        else:
            message = {**message, "heatmap": None}  # no link to what is not sent
        self._backlog.put(Parcel(Kind.VERDICT, f"{root}/verdict", _encode(message), "application/json"), picture)
        self._delivery.events.put(None)

    def publish_status(self, message: dict[str, Any]) -> None:
        """Make this the retained status, now and after every reconnection."""
        self._delivery.events.put(_Status(dict(message)))

    def stop(self, timeout_s: float) -> Undelivered:
        """Deliver what waits, publish `stopped`, disconnect; returns within timeout_s what was never confirmed."""
        if self._delivery.is_alive():
            deadline_s = time.monotonic() + timeout_s
            self._delivery.events.put(_Stop(deadline_s - min(GOODBYE_S, timeout_s / 4), deadline_s))
            self._delivery.join(timeout_s)
        return self._delivery.undelivered()


class _Delivery(threading.Thread):
    """The one thread that publishes. All its fields are its own, but for `events` and counters that others read."""

    def __init__(self, settings: MqttSettings, origin: Origin, backlog: Backlog) -> None:
        super().__init__(name="taktsight-delivery", daemon=True)
        self.events: SimpleQueue[_Event] = SimpleQueue()
        self._settings = settings
        self._origin = origin
        self._backlog = backlog
        self._client = build_client(settings, settings.client_id or "taktsight-" + settings.topic.replace("/", "-"))
        self._window = 0  # 0 while there is no connection
        self._max_packet_bytes: int | None = None
        self._in_flight: dict[int, Parcel] = {}  # by paho's message id
        self._sent_again: set[int] = set()  # in flight when the last connection broke, not confirmed since
        self._status = status_message(origin, "starting")
        self._status_is_due = True
        self._stop_asked: _Stop | None = None
        self._has_ended = False
        self._confirmed: Counter[Kind] = Counter()
        self._refused: Counter[Kind] = Counter()
        self._no_subscribers: Counter[Kind] = Counter()
        self._connection_log = _ConnectionLog(f"MQTT broker {settings.host}:{settings.port}")
        self._loss_log = _LossLog()

    def connect(self) -> None:
        """Leave the last will with the client and begin to connect."""
        will = _encode(status_message(self._origin, "offline"))
        self._client.will_set(f"{self._settings.topic}/status", will, qos=1, retain=True)
        self._client.on_connect = self._on_connect
        self._client.on_connect_fail = self._on_connect_fail
        self._client.on_disconnect = self._on_disconnect
        self._client.on_publish = self._on_publish
        begin_connecting(self._client, self._settings)

    def undelivered(self) -> Undelivered:
        """Return what was handed over and is not confirmed."""
        missing = {kind: self._backlog.handed[kind] - self._confirmed[kind] for kind in (Kind.VERDICT, Kind.HEATMAP)}
        return Undelivered(verdicts=missing[Kind.VERDICT], heatmaps=missing[Kind.HEATMAP])

    def run(self) -> None:
        """Deliver until asked to stop, then say goodbye."""
        while self._has_work():
            self._handle_events()
            self._send()
            self._report_losses()
        self._say_goodbye()

    def _has_work(self) -> bool:
        if self._stop_asked is None:
            return True
        waiting = self._backlog.waiting(Kind.VERDICT) or self._backlog.waiting(Kind.HEATMAP) or self._in_flight
        return bool(waiting) and time.monotonic() < self._stop_asked.drain_until_s

    def _handle_events(self) -> None:
        """Wait a moment for an event, then handle all there are."""
        try:
            event = self.events.get(timeout=POLL_S if self._stop_asked is None else STOPPING_POLL_S)
            while True:
                self._handle(event)
                event = self.events.get_nowait()
        except Empty:
            pass

    def _handle(self, event: _Event) -> None:
        match event:
            case _Up():
                self._window, self._max_packet_bytes = event.window, event.max_packet_bytes
                self._sent_again = set(self._in_flight)
                self._status_is_due = True
                self._connection_log.note("connected", logging.INFO, "connected")
            case _Down():
                self._window = 0
                level = logging.ERROR if event.state == "refused" else logging.WARNING
                self._connection_log.note(event.state, level, f"{event.state}: {event.why}; verdicts wait in memory")
            case _Answer():
                self._settle(event)
            case _Status():
                self._status, self._status_is_due = event.message, True
            case _Stop():
                self._stop_asked = event

    def _settle(self, answer: _Answer) -> None:
        """Count what the broker said about one message."""
        self._sent_again.discard(answer.mid)
        parcel = self._in_flight.pop(answer.mid, None)
        if parcel is None:
            return
        if answer.code >= FIRST_FAILURE:
            self._refuse(parcel, answer.meaning)
            return
        self._confirmed[parcel.kind] += 1
        if answer.code == NO_SUBSCRIBERS:
            self._no_subscribers[parcel.kind] += 1

    def _refuse(self, parcel: Parcel, why: str) -> None:
        self._refused[parcel.kind] += 1
        self._loss_log.last_refusal = f"{parcel.topic}: {why}"

    def _send(self) -> None:
        """Publish the status if it is due, then as much of the backlog as the window has room for."""
        if not self._window or self._sent_again:
            return
        if self._status_is_due:
            self._publish_status()
        while len(self._in_flight) < self._window:
            parcel = self._backlog.take()
            if parcel is None:
                return
            if self._is_too_large(parcel):
                self._refuse(parcel, f"{len(parcel.payload)} bytes, the broker takes {self._max_packet_bytes}")
            else:
                self._publish(parcel)

    def _publish_status(self) -> None:
        self._status_is_due = False
        payload = _encode({**self._status, **self._counters()})
        self._publish(Parcel(Kind.STATUS, f"{self._settings.topic}/status", payload, "application/json"))

    def _publish(self, parcel: Parcel) -> None:
        """Hand a parcel to paho, which keeps it until it is answered, over reconnections too."""
        properties = _properties(parcel) if self._settings.protocol == 5 else None
        retain = parcel.kind is Kind.STATUS
        info = self._client.publish(parcel.topic, parcel.payload, qos=1, retain=retain, properties=properties)
        self._in_flight[info.mid] = parcel

    def _is_too_large(self, parcel: Parcel) -> bool:
        size_bytes = len(parcel.payload) + len(parcel.topic.encode()) + PACKET_OVERHEAD_BYTES
        return self._max_packet_bytes is not None and size_bytes > self._max_packet_bytes

    def _counters(self) -> dict[str, Any]:
        """Return what the publisher adds to every status; `undelivered` are verdicts given up for good."""
        in_flight = sum(parcel.kind is Kind.VERDICT for parcel in self._in_flight.values())
        dropped = self._backlog.dropped
        return {
            "undelivered": dropped[Kind.VERDICT] + self._refused[Kind.VERDICT],
            "delivery": {
                "waiting": self._backlog.waiting(Kind.VERDICT) + in_flight,
                "confirmed": self._confirmed[Kind.VERDICT],
                "noSubscribers": self._no_subscribers[Kind.VERDICT],
                "refused": self._refused[Kind.VERDICT],
                "lost": dropped[Kind.VERDICT],
                "heatmapsConfirmed": self._confirmed[Kind.HEATMAP],
                "heatmapsRefused": self._refused[Kind.HEATMAP],
                "heatmapsShed": dropped[Kind.HEATMAP],
            },
        }

    def _report_losses(self) -> None:
        """Log new losses and put them into the status: the first at once, later ones once a minute."""
        dropped, refused = self._backlog.dropped, self._refused
        losses = (dropped[Kind.VERDICT], sum(refused.values()), dropped[Kind.HEATMAP])
        if self._loss_log.report(losses):
            self._status_is_due = True

    def _say_goodbye(self) -> None:
        """Publish `stopped` if the broker is there, then disconnect; waits no longer than was asked for."""
        if self._window and self._stop_asked is not None:
            self._status = status_message(self._origin, "stopped", counters=self._status.get("counters"))
            self._publish_status()
            while self._window and self._is_status_in_flight() and time.monotonic() < self._stop_asked.deadline_s:
                self._handle_events()
        self._has_ended = True
        self._client.disconnect()
        if self._window:
            self._client.loop_stop()  # joins paho's thread; without a connection that ends by itself within seconds

    def _is_status_in_flight(self) -> bool:
        return any(parcel.kind is Kind.STATUS for parcel in self._in_flight.values())

    # paho's thread runs these while it holds its locks: post and return.

    def _on_connect(self, client: Client, _userdata: Any, _flags: Any, reason: ReasonCode, properties: Any) -> None:
        if self._has_ended:  # the connection was under way when we disconnected
            client.disconnect()
            return
        if reason.is_failure:
            self.events.put(_Down("refused", f"{reason}: check mqtt.username, password_file and the broker's users"))
            return
        window = min(WINDOW, getattr(properties, "ReceiveMaximum", WINDOW))
        self.events.put(_Up(window, getattr(properties, "MaximumPacketSize", None)))

    def _on_connect_fail(self, _client: Any, _userdata: Any) -> None:
        self.events.put(_Down("absent", "no connection, trying again"))

    def _on_disconnect(self, _client: Any, _userdata: Any, _flags: Any, reason: ReasonCode, _properties: Any) -> None:
        self.events.put(_Down("lost", str(reason)))

    def _on_publish(self, _client: Any, _userdata: Any, mid: int, reason: ReasonCode, _properties: Any) -> None:
        self.events.put(_Answer(mid, reason.value, str(reason)))


class _ConnectionLog:
    """Logs the state of the connection when it changes, the same state at most once a minute."""

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._state = ""
        self._quiet_until_s: dict[str, float] = {}

    def note(self, state: str, level: int, text: str) -> None:
        """Log text if the state is new."""
        now_s = time.monotonic()
        if state != self._state and now_s >= self._quiet_until_s.get(state, 0.0):
            self._quiet_until_s[state] = now_s + REPORT_EVERY_S
            log.log(level, "%s %s", self._subject, text)
        self._state = state


class _LossLog:
    """Logs what is given up for good: the first loss at once, later ones summed once a minute."""

    def __init__(self) -> None:
        self.last_refusal = ""
        self._reported = (0, 0, 0)
        self._quiet_until_s = 0.0

    def report(self, losses: tuple[int, int, int]) -> bool:
        """Log and return True if losses (verdicts lost, messages refused, heatmaps shed) grew and it is time."""
        now_s = time.monotonic()
        if losses == self._reported or now_s < self._quiet_until_s:
            return False
        lost, refused, shed = (now - before for now, before in zip(losses, self._reported, strict=True))
        self._reported, self._quiet_until_s = losses, now_s + REPORT_EVERY_S
        if lost:
            log.error("%d verdicts lost: the memory for waiting verdicts is full and the broker is away", lost)
        if refused:
            log.error("%d messages refused by the broker, last %s: check its access list", refused, self.last_refusal)
        if shed:
            log.warning("%d heatmaps shed to keep verdicts: the broker is away or too slow", shed)
        return True


def _properties(parcel: Parcel) -> Properties:
    """Return the MQTT 5 properties: what the payload is, and that an old heatmap may be forgotten."""
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    properties.ContentType = parcel.content_type
    properties.PayloadFormatIndicator = int(parcel.kind is not Kind.HEATMAP)  # 1: UTF-8
    if parcel.kind is Kind.HEATMAP:
        properties.MessageExpiryInterval = HEATMAP_EXPIRY_S
    return properties


def _encode(message: dict[str, Any]) -> bytes:
    return json.dumps(message, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
