"""How `watch` listens to a station without taking what is not meant for it.

A station without consumers counts a verdict as delivered once the broker has it and somebody listens. Where nobody
does, its verdicts wait on its disk for the first who subscribes: that must be the one who keeps them.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass
from math import inf
from queue import Empty, SimpleQueue
from typing import Any

from paho.mqtt.client import Client
from paho.mqtt.reasoncodes import ReasonCode

from agent.errors import BrokerError
from agent.mqtt.client import MqttSettings, begin_connecting, build_client

RETAINED_S = 0.5  # a status that the broker keeps comes at once behind its answer to our subscription
UNSUPPORTED_PROTOCOL = 0x84  # the broker speaks MQTT 3.1.1 alone, or 5 alone


@dataclass(frozen=True, slots=True)
class Arrived:
    """One message of the station."""

    payload: bytes
    is_status: bool


@dataclass(frozen=True, slots=True)
class Backlog:
    """What a station without consumers says of its verdicts, counted in its run."""

    waiting: int
    taken: int  # by the broker, and somebody listened
    unheard: int  # nobody listened: they wait


class Gate:
    """Open as soon as nothing speaks against subscribing to verdicts, and then for good."""

    def __init__(self, *, is_open: bool) -> None:
        self.is_open = is_open
        self.waiting = 0  # verdicts for whose sake it is closed
        self.has_status = False
        self._before: Backlog | None = None

    def note(self, backlog: Backlog | None, *, is_offline: bool) -> None:
        """The station said how it does; backlog is None where it waits for consumers, or does not say."""
        self.has_status = True
        before, self._before = self._before, backlog
        if self.is_open or is_offline:
            return
        are_taken = before is not None and backlog is not None and before.taken < backlog.taken
        is_heard = are_taken and before is not None and backlog is not None and before.unheard == backlog.unheard
        self.is_open = backlog is None or backlog.waiting == 0 or is_heard
        self.waiting = 0 if self.is_open or backlog is None else backlog.waiting


class Subscription:
    """Status and verdicts of one station, subscribed again after every reconnection.

    take_waiting: subscribe to the verdicts also where they wait for somebody who does.
    """

    def __init__(self, settings: MqttSettings, *, take_waiting: bool = False) -> None:
        self.is_connected = self.was_connected = False
        self.is_ready = False  # subscribed: every verdict from now on reaches us
        self.gate = Gate(is_open=take_waiting)  # of this connection
        self._take_waiting = take_waiting
        self._protocol = settings.protocol
        self._topic, self._status_topic = f"{settings.topic}/verdict", f"{settings.topic}/status"
        self._status_mid: int | None = None
        self._ask_after_s = inf
        self._has_asked = False  # for verdicts, on this connection
        self._arrived: SimpleQueue[Arrived | BrokerError] = SimpleQueue()
        self._client = build_client(settings, f"taktsight-watch-{secrets.token_hex(4)}")
        self._client.on_connect = self._on_connect
        self._client.on_disconnect = self._on_disconnect
        self._client.on_subscribe = self._on_subscribe
        self._client.on_message = self._on_message
        begin_connecting(self._client, settings)

    def next_message(self, timeout_s: float) -> Arrived | None:
        """Return the next message, or None if none came in time. Raises BrokerError if the broker refuses us."""
        gate = self.gate
        is_late = time.monotonic() > self._ask_after_s and self._arrived.empty()
        is_time = gate.is_open or (is_late and not gate.has_status)
        if self.is_connected and not self._has_asked and is_time:
            self._has_asked = True
            self._client.subscribe(self._topic, 1)
        try:
            arrived = self._arrived.get(timeout=timeout_s)
        except Empty:
            return None
        if isinstance(arrived, BrokerError):
            raise arrived
        return arrived

    def close(self) -> None:
        """Disconnect."""
        self._client.disconnect()
        self._client.loop_stop()

    # paho's thread runs these: post and return.

    def _on_connect(self, client: Client, _userdata: Any, _flags: Any, reason: ReasonCode, _properties: Any) -> None:
        if reason.is_failure:
            self._arrived.put(BrokerError(f"the broker refuses us: {reason}: {self._advice(reason)}"))
            return
        self.gate = Gate(is_open=self._take_waiting)
        self._has_asked, self._ask_after_s = False, inf
        _, self._status_mid = client.subscribe(self._status_topic, 1)
        self.is_connected = self.was_connected = True

    def _advice(self, reason: ReasonCode) -> str:
        if reason.value == UNSUPPORTED_PROTOCOL:
            return f"ask with --protocol {3 if self._protocol == 5 else 5}"
        return "check mqtt.username and password_file"

    def _on_disconnect(self, *_: object) -> None:
        self.is_connected = False

    def _on_subscribe(self, _client: Any, _userdata: Any, mid: int, reasons: list[ReasonCode], _props: Any) -> None:
        if mid == self._status_mid:  # refused: without it we know less of why nothing comes
            self._ask_after_s = time.monotonic() + RETAINED_S
        elif not reasons or reasons[0].is_failure:
            self._arrived.put(BrokerError(f"the broker does not let us read {self._topic}: check its access list"))
        else:
            self.is_ready = True

    def _on_message(self, _client: Any, _userdata: Any, message: Any) -> None:
        self._arrived.put(Arrived(bytes(message.payload), message.topic == self._status_topic))
