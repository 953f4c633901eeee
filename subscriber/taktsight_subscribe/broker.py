"""How the broker is reached: checked settings, and a paho client made from them."""

from __future__ import annotations

import re
import socket
import ssl
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from taktsight_subscribe.errors import SettingsError
from taktsight_subscribe.messages import CONSUMER_NAME

CONNECT_TIMEOUT_S = 3.0
PROTOCOLS = {5: paho.MQTTv5, 3: paho.MQTTv311}


class BrokerOptions(TypedDict, total=False):
    """The fields of Broker, as keyword arguments."""

    host: str
    port: int
    protocol: int
    client_id: str
    username: str | None
    password: str | None
    password_file: str | Path | None
    ca_file: str | Path | None
    cert_file: str | Path | None
    key_file: str | Path | None
    keepalive_s: int


@dataclass(frozen=True, slots=True)
class Broker:
    """Where the broker is and what to show it. Raises SettingsError that names the field."""

    host: str = "127.0.0.1"
    port: int = 1883
    protocol: int = 5  # 5, or 3 for MQTT 3.1.1
    client_id: str = ""  # empty: made from the consumer's name
    username: str | None = None
    password: str | None = None
    password_file: str | Path | None = None  # its first line is the password
    ca_file: str | Path | None = None  # given: TLS, and the broker's certificate is checked against it
    cert_file: str | Path | None = None  # given with key_file: we show a certificate
    key_file: str | Path | None = None
    keepalive_s: int = 15

    def __post_init__(self) -> None:
        """Check every field."""
        _require("host", bool(self.host), "empty, need a name or address")
        _require("port", 1 <= self.port <= 65535, f"{self.port} found, need 1 to 65535")
        _require("protocol", self.protocol in PROTOCOLS, f"{self.protocol} found, need 5, or 3 for MQTT 3.1.1")
        _require("keepalive_s", 1 <= self.keepalive_s <= 3600, f"{self.keepalive_s} found, need 1 to 3600")
        has_password = self.password is not None or self.password_file is not None
        _require("username", bool(self.username) or not has_password, "missing: a password needs it")
        _require("ca_file", bool(self.ca_file) or not self.cert_file, "missing: cert_file needs it")
        _require("key_file", bool(self.key_file) == bool(self.cert_file), "cert_file and key_file go together")

    @property
    def address(self) -> str:
        """Where it is, for people."""
        return f"{self.host}:{self.port}"


def check_consumer(name: str) -> None:
    """Raise SettingsError if this cannot be the name of a consumer."""
    _require("consumer", CONSUMER_NAME.fullmatch(name) is not None, f"{name!r} found, need 1 to 32 of A-Z a-z 0-9 _ -")


def check_topic(topic: str, *, wildcards: bool) -> None:
    """Raise SettingsError if this cannot be the root of one station or, with wildcards, of several."""
    _require("topic", all(topic.split("/")), f"{topic!r} has an empty level: need words with one / between them")
    _require("topic", topic.isprintable() and not topic.startswith("$"), f"{topic!r} found, need printable words")
    _require("topic", "#" not in topic, f"{topic!r} found: write one + per level of the station's topic and no #")
    if wildcards:
        whole = all(level == "+" or "+" not in level for level in topic.split("/"))
        _require("topic", whole, f"{topic!r} found, + stands for a whole level")
    else:
        _require("topic", "+" not in topic, f"{topic!r} found, need the topic of one station")
    if re.search(r"/(verdict|status|missing)$", topic):
        raise SettingsError(f"topic: {topic!r} found, need the station's root: leave out its last level")


def build_client(broker: Broker, client_id: str, *, clean: bool) -> paho.Client:
    """Return a client with credentials and TLS set up that leaves acknowledging to us, not yet connected.

    clean: begin with nothing; else the session with what waits in it goes on.

    Raises SettingsError if a password or certificate cannot be read.
    """
    client = paho.Client(
        CallbackAPIVersion.VERSION2,
        client_id=client_id,
        protocol=PROTOCOLS[broker.protocol],
        clean_session=None if broker.protocol == 5 else clean,
        manual_ack=True,
    )
    client.connect_timeout = CONNECT_TIMEOUT_S
    client.on_socket_open = _send_at_once
    if broker.username is not None:
        client.username_pw_set(broker.username, _password(broker))
    if broker.ca_file is not None:
        _set_tls(client, broker)
    return client


def _require(field: str, holds: bool, message: str) -> None:
    if not holds:
        raise SettingsError(f"{field}: {message}")


def _send_at_once(_client: paho.Client, _data: Any, sock: Any) -> None:
    """Switch Nagle's algorithm off: with it every acknowledgement waits 40 ms, and the station with it."""
    with suppress(OSError, AttributeError):  # no TCP
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _password(broker: Broker) -> str | None:
    if broker.password_file is None:
        return broker.password
    path = Path(broker.password_file)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"password_file: {path} cannot be read: {error}") from error
    _require("password_file", bool(lines and lines[0]), f"{path} is empty: put the password on its first line")
    return lines[0]


def _set_tls(client: paho.Client, broker: Broker) -> None:
    files = {"ca_file": broker.ca_file, "cert_file": broker.cert_file, "key_file": broker.key_file}
    for field, path in files.items():
        _require(field, path is None or Path(path).is_file(), f"{path} is not a file")
    ca, cert, key_path = (None if path is None else str(path) for path in files.values())
    try:
        client.tls_set(ca_certs=ca, certfile=cert, keyfile=key_path)
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"ca_file, cert_file, key_file: {error}: need PEM files that match") from error
