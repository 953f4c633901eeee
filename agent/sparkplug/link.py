"""One connection of a Sparkplug edge node: its client, its last will, its sequence numbers.

paho calls back in its own thread and while it holds its own locks, so callbacks post an event and return.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

from agent.mqtt.client import MqttSettings, begin_connecting, load_credentials, new_client
from agent.sparkplug.messages import MOST_COMMAND_BYTES, SparkplugSettings, bdseq_metric
from agent.sparkplug.payload import Metric, Payload, encode

log = logging.getLogger(__name__)

NUMBERS = 256  # bdSeq and seq count 0 to 255, then from 0 again
PACKET_OVERHEAD_BYTES = 64  # fixed header and lengths: under 16 for what is sent here


@dataclass(frozen=True, slots=True)
class Ready:
    """Connected and subscribed."""

    link: Link


@dataclass(frozen=True, slots=True)
class Received:
    """A message came in."""

    link: Link
    topic: str
    payload: bytes | None  # None: larger than any that we obey
    retained: bool


@dataclass(frozen=True, slots=True)
class Passed:
    """The broker has handled all packets up to the question with this message id."""

    link: Link
    mid: int


@dataclass(frozen=True, slots=True)
class Down:
    """The connection is gone, or never was."""

    link: Link
    state: str  # "lost" | "absent" | "refused"
    why: str


LinkEvent = Ready | Received | Passed | Down


class BirthNumbers:
    """Counts connections in a file: a death must not be taken for that of a connection before the last restart."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._last = int(path.read_text(encoding="ascii")) % NUMBERS
        except FileNotFoundError:
            self._last = NUMBERS - 1
        except (OSError, ValueError) as error:  # half written, or not ours
            log.warning("%s does not hold the number of the last birth, counting from 0: %s", path, error)
            self._last = NUMBERS - 1

    def next(self) -> int:
        """Return the bdSeq of the next connection, written down before it is used; a full disk costs no connection."""
        self._last = (self._last + 1) % NUMBERS
        temporary = self._path.with_name(self._path.name + ".tmp")
        try:
            with temporary.open("w", encoding="ascii") as file:
                file.write(f"{self._last}\n")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)
        except OSError as error:
            log.warning("bdSeq %d cannot be written to %s: %s", self._last, self._path, error)
        return self._last


class Link:
    """One connection, from connect() to end(); it never connects again by itself.

    post: takes this connection's events, called in paho's thread.

    Raises SettingsError if a password or certificate cannot be read.
    """

    def __init__(
        self, mqtt: MqttSettings, settings: SparkplugSettings, bdseq: int, post: Callable[[LinkEvent], None]
    ) -> None:
        self.bdseq = bdseq
        self.is_ready = False  # connected and subscribed; the owner's thread says so, on Ready
        self._mqtt, self._settings, self._post = mqtt, settings, post
        self._seq = -1
        self._max_packet_bytes: int | None = None
        client_id = f"taktsight-sparkplug-{settings.group}-{settings.edge_node}"
        self._client = client = new_client(mqtt, load_credentials(mqtt), client_id, reconnect=False)
        client.will_set(settings.topic("NDEATH"), self._death(), qos=1, retain=False)
        client.on_connect = self._on_connect
        client.on_connect_fail = self._on_connect_fail
        client.on_disconnect = self._on_disconnect
        client.on_subscribe = self._on_subscribe
        client.on_unsubscribe = self._on_unsubscribe
        client.on_message = self._on_message

    def connect(self) -> None:
        """Begin to connect; returns at once."""
        begin_connecting(self._client, self._mqtt)

    def begin_session(self) -> None:
        """Count sequence numbers from 0 again: NBIRTH comes next."""
        self._seq = -1

    def publish(self, verb: str, metrics: Sequence[Metric], now_ms: int) -> bool:
        """Hand one message to the socket; False if it is larger than the broker takes, then it has no number."""
        seq = (self._seq + 1) % NUMBERS
        data = encode(Payload(now_ms, tuple(metrics), seq), with_datatypes=verb.endswith("BIRTH"))
        topic = self._settings.topic(verb)
        size_bytes = len(data) + len(topic.encode()) + PACKET_OVERHEAD_BYTES
        if self._max_packet_bytes is not None and size_bytes > self._max_packet_bytes:
            return False
        self._seq = seq
        self._client.publish(topic, data, qos=0, retain=False)
        return True

    def ask_whether_passed(self) -> int | None:
        """Ask the broker to answer once it has handled all we sent, and return the id of its answer, see `Passed`.

        The question is an UNSUBSCRIBE from what we never subscribe to: it needs no right and changes nothing.
        """
        code, mid = self._client.unsubscribe(self._settings.topic("DCMD"))
        return mid if code is MQTTErrorCode.MQTT_ERR_SUCCESS else None

    def end(self, deadline_s: float = 0.0) -> None:
        """Say NDEATH and disconnect; waits until deadline_s (time.monotonic()) for both to be sent."""
        if self.is_ready:
            goodbye = self._client.publish(self._settings.topic("NDEATH"), self._death(), qos=1, retain=False)
            wait_s = deadline_s - time.monotonic()
            if wait_s > 0 and goodbye.rc is MQTTErrorCode.MQTT_ERR_SUCCESS:
                goodbye.wait_for_publish(wait_s)
        with_will = ReasonCode(PacketTypes.DISCONNECT, "Disconnect with will message")
        self._client.disconnect(with_will if self._mqtt.protocol == 5 else None)
        if self.is_ready and deadline_s:
            self._client.loop_stop()
        self._forget()

    def _forget(self) -> None:
        """Leave the client to itself: without a way back to us its sockets close with it, garbage collected or not."""
        self._client.on_connect = _leave
        self._client.on_connect_fail = _give_up
        self._client.on_disconnect = self._client.on_subscribe = self._client.on_unsubscribe = None
        self._client.on_message = None

    def _death(self) -> bytes:
        now_ms = time.time_ns() // 1_000_000
        return encode(Payload(now_ms, (bdseq_metric(self.bdseq, now_ms),)))

    # paho's thread runs these: post and return.

    def _on_connect(self, client: Client, _userdata: Any, _flags: Any, reason: ReasonCode, properties: Any) -> None:
        if reason.is_failure:
            self._post(Down(self, "refused", f"{reason}: check mqtt.username, password_file and the broker's users"))
            return
        self._max_packet_bytes = getattr(properties, "MaximumPacketSize", None)
        topics = [(self._settings.topic("NCMD"), 1)]
        if self._settings.primary_host is not None:
            topics.append((self._settings.host_topic(), 1))
        client.subscribe(topics)

    def _on_connect_fail(self, client: Client, _userdata: Any) -> None:
        _give_up(client, None)
        self._post(Down(self, "absent", "no connection, trying again"))

    def _on_disconnect(self, _client: Any, _userdata: Any, _flags: Any, reason: ReasonCode, _properties: Any) -> None:
        self._post(Down(self, "lost", str(reason)))

    def _on_subscribe(self, _client: Any, _userdata: Any, _mid: int, reasons: list[ReasonCode], _prop: Any) -> None:
        if any(reason.is_failure for reason in reasons):
            self._post(Down(self, "refused", "the broker's access list denies NCMD or STATE of the primary host"))
            return
        self._post(Ready(self))

    def _on_unsubscribe(self, _client: Any, _userdata: Any, mid: int, _reasons: Any, _properties: Any) -> None:
        self._post(Passed(self, mid))

    def _on_message(self, _client: Any, _userdata: Any, message: MQTTMessage) -> None:
        payload = bytes(message.payload) if len(message.payload) <= MOST_COMMAND_BYTES else None
        self._post(Received(self, message.topic, payload, message.retain))


def _leave(client: Client, *_: Any) -> None:
    """Close a connection that was under way when we left it."""
    client.disconnect()


def _give_up(client: Client, _userdata: Any) -> None:
    """End paho's thread, in which this is called: no second attempt with the same will."""
    client.loop_stop()
