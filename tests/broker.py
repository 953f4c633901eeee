"""A real mosquitto broker for tests, on a free port of the loopback interface, and a consumer that writes down all."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from node import apt_install
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

WANTED = "mosquitto is not installed: run `apt-get install mosquitto`, or put the program into PATH"


@functools.cache
def mosquitto_program() -> str:
    """Return the path of mosquitto, installed on the spot where we may; else skip, or fail on a CI machine."""
    program = _find_mosquitto()
    if program is None:
        apt_install("mosquitto")
        program = _find_mosquitto()
    if program is None and os.environ.get("CI") == "true":
        pytest.fail(WANTED)
    if program is None:
        pytest.skip(WANTED)
    return program


def _find_mosquitto() -> str | None:
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")


def free_port() -> int:
    """Return a loopback port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(holds: Any, timeout_s: float = 8.0) -> None:
    """Return once holds() is true. Raises AssertionError after timeout_s."""
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline_s, f"still not true after {timeout_s} s"
        time.sleep(0.01)


class Mosquitto:
    """One broker with its files in `folder`; start, kill, freeze and start again as the test likes."""

    def __init__(self, folder: Path, *, lines: tuple[str, ...] = (), anonymous: bool = True) -> None:
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._config = folder / "mosquitto.conf"
        fixed = (
            f"listener {self.port} 127.0.0.1",
            f"allow_anonymous {str(anonymous).lower()}",
            f"persistence_location {folder}/",
            "log_dest none",
            *(("user root",) if os.geteuid() == 0 else ()),  # or it could not read its files in `folder`
        )
        self._config.write_text("\n".join((*fixed, *lines)) + "\n", encoding="utf-8")

    def start(self) -> Mosquitto:
        """Start the broker and wait until it listens."""
        self._process = subprocess.Popen(
            [mosquitto_program(), "-c", str(self._config)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_until(self._listens)
        return self

    def kill(self) -> None:
        """End it as a power cut would."""
        self._end(signal.SIGKILL)

    def freeze(self) -> None:
        """Stop it in its tracks: connections stay open, nothing is answered."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def signal(self, number: int) -> None:
        """Send it a signal: SIGHUP to read its lists again, SIGCONT to thaw it."""
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self) -> None:
        """End it, frozen or not; does nothing if it does not run."""
        self._end(signal.SIGKILL)

    def _listens(self) -> bool:
        assert self._process is not None and self._process.poll() is None, "mosquitto ended at once"
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def _end(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)
            self._process.wait(timeout=5)


@dataclass(frozen=True, slots=True)
class Received:
    """One message as the consumer got it."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    properties: Properties | None


class Consumer:
    """An MES that subscribes with a session that outlives its connections, and keeps all it gets in `received`."""

    def __init__(
        self, port: int, topic: str, *, name: str = "mes", protocol: int = 5, username: str | None = None
    ) -> None:
        self.received: list[Received] = []
        self._topic = topic
        self._subscribed = threading.Event()
        v5 = protocol == 5
        self._client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=name,
            protocol=mqtt.MQTTv5 if v5 else mqtt.MQTTv311,
            clean_session=None if v5 else False,
        )
        self._client.username_pw_set(username, username) if username else None
        self._client.reconnect_delay_set(0.2, 1)
        self._client.on_connect = self._on_connect
        self._client.on_subscribe = lambda *_: self._subscribed.set()
        self._client.on_message = self._on_message
        properties = Properties(PacketTypes.CONNECT) if v5 else None
        if properties is not None:
            properties.SessionExpiryInterval = 3600
        self._client.connect("127.0.0.1", port, 10, properties=properties, **({"clean_start": False} if v5 else {}))
        self._client.loop_start()
        assert self._subscribed.wait(5), "the consumer could not subscribe"

    def on(self, ending: str) -> list[Received]:
        """Return what came on topics with this ending or, given `/x/`, below this level."""
        return [item for item in list(self.received) if item.topic.endswith(ending) or ending in item.topic]

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, correlation: bytes | None = None) -> None:
        """Publish and wait until the broker has it."""
        properties = None
        if correlation is not None:
            properties = Properties(PacketTypes.PUBLISH)
            properties.CorrelationData = correlation
        self._client.publish(topic, payload, 1, retain, properties).wait_for_publish(5)

    def stop(self) -> None:
        """Disconnect."""
        self._client.disconnect()
        self._client.loop_stop()

    def _on_connect(self, client: mqtt.Client, *_: Any) -> None:
        client.subscribe(self._topic, qos=1)

    def _on_message(self, _client: Any, _userdata: Any, message: mqtt.MQTTMessage) -> None:
        item = Received(message.topic, bytes(message.payload), message.qos, message.retain, message.properties)
        self.received.append(item)


class Cable:
    """A TCP connection to the broker that can be cut: both ends see it break, nobody says goodbye."""

    def __init__(self, broker_port: int) -> None:
        self._broker_port = broker_port
        self._ends: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break all connections; new ones are taken."""
        ends, self._ends = self._ends, []
        for end in ends:
            with contextlib.suppress(OSError):  # the other end's thread was faster
                end.shutdown(socket.SHUT_RDWR)

    def remove(self) -> None:
        """Break all connections and take no more."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                station, _ = self._listener.accept()
            except OSError:
                return
            broker = socket.create_connection(("127.0.0.1", self._broker_port))
            self._ends += [station, broker]
            for source, sink in ((station, broker), (broker, station)):
                threading.Thread(target=_copy, args=(source, sink), daemon=True).start()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    """Carry bytes until one end is gone, then close the source."""
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    finally:
        source.close()
