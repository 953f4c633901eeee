"""One connection to the broker, from its first packet to its last. It never reconnects: the next one is a new `Link`.

A fresh client for each connection has nothing to send again by itself, no old message ids, and the credentials of now.
paho calls back while it holds its own locks (a lock around publish() that on_publish also took hung after 1450
messages), so its callbacks only post an event; whoever reads the events owns all else.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakMethod

from paho.mqtt.client import MQTT_LOG_ERR, Client, DisconnectFlags, MQTTMessage
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from agent.mqtt.certificates import likely_cause
from agent.mqtt.client import Credentials, MqttSettings, new_client

MOST_INCOMING_BYTES = 65536  # MQTT 5: the broker withholds larger packets from us
UNANNOUNCED_WINDOW = 64  # packets in flight where the broker does not say what it takes
KEEP_ALIVE_TIMEOUT = 0x8D
BLAMES_A_MESSAGE = frozenset({0x80, 0x81, 0x82, 0x90, 0x95, 0x99})  # unspecified, malformed, protocol, unfit


@dataclass(frozen=True, slots=True)
class Up:
    """The broker let us in."""

    window: int  # packets that it takes in flight
    most_bytes: int | None  # per packet


@dataclass(frozen=True, slots=True)
class Down:
    """The connection came to its end, or to nothing."""

    state: str  # "lost" | "absent" | "refused"
    why: str
    blame: bool = False  # the broker hung up in a way that a message may have caused


@dataclass(frozen=True, slots=True)
class Answered:
    """The broker's answer to one packet of ours."""

    tag: int
    code: int  # reason code; MQTT 3.1.1 knows only 0
    meaning: str


@dataclass(frozen=True, slots=True)
class Subscribed:
    """The broker's answer to our subscriptions: the first refusal among them, if any."""

    refusal: str | None


@dataclass(frozen=True, slots=True)
class Heard:
    """A message for us."""

    topic: str  # below the root
    payload: bytes
    retained: bool
    correlation: bytes | None


LinkEvent = Up | Down | Answered | Subscribed | Heard


@dataclass(frozen=True, slots=True)
class Packet:
    """One message to publish at QoS 1."""

    topic: str  # below the root
    payload: bytes
    content_type: str = "application/json"
    retain: bool = False
    expiry_s: int | None = None
    correlation: bytes | None = None


class Link:
    """A connection in the making or in use. `post` gets (link, event) on paho's threads and must return at once."""

    def __init__(
        self, settings: MqttSettings, credentials: Credentials, will: Packet, post: Callable[[Link, LinkEvent], None]
    ) -> None:
        self._settings = settings
        self._root = settings.topic
        self._post = post
        self._is_over = False
        self._last_error = ""
        client = new_client(settings, credentials, client_id(settings), reconnect=False)
        client.max_inflight_messages_set(0)  # the courier counts: paho cannot change it once it is connected
        client.will_set(f"{self._root}/{will.topic}", will.payload, qos=1, retain=will.retain)
        client.on_connect = _weakly(self._on_connect, otherwise=_hang_up)
        client.on_disconnect = _weakly(self._on_disconnect)
        client.on_publish = _weakly(self._on_publish)
        client.on_subscribe = _weakly(self._on_subscribe)
        client.on_message = _weakly(self._on_message)
        if credentials.tls is not None:
            client.on_log = _weakly(self._on_log)
        self._client = client

    def open(self) -> None:
        """Begin to connect; returns at once. Up or Down follows."""
        threading.Thread(target=self._connect, name="taktsight-connect", daemon=True).start()

    def publish(self, packet: Packet) -> int | None:
        """Send a packet; returns its tag, or None if the connection is gone."""
        properties = self._properties(packet)
        topic = f"{self._root}/{packet.topic}"
        info = self._client.publish(topic, packet.payload, qos=1, retain=packet.retain, properties=properties)
        return info.mid if info.rc == 0 else None

    def subscribe(self, topics: list[str]) -> None:
        """Ask for these topics below the root, at QoS 1.

        MQTT 5: with the retain flag as it was published. Without, as always in MQTT 3.1.1, the broker clears the flag
        on what comes while we are connected, and only the copy that it keeps is known by it.
        """
        wanted = [f"{self._root}/{topic}" for topic in topics]
        if self._settings.protocol == 5:
            self._client.subscribe([(topic, SubscribeOptions(qos=1, retainAsPublished=True)) for topic in wanted])
        else:
            self._client.subscribe([(topic, 1) for topic in wanted])

    def packet_bytes(self, packet: Packet) -> int:
        """Return the packet's size on the wire."""
        properties = self._properties(packet)
        rest = 2 + len(f"{self._root}/{packet.topic}".encode()) + 2 + len(packet.payload)
        rest += 0 if properties is None else len(properties.pack())  # type: ignore[no-untyped-call]
        return 1 + (1 if rest < 2**7 else 2 if rest < 2**14 else 3 if rest < 2**21 else 4) + rest

    def close(self) -> None:
        """Say goodbye to the broker: it does not send the last will."""
        self._is_over = True
        self._client.disconnect()

    def break_off(self) -> None:
        """Cut the connection: the broker sends the last will."""
        self._is_over = True
        connection = self._client.socket()
        if isinstance(connection, socket.socket):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _connect(self) -> None:
        options: dict[str, Any] = {}
        if self._settings.protocol == 5:
            options["properties"] = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            options["properties"].MaximumPacketSize = MOST_INCOMING_BYTES
            options["clean_start"] = True
        try:
            self._client.connect(self._settings.host, self._settings.port, self._settings.keepalive_s, **options)
        except (OSError, ValueError) as error:
            self._post(self, Down("absent", likely_cause(error)))
            return
        self._client.loop_start()

    def _properties(self, packet: Packet) -> Properties | None:
        """Return the MQTT 5 properties: what the payload is, and that an old heatmap may be forgotten."""
        if self._settings.protocol != 5:
            return None
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.ContentType = packet.content_type
        properties.PayloadFormatIndicator = int(packet.content_type == "application/json")  # 1: UTF-8
        if packet.expiry_s is not None:
            properties.MessageExpiryInterval = packet.expiry_s
        if packet.correlation is not None:
            properties.CorrelationData = packet.correlation
        return properties

    # paho's thread runs these while it holds its locks: post and return.

    def _on_connect(self, client: Client, _userdata: Any, _flags: Any, reason: ReasonCode, properties: Any) -> None:
        if self._is_over:  # the connection was under way when we closed it
            client.disconnect()
        elif reason.is_failure:
            why = f"{reason}: check mqtt.username, password_file and the broker's users"
            self._post(self, Down("refused", why))
        else:
            window = getattr(properties, "ReceiveMaximum", UNANNOUNCED_WINDOW)
            self._post(self, Up(window, getattr(properties, "MaximumPacketSize", None)))

    def _on_disconnect(
        self, _client: Any, _userdata: Any, flags: DisconnectFlags, reason: ReasonCode, _properties: Any
    ) -> None:
        why = str(reason) if flags.is_disconnect_packet_from_server or not self._last_error else self._last_error
        self._post(self, Down("lost", why, blame=reason.value in BLAMES_A_MESSAGE))

    def _on_publish(self, _client: Any, _userdata: Any, mid: int, reason: ReasonCode, _properties: Any) -> None:
        self._post(self, Answered(mid, reason.value, str(reason)))

    def _on_subscribe(self, _client: Any, _userdata: Any, _mid: Any, reasons: list[ReasonCode], _props: Any) -> None:
        self._post(self, Subscribed(next((str(reason) for reason in reasons if reason.is_failure), None)))

    def _on_message(self, _client: Any, _userdata: Any, message: MQTTMessage) -> None:
        topic = message.topic.removeprefix(f"{self._root}/")
        correlation = getattr(message.properties, "CorrelationData", None)
        self._post(self, Heard(topic, bytes(message.payload), bool(message.retain), correlation))

    def _on_log(self, _client: Any, _userdata: Any, level: int, text: str) -> None:
        if level == MQTT_LOG_ERR:
            self._last_error = likely_cause(text)


def _weakly(method: Callable[..., None], otherwise: Callable[..., None] = lambda *_: None) -> Callable[..., None]:
    """Return a callback that does not keep its link alive: client and link in a circle would keep sockets open."""
    reference = WeakMethod(method)

    def call(*arguments: Any) -> None:
        (reference() or otherwise)(*arguments)

    return call


def _hang_up(client: Client, *_: Any) -> None:
    """Leave a broker that let us in when nobody waited for it any more."""
    client.disconnect()


def client_id(settings: MqttSettings) -> str:
    """Return the station's name at the broker."""
    return settings.client_id or "taktsight-" + settings.topic.replace("/", "-")
