"""How the broker is reached: the checked settings of `mqtt:` in station.yaml, and a paho client made from them."""

from __future__ import annotations

import contextlib
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from agent.mqtt.delivery import CONSUMER_NAME
from calibration.errors import SettingsError

RECONNECT_MIN_S, RECONNECT_MAX_S = 1, 8
CONNECT_TIMEOUT_S = 3.0

PROTOCOLS = {5: paho.MQTTv5, 3: paho.MQTTv311}


@dataclass(frozen=True, slots=True)
class MqttSettings:
    """How to reach the broker, and where the station's topics hang. Raises SettingsError that names the key."""

    topic: str  # root of all topics: "{enterprise}/{site}/{area}/{line}/{cell}"
    host: str = "127.0.0.1"
    port: int = 1883
    protocol: int = 5  # 5, or 3 for MQTT 3.1.1
    client_id: str = ""  # unique at the broker; empty: made from the topic
    username: str | None = None
    password_file: Path | None = None  # its first line is the password
    ca_file: Path | None = None  # given: TLS
    cert_file: Path | None = None  # given with key_file: the station shows a certificate
    key_file: Path | None = None
    keepalive_s: int = 10  # the broker sends the last will after 1.5 times this
    heatmaps: bool = True
    consumers: tuple[
        str, ...
    ] = ()  # who must acknowledge each verdict on ack/{name}; none: the broker's word is enough

    def __post_init__(self) -> None:
        """Check every key."""
        _check_topic(self.topic)
        _require("host", _is_host(self.host), f"{self.host!r} found, need a host name or address")
        _require("port", 1 <= self.port <= 65535, f"{self.port} found, need 1 to 65535")
        _require("protocol", self.protocol in PROTOCOLS, f"{self.protocol} found, need 5, or 3 for MQTT 3.1.1")
        _require("keepalive_s", 1 <= self.keepalive_s <= 3600, f"{self.keepalive_s} found, need 1 to 3600")
        for name in self.consumers:
            _require(
                "consumers", bool(CONSUMER_NAME.fullmatch(name)), f"{name!r} found, need 1 to 32 of A-Z a-z 0-9 _ -"
            )
        _require("consumers", len(set(self.consumers)) == len(self.consumers), "a name stands twice")
        _require("username", bool(self.username) or not self.password_file, "missing: password_file needs it")
        _require("ca_file", bool(self.ca_file) or not self.cert_file, "missing: cert_file needs it")
        _require("key_file", bool(self.key_file) == bool(self.cert_file), "cert_file and key_file go together")


def _require(key: str, holds: bool, message: str) -> None:
    if not holds:
        raise SettingsError(f"mqtt.{key}: {message}")


def _check_topic(topic: str) -> None:
    _require("topic", "+" not in topic and "#" not in topic, f"{topic!r} found, + and # are wildcards: leave them out")
    _require("topic", all(topic.split("/")), f"{topic!r} has an empty level: need words with one / between them")
    _require("topic", topic.isprintable() and not topic.startswith("$"), f"{topic!r} found, need printable words")
    _require("topic", len(topic.encode()) <= 1024, f"{len(topic.encode())} bytes found, need 1024 or fewer")


def _is_host(host: str) -> bool:
    try:
        return bool(host.encode("idna"))
    except UnicodeError:
        return False


@dataclass(frozen=True, slots=True)
class Credentials:
    """What the files of the settings hold: read once, good for any number of connections."""

    password: str | None
    tls: ssl.SSLContext | None


def credential_files(settings: MqttSettings) -> tuple[Path, ...]:
    """Return the files that load_credentials reads."""
    files = (settings.ca_file, settings.cert_file, settings.key_file, settings.password_file)
    return tuple(path for path in files if path is not None)


def load_credentials(settings: MqttSettings) -> Credentials:
    """Return password and TLS context. Raises SettingsError if a file cannot be read or they do not fit together."""
    return Credentials(_password(settings.password_file), None if settings.ca_file is None else _tls(settings))


def build_client(settings: MqttSettings, client_id: str) -> paho.Client:
    """Return a client that connects again by itself, not yet connected. Raises SettingsError as load_credentials."""
    client = new_client(settings, load_credentials(settings), client_id)
    client.reconnect_delay_set(RECONNECT_MIN_S, RECONNECT_MAX_S)
    return client


def new_client(
    settings: MqttSettings, credentials: Credentials, client_id: str, *, reconnect: bool = True
) -> paho.Client:
    """Return a client with credentials and TLS set up, not yet connected."""
    client = paho.Client(
        CallbackAPIVersion.VERSION2,
        client_id=client_id,
        protocol=PROTOCOLS[settings.protocol],
        clean_session=None if settings.protocol == 5 else True,
        reconnect_on_failure=reconnect,
    )
    client.connect_timeout = CONNECT_TIMEOUT_S
    client.on_socket_open = _send_at_once
    if settings.username is not None:
        client.username_pw_set(settings.username, credentials.password)
    if credentials.tls is not None:
        client.tls_set_context(credentials.tls)
    return client


def _send_at_once(_client: paho.Client, _userdata: Any, connection: Any) -> None:
    """Switch Nagle's algorithm off: with it, small packets wait 40 ms for the answer to the one before."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def begin_connecting(client: paho.Client, settings: MqttSettings) -> None:
    """Start paho's thread, which connects, and connects again, until told otherwise. Returns at once."""
    if settings.protocol == 5:
        client.connect_async(settings.host, settings.port, settings.keepalive_s, clean_start=True)
    else:
        client.connect_async(settings.host, settings.port, settings.keepalive_s)
    client.loop_start()


def _password(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"mqtt.password_file: {path} cannot be read: {error}") from error
    _require("password_file", bool(lines and lines[0]), f"{path} is empty: put the password on its first line")
    return lines[0]


class _ClosingSocket(ssl.SSLSocket):
    """Closes itself when the handshake fails: paho forgets to."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except (OSError, ValueError):
            self.close()
            raise


def _tls(settings: MqttSettings) -> ssl.SSLContext:
    files = {"ca_file": settings.ca_file, "cert_file": settings.cert_file, "key_file": settings.key_file}
    for key, path in files.items():
        _require(key, path is None or path.is_file(), f"{path} is not a file")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks certificate and name
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.sslsocket_class = _ClosingSocket
    try:
        context.load_verify_locations(settings.ca_file)
        if settings.cert_file is not None:
            context.load_cert_chain(settings.cert_file, settings.key_file, password="")  # never asks at a terminal
    except (OSError, ValueError) as error:
        raise SettingsError(f"mqtt.ca_file, cert_file, key_file: {error}: need PEM files that match") from error
    return context
