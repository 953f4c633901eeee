"""A consumer as a MES should be one: stores every message by its key, then acknowledges what is complete."""

from __future__ import annotations

import json
import threading
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties


class Mes:
    """Keeps its store over disconnections, as on a disk. With `session`, the broker keeps its messages meanwhile."""

    def __init__(self, port: int, root: str, name: str = "mes", *, protocol: int = 5, session: bool = True) -> None:
        self.name = name
        self.acknowledges = True
        self.stored: dict[tuple[str, int], dict[str, Any]] = {}  # by (epoch, seq), in the order of the first arrival
        self.copies = 0  # messages that it had already
        self.statuses: list[dict[str, Any]] = []
        self._port, self._root, self._v5, self._session = port, root, protocol == 5, session
        self._client: mqtt.Client | None = None
        self._upto: dict[str, int] = {}
        self.come()

    @property
    def seqs(self) -> list[int]:
        """Return every seq once, in the order of the first arrival."""
        return [seq for _, seq in list(self.stored)]

    def come(self) -> None:
        """Connect, subscribe, and ask for what is missing."""
        subscribed = threading.Event()
        client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=self.name,
            protocol=mqtt.MQTTv5 if self._v5 else mqtt.MQTTv311,
            clean_session=None if self._v5 else not self._session,
        )
        client.reconnect_delay_set(0.1, 0.2)
        client.on_connect = lambda *_: client.subscribe(
            [(f"{self._root}/{topic}", 1) for topic in ("verdict", "missing", "status")]
        )
        client.on_subscribe = lambda *_: subscribed.set()
        client.on_message = self._on_message
        options: dict[str, Any] = {}
        if self._v5:
            options = {"clean_start": not self._session, "properties": Properties(PacketTypes.CONNECT)}
            options["properties"].SessionExpiryInterval = 3600 if self._session else 0
        client.connect("127.0.0.1", self._port, 10, **options)
        client.loop_start()
        assert subscribed.wait(5), "the consumer could not subscribe"
        self._client = client

    def go(self) -> None:
        """Disconnect."""
        if self._client is not None:
            self._client.disconnect()
            self._client.loop_stop()
            self._client = None

    def send_ack(self, payload: bytes, *, retain: bool = False) -> None:
        """Publish any payload as an acknowledgement and wait until the broker has it."""
        assert self._client is not None
        self._client.publish(f"{self._root}/ack/{self.name}", payload, qos=1, retain=retain).wait_for_publish(5)

    def _on_message(self, client: mqtt.Client, _userdata: Any, message: mqtt.MQTTMessage) -> None:
        content = json.loads(message.payload)
        if message.topic.endswith("/status"):
            self.statuses.append(content)
            if message.retain and "epoch" in content:  # we are new here, or back
                self._acknowledge(client, content["epoch"], resend=True)
            return
        key = (content["epoch"], content["seq"])
        is_copy = key in self.stored
        self.copies += is_copy
        self.stored.setdefault(key, content)
        self._acknowledge(client, content["epoch"], again=is_copy)  # a copy: the station did not hear us

    def _acknowledge(self, client: mqtt.Client, epoch: str, *, resend: bool = False, again: bool = False) -> None:
        upto = self._upto.get(epoch, 0)
        while (epoch, upto + 1) in self.stored:
            upto += 1
        changed, self._upto[epoch] = upto != self._upto.get(epoch), upto
        if self.acknowledges and (changed or resend or again):
            ack = {"schema": "taktsight.ack/1", "epoch": epoch, "upto": upto, "resend": resend}
            client.publish(f"{self._root}/ack/{self.name}", json.dumps(ack), qos=1)
