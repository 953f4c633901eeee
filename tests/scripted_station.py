"""A station for tests of consumers: keeps its rows until they are acknowledged, and can misbehave as told."""

from __future__ import annotations

import hashlib
import json
import random
import secrets
import socket
import threading
import time
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

WINDOW = 64  # as the agent
STALL_S = 1.0
CREATED = "2026-11-20T10:00:00.000Z"


def verdict_fields(station: str, epoch: str, seq: int, **changes: Any) -> dict[str, Any]:
    """Return a verdict's message: whole enough for a consumer."""
    return {
        "schema": "taktsight.verdict/1",
        "station": station,
        "epoch": epoch,
        "seq": seq,
        "run": "0" * 12,
        "trigger": seq,
        "partId": f"SN {seq}",
        "productId": "bottle",
        "creationTime": CREATED,
        "outcome": "reject" if seq % 7 == 0 else "pass",
        "reason": "score",
        "detail": "",
        "score": seq / 8,
        "threshold": 4.5,
        "heatmap": None,
        "later": {"unknown": [1, None, "ä"]},
        **changes,
    }


def missing_fields(station: str, epoch: str, first: int, last: int, why: str) -> dict[str, Any]:
    """Return a notice that stands in for first..last."""
    fixed = {"schema": "taktsight.missing/1", "station": station, "epoch": epoch, "creationTime": CREATED}
    return {**fixed, "seq": first, "first": first, "last": last, "why": why}


def status_fields(station: str, epoch: str | None, first: int, last: int, **changes: Any) -> dict[str, Any]:
    """Return a status as a station with the consumer `mes` sends it."""
    return {
        "schema": "taktsight.status/1",
        "station": station,
        "epoch": epoch,
        "run": "0" * 12,
        "state": "running",
        "firstSeq": first,
        "lastSeq": last,
        "deliveryMode": "consumers",
        "consumers": {"mes": {"acknowledged": first - 1, "waiting": last - first + 1}},
        **changes,
    }


class ScriptedStation:
    """Publishes what it is told to store, in its own thread, until every consumer has acknowledged it.

    forget_on_puback: a row is gone when the broker has it, as without consumers. mischief: drop, repeat and turn round
    what is sent first; what is sent again is in order. silent: say nothing before `speak`, not even a status.
    """

    def __init__(
        self,
        port: int,
        root: str,
        *,
        consumers: tuple[str, ...] = ("mes",),
        mischief: int | None = None,
        silent: bool = False,
    ) -> None:
        self.root = root
        self.port = port
        self.name = root.rsplit("/", 1)[-1]
        self.epoch = secrets.token_hex(6)
        self.acks: list[dict[str, Any]] = []
        self.commands: list[dict[str, Any]] = []
        self.reply: dict[str, Any] | None = None  # to every command, with its issuer and id
        self._silent = silent
        self._consumers = dict.fromkeys(consumers, 0)
        self._dice = None if mischief is None else random.Random(mischief)
        self._rows: dict[int, dict[str, Any]] = {}
        self._last = 0
        self._sent = 0  # rows up to here are on their way
        self._furthest = 0  # rows up to here were sent at least once
        self._moved_s = 0.0
        self._is_up = False
        self._status_is_due = False
        self._ends = False
        self._lock = threading.Lock()
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=f"station-{self.name}", protocol=mqtt.MQTTv5)
        self._client.reconnect_delay_set(0.2, 0.5)
        self._client.on_connect = self._on_connect
        self._client.on_disconnect = self._on_disconnect
        self._client.on_message = self._on_message
        self._client.on_socket_open = lambda *given: given[-1].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._client.connect_async("127.0.0.1", port, 10)
        self._client.loop_start()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many rows are not acknowledged by everyone."""
        return len(self._rows)

    @property
    def last(self) -> int:
        """The highest seq so far."""
        return self._last

    def hold_back(self) -> None:
        """Publish nothing more, from when this returns until `speak`."""
        with self._lock:
            self._silent = True

    def speak(self) -> None:
        """Publish again."""
        with self._lock:
            self._silent = False

    def store(self, count: int, **changes: Any) -> None:
        """Decide over so many parts."""
        with self._lock:
            for _ in range(count):
                self._last += 1
                self._rows[self._last] = verdict_fields(self.name, self.epoch, self._last, **changes)

    def store_missing(self, count: int, why: str) -> None:
        """Put a notice in place of so many parts."""
        with self._lock:
            first, self._last = self._last + 1, self._last + count
            self._rows[first] = missing_fields(self.name, self.epoch, first, self._last, why)

    def forget(self, upto: int) -> None:
        """Lose rows that nobody has acknowledged."""
        with self._lock:
            self._rows = {seq: row for seq, row in self._rows.items() if seq > upto}
            self._status_is_due = True

    def begin_epoch(self) -> None:
        """Start over, as with a new outbox."""
        with self._lock:
            self.epoch = secrets.token_hex(6)
            self._rows, self._last, self._sent, self._furthest = {}, 0, 0, 0
            self._consumers = dict.fromkeys(self._consumers, 0)
            self._status_is_due = True

    def publish(self, below: str, payload: bytes, *, retain: bool = False) -> None:
        """Publish anything below the root."""
        self._client.publish(f"{self.root}/{below}", payload, qos=1, retain=retain)

    def publish_picture(self, seq: int, picture: bytes) -> None:
        """Publish a heatmap."""
        self.publish(f"heatmap/{seq}", picture)

    def say_status(self) -> None:
        """Publish the status soon."""
        self._status_is_due = True

    def stop(self) -> None:
        """Disconnect."""
        self._ends = True
        self._thread.join(5)
        self._client.disconnect()
        self._client.loop_stop()

    def _work(self) -> None:
        while not self._ends:
            with self._lock:
                if self._is_up and not self._silent:
                    self._send()
            time.sleep(0.005)

    def _send(self) -> None:
        if self._status_is_due:
            self._status_is_due = False
            self._publish_status()
        done = min(self._consumers.values(), default=self._last)
        if self._sent > done and time.monotonic() - self._moved_s > STALL_S:
            self._sent = done  # go back: the consumer has fallen silent
        room = WINDOW - (self._sent - done) if self._consumers else WINDOW
        rows = sorted(seq for seq in self._rows if seq > self._sent)[: max(0, room)]
        for row in self._misbehave(rows):
            self._client.publish(f"{self.root}/{self._kind(row)}", json.dumps(self._rows[row]).encode(), qos=1)
        if rows:
            self._sent, self._moved_s = rows[-1], time.monotonic()
            self._furthest = max(self._furthest, self._sent)
        if not self._consumers:
            for row in rows:
                del self._rows[row]

    def _misbehave(self, rows: list[int]) -> list[int]:
        if self._dice is None or not rows or rows[0] <= self._furthest:
            return rows
        kept = [row for row in rows if self._dice.random() > 0.01]
        twice = kept + [row for row in kept if self._dice.random() < 0.3]
        self._dice.shuffle(twice)
        return twice

    def _kind(self, seq: int) -> str:
        return "missing" if "why" in self._rows[seq] else "verdict"

    def _publish_status(self) -> None:
        first = min(self._rows, default=self._last + 1)
        waiting = {name: {"acknowledged": upto, "waiting": self._last - upto} for name, upto in self._consumers.items()}
        mode = "consumers" if self._consumers else "broker"
        status = status_fields(self.name, self.epoch, first, self._last, consumers=waiting, deliveryMode=mode)
        self._client.publish(f"{self.root}/status", json.dumps(status).encode(), qos=1, retain=True)

    def _on_connect(self, client: mqtt.Client, *_: Any) -> None:
        client.subscribe([(f"{self.root}/ack/+", 1), (f"{self.root}/cmd/+", 1)])
        with self._lock:
            self._sent = min(self._consumers.values(), default=self._sent)
            self._is_up = self._status_is_due = True

    def _on_disconnect(self, *_: Any) -> None:
        self._is_up = False

    def _on_message(self, client: mqtt.Client, _data: Any, message: mqtt.MQTTMessage) -> None:
        heard = json.loads(message.payload)
        if "/cmd/" in message.topic:
            self.commands.append({**heard, "topic": message.topic})
            if self.reply is not None:
                reply = {"schema": "taktsight.reply/1", "issuer": heard["issuer"], "id": heard["id"], **self.reply}
                client.publish(f"{message.topic}/reply", json.dumps(reply).encode(), qos=1)
            return
        name = message.topic.rsplit("/", 1)[-1]
        self.acks.append({**heard, "consumer": name})
        with self._lock:
            if heard["epoch"] != self.epoch or name not in self._consumers or heard["upto"] > self._last:
                return
            if heard["upto"] > self._consumers[name]:
                self._consumers[name], self._moved_s = heard["upto"], time.monotonic()
            if heard["resend"]:
                self._sent = self._consumers[name]
            done = min(self._consumers.values())
            self._rows = {seq: row for seq, row in self._rows.items() if row.get("last", seq) > done}


def picture_link(picture: bytes) -> dict[str, Any]:
    """Return the field `heatmap` of the verdict that a picture belongs to."""
    return {"topic": None, "sha256": hashlib.sha256(picture).hexdigest(), "contentType": "image/jpeg"}
