"""One persistent connection to the broker, driven by a single thread: what arrives waits here until it is settled.

Nothing is acknowledged to the broker by itself: `settle` sends the PUBACKs once the caller has stored the messages. A
message of an earlier connection needs none: the broker sends it again.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from taktsight_subscribe.broker import Broker, build_client
from taktsight_subscribe.errors import BrokerError
from taktsight_subscribe.quiet import Quiet

log = logging.getLogger(__name__)

SESSION_EXPIRY_S = 7 * 24 * 3600  # the broker keeps what comes for us that long
RECEIVE_MAXIMUM = 1000  # messages that the broker may send ahead of our acknowledgements
MAX_PACKET_BYTES = 16 << 20
RECONNECT_MIN_S, RECONNECT_MAX_S = 0.5, 8.0
POLL_S = 0.1
SHORT_S, SUSPICIOUS = 5.0, 3  # connections in a row that broke so soon: somebody else has our client id
FIRST_FAILURE = 0x80  # MQTT 5: this reason code and all above are refusals


@dataclass(frozen=True, slots=True)
class Message:
    """One message, and what it takes to acknowledge it."""

    topic: str
    payload: bytes
    received_utc: datetime
    mid: int
    qos: int
    connection: int  # counts connections


class Connection:
    """Subscribed to `topics`, each with its QoS, whenever `is_ready`. All verbs belong to one thread."""

    def __init__(self, broker: Broker, client_id: str, topics: Mapping[str, int]) -> None:
        self.arrived: deque[Message] = deque()  # not settled yet, oldest first
        self.is_ready = False  # connected and subscribed
        self.times_ready = 0
        self._broker = broker
        self._topics = dict(topics)
        self._client = build_client(broker, client_id, clean=False)
        self._client.on_connect = self._on_connect
        self._client.on_subscribe = self._on_subscribe
        self._client.on_disconnect = self._on_disconnect
        self._client.on_message = self._on_message
        self._client.on_publish = self._on_publish
        self._connections = 0
        self._is_begun = False
        self._is_up = False
        self._client_id = client_id
        self._ready_since_s = 0.0
        self._short_lived = 0  # connections in a row
        self._delay_s = 0.0
        self._next_try_s = 0.0
        self._refusal: BrokerError | None = None
        self._unsent = 0
        self._warn = Quiet(log)

    def run(self, timeout_s: float = POLL_S) -> None:
        """Carry bytes: connect if there is no connection, wait for something, read until nothing more has arrived.

        Raises BrokerError if the broker refuses us before we were ever in.
        """
        if not self._is_up and not self._connect():
            time.sleep(POLL_S)
            return
        self._loop(timeout_s)
        seen = -1
        while self._is_up and seen != len(self.arrived) and len(self.arrived) < RECEIVE_MAXIMUM:
            seen = len(self.arrived)
            self._loop(0.0)
        if self._refusal is not None and self._is_up:  # let in, but not to a topic: only a new connection asks again
            self._client.disconnect()  # _on_disconnect backs off
        refusal, self._refusal = self._refusal, None
        if refusal is not None:
            if not self.times_ready:
                raise refusal
            self._warn("refused", "%s", refusal)

    def settle(self, messages: Iterable[Message]) -> None:
        """Acknowledge messages to the broker, in order."""
        for message in messages:
            if self._is_up and message.connection == self._connections:
                self._client.ack(message.mid, message.qos)

    def unsubscribe(self, topics: list[str]) -> None:
        """Have the broker forget subscriptions that the session still has of an earlier program."""
        if self._is_up:
            self._client.unsubscribe(topics)

    def publish(self, topic: str, payload: bytes) -> None:
        """Publish with QoS 1; paho repeats it after a reconnection if need be."""
        self._unsent += self._client.publish(topic, payload, qos=1).rc == paho.MQTT_ERR_SUCCESS

    def close(self, timeout_s: float) -> None:
        """Wait until the broker has what was published, at most timeout_s, then disconnect; the session stays."""
        deadline_s = time.monotonic() + timeout_s
        while self._is_up and self._unsent > 0 and time.monotonic() < deadline_s:
            self._loop(0.02)
        self._is_up = self.is_ready = False
        self._client.disconnect()

    def _connect(self) -> bool:
        """Try once, if it is time to. Returns whether the connection is under way."""
        if time.monotonic() < self._next_try_s:
            return False
        try:
            if self._is_begun:
                self._client.reconnect()
            else:
                self._begin()
        except (OSError, ValueError) as error:
            self._back_off()
            self._warn("absent", "no broker at %s (%s): trying again", self._broker.address, error)
            return False
        self._is_begun = self._is_up = True
        return True

    def _begin(self) -> None:
        broker = self._broker
        if broker.protocol == 5:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.SessionExpiryInterval = SESSION_EXPIRY_S
            properties.ReceiveMaximum = RECEIVE_MAXIMUM
            properties.MaximumPacketSize = MAX_PACKET_BYTES
            self._client.connect_async(
                broker.host, broker.port, broker.keepalive_s, clean_start=False, properties=properties
            )
        else:
            self._client.connect_async(broker.host, broker.port, broker.keepalive_s)
        self._is_begun = True
        self._client.reconnect()

    def _loop(self, timeout_s: float) -> None:
        if self._client.loop(timeout_s) != paho.MQTT_ERR_SUCCESS and self._is_up:
            self._lost("the connection broke")

    def _lost(self, why: str) -> None:
        if self.is_ready:
            lasted_s = time.monotonic() - self._ready_since_s
            self._short_lived = self._short_lived + 1 if lasted_s < SHORT_S else 0
        self._is_up = self.is_ready = False
        self._unsent = 0
        self._back_off()
        if self._short_lived >= SUSPICIOUS:
            text = (
                "broker %s ends every connection at once: is another program running as %s? They throw each other out"
            )
            self._warn("taken", text, self._broker.address, self._client_id)
        elif self._refusal is None:
            self._warn("lost", "broker %s: %s: trying again", self._broker.address, why)

    def _back_off(self) -> None:
        self._delay_s = min(max(2 * self._delay_s, RECONNECT_MIN_S), RECONNECT_MAX_S)
        self._next_try_s = time.monotonic() + self._delay_s

    # paho calls these from within run() and close().

    def _on_connect(self, client: paho.Client, _data: Any, _flags: Any, reason: ReasonCode, _properties: Any) -> None:
        if reason.is_failure:
            wanted = "check username, password and certificate"
            self._refusal = BrokerError(f"the broker {self._broker.address} refuses us: {reason}: {wanted}")
            return
        self._connections += 1
        client.subscribe(list(self._topics.items()))

    def _on_subscribe(self, _client: Any, _data: Any, _mid: Any, reasons: list[ReasonCode], _properties: Any) -> None:
        refused = [topic for topic, reason in zip(self._topics, reasons, strict=False) if reason.is_failure]
        if refused:
            self._refusal = BrokerError(f"the broker does not let us read {refused[0]}: check its access list")
            return
        if self._short_lived < SUSPICIOUS:
            self._delay_s = 0.0
        self._ready_since_s = time.monotonic()
        self.is_ready = True
        self.times_ready += 1
        log.info("connected to %s", self._broker.address)

    def _on_disconnect(self, _client: Any, _data: Any, flags: Any, reason: ReasonCode, _properties: Any) -> None:
        if self._is_up:
            self._lost(str(reason) if flags.is_disconnect_packet_from_server else "the connection broke")

    def _on_message(self, _client: Any, _data: Any, message: paho.MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:
            topic = ""
        self.arrived.append(
            Message(
                topic=topic,
                payload=bytes(message.payload),
                received_utc=datetime.now(UTC),
                mid=message.mid,
                qos=message.qos,
                connection=self._connections,
            )
        )

    def _on_publish(self, _client: Any, _data: Any, _mid: int, reason: ReasonCode, _properties: Any) -> None:
        self._unsent = max(0, self._unsent - 1)
        if reason.value >= FIRST_FAILURE:
            self._warn("denied", "the broker does not take our acknowledgements (%s): check its access list", reason)
