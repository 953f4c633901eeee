"""Commands to a station: sent with an id of their own, answered by the station, or known to be unanswered."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Unpack

import paho.mqtt.client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from taktsight_subscribe.broker import Broker, BrokerOptions, build_client, check_consumer, check_topic
from taktsight_subscribe.errors import BrokerError, NoReply
from taktsight_subscribe.messages import COMMAND_SCHEMA, REPLY_SCHEMA, Unreadable, encode, parse_object, timestamp

NO_SUBSCRIBERS = 0x10  # MQTT 5
FIRST_FAILURE = 0x80
POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Reply:
    """What the station answered."""

    result: str  # "done" | "refused" | "failed"
    detail: str
    message: dict[str, Any]  # the whole reply: before, after, lastId, ...


def send_command(
    topic: str,
    name: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    issuer: str,
    timeout_s: float = 10.0,
    **broker: Unpack[BrokerOptions],
) -> Reply:
    """Have the station at `topic` carry out a command and return its reply.

    name, arguments: recipe {"name": ...}, pause {"reason": ...}, resume, capture {"count": ...},
    threshold {"score": number or None}, selftest.
    issuer: who commands, for the station's audit log. timeout_s: also the life of the command: a station that hears
    of it later refuses it.

    Raises NoReply if no answer came in time, BrokerError, SettingsError.
    """
    check_topic(topic, wildcards=False)
    check_consumer(issuer)
    exchange = _Exchange(Broker(**broker), f"{topic}/cmd/{name}", issuer)
    try:
        return exchange.run(dict(arguments or {}), timeout_s)
    finally:
        exchange.close()


class _Exchange:
    """One command and the wait for its reply, all in the caller's thread."""

    def __init__(self, broker: Broker, topic: str, issuer: str) -> None:
        self._broker = broker
        self._topic = topic
        self._issuer = issuer
        self._id = time.time_ns() // 1_000_000  # larger than any before, as long as the clock does not go back
        self._client = build_client(broker, f"taktsight-send-{secrets.token_hex(4)}", clean=True)
        self._client.on_connect = self._on_connect
        self._client.on_subscribe = self._on_subscribe
        self._client.on_message = self._on_message
        self._client.on_publish = self._on_publish
        self._is_ready = False
        self._reply: Reply | None = None
        self._failure: Exception | None = None

    def run(self, arguments: dict[str, Any], timeout_s: float) -> Reply:
        """Send and wait."""
        deadline_s = time.monotonic() + timeout_s
        self._connect()
        while not self._is_ready:
            self._loop(deadline_s, f"the broker {self._broker.address} did not answer within {timeout_s:g} s")
        expires = datetime.now(UTC) + timedelta(seconds=deadline_s - time.monotonic())
        message = {
            "schema": COMMAND_SCHEMA,
            "issuer": self._issuer,
            "id": self._id,
            "expires": timestamp(expires),
            "arguments": arguments,
        }
        properties = None
        if self._broker.protocol == 5:
            properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            properties.CorrelationData = f"{self._issuer}/{self._id}".encode()
        self._client.publish(self._topic, encode(message), qos=1, properties=properties)
        while self._reply is None:
            self._loop(deadline_s, f"no reply within {timeout_s:g} s: look at the station before you try again")
        return self._reply

    def close(self) -> None:
        """Disconnect."""
        self._client.disconnect()

    def _connect(self) -> None:
        broker = self._broker
        try:
            if broker.protocol == 5:
                self._client.connect(broker.host, broker.port, broker.keepalive_s, clean_start=True)
            else:
                self._client.connect(broker.host, broker.port, broker.keepalive_s)
        except (OSError, ValueError) as error:
            raise BrokerError(f"no broker at {broker.address}: {error}: start it, or check host and port") from error

    def _loop(self, deadline_s: float, too_late: str) -> None:
        code = self._client.loop(POLL_S)
        if self._failure is not None:
            raise self._failure
        if code != paho.MQTT_ERR_SUCCESS:
            raise BrokerError(
                f"the connection to the broker {self._broker.address} broke: the command may be under way"
            )
        if time.monotonic() > deadline_s:
            raise NoReply(too_late)

    # paho calls these from within loop().

    def _on_connect(self, client: paho.Client, _data: Any, _flags: Any, reason: ReasonCode, _properties: Any) -> None:
        if reason.is_failure:
            self._failure = BrokerError(f"the broker refuses us: {reason}: check username, password and certificate")
        else:
            client.subscribe(f"{self._topic}/reply", qos=1)

    def _on_subscribe(self, _client: Any, _data: Any, _mid: Any, reasons: list[ReasonCode], _properties: Any) -> None:
        if any(reason.is_failure for reason in reasons):
            self._failure = BrokerError(f"the broker does not let us read {self._topic}/reply: check its access list")
        self._is_ready = True

    def _on_publish(self, _client: Any, _data: Any, _mid: int, reason: ReasonCode, _properties: Any) -> None:
        if reason.value == NO_SUBSCRIBERS:
            self._failure = NoReply(f"nobody listens on {self._topic}: the station is offline or takes no commands")
        elif reason.value >= FIRST_FAILURE:
            self._failure = BrokerError(f"the broker does not let us write {self._topic}: check its access list")

    def _on_message(self, client: paho.Client, _data: Any, message: paho.MQTTMessage) -> None:
        client.ack(message.mid, message.qos)
        try:
            _, reply = parse_object(bytes(message.payload))
        except Unreadable:
            return
        if (reply.get("schema"), reply.get("issuer"), reply.get("id")) == (REPLY_SCHEMA, self._issuer, self._id):
            self._reply = Reply(str(reply.get("result")), str(reply.get("detail") or ""), reply)
