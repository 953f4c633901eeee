"""The way to the broker, step by step as a connection goes it: address, port, TLS, login.

Each step has a time-out of its own, and the first that fails ends it. We log in under a name of our own, without a last
will: an agent that runs keeps its connection, and nobody hears of us.
"""

from __future__ import annotations

import secrets
import socket
import ssl
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from paho.mqtt.client import MQTT_ERR_SUCCESS, MQTT_LOG_ERR
from paho.mqtt.reasoncodes import ReasonCode

from agent.doctor.finding import Finding, fail, ok, warn
from agent.doctor.folders import CREDENTIALS
from agent.doctor.machine import Case, within
from agent.mqtt.certificates import WARN_BEFORE, expires_utc, likely_cause
from agent.mqtt.client import Credentials, MqttSettings, load_credentials, new_client
from calibration.errors import SettingsError

RESOLVE_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 3.0  # of one address
MOST_ADDRESSES = 3
LOGIN_TIMEOUT_S = 5.0

_WAYS_OUT = {
    0x84: "set mqtt.protocol to the version that the broker speaks: 5, or 3 for MQTT 3.1.1",
    0x85: "it takes only client names that it knows: allow taktsight-doctor-*, or believe the agent's own log",
    0x86: "check mqtt.username and password_file against the broker's users",
    0x87: "check mqtt.username, password_file and cert_file against the broker's users and its access list",
    0x88: "look at the broker: it has no room for us",
    0x8A: "the broker has banned this machine or user: see its log",
    0x97: "the broker's quota is used up: see its limits",
    0x9F: "the broker lets no more connections in per second: see its limits",
}


@dataclass(slots=True)
class _Login:
    """What a broker answered to CONNECT."""

    reason: ReasonCode | None = None
    most_qos: int = 2
    retains: bool = True
    error: str = ""


def broker(case: Case) -> Iterator[Finding]:
    """Yield how far the way to the broker leads."""
    settings = case.station.mqtt
    if settings is None:
        yield ok("broker", "none: station.yaml has no mqtt")
        return
    now_utc = case.machine.now_utc()
    yield from certificate_files(settings, now_utc)
    yield from secret_files(settings)
    try:
        credentials = load_credentials(settings)
    except SettingsError as error:
        yield _unusable(case, settings, error)
        return
    addresses: list[tuple[Any, ...]] = []
    yield _resolved(settings, addresses)
    if not addresses:
        return
    connections: list[socket.socket] = []
    yield _reached(settings, addresses, connections)
    for connection in connections:
        with connection:
            if credentials.tls is not None:
                finding, certificate_findings = _handshake(settings, credentials.tls, connection, now_utc)
                yield finding
                yield from certificate_findings
                if not certificate_findings:
                    return
        yield from _logged_in(settings, credentials)


def certificate_files(settings: MqttSettings, now_utc: datetime) -> Iterator[Finding]:
    """Yield how long the certificates in files are still valid."""
    for path in (settings.ca_file, settings.cert_file):
        end_utc = None if path is None else expires_utc(path)
        if path is not None and end_utc is not None:
            yield _expiry(f"broker.certificate {path.name}", end_utc, now_utc, f"put a new one into {path}")


def secret_files(settings: MqttSettings) -> Iterator[Finding]:
    """Yield whether others than the agent may read its key or password."""
    for key, path in (("key_file", settings.key_file), ("password_file", settings.password_file)):
        try:
            mode = None if path is None else stat.S_IMODE(path.stat().st_mode)
        except OSError:  # whoever loads it says so
            continue
        if path is None or mode is None:
            continue
        if mode & 0o007:
            yield warn(f"broker.{key}", f"{path}: everybody may use it (mode {mode:03o})", "nobody but the agent",
                       f"chmod o= {path}")  # fmt: skip
        else:
            yield ok(f"broker.{key}", f"{path}: mode {mode:03o}")


def _unusable(case: Case, settings: MqttSettings, error: SettingsError) -> Finding:
    """Return why there is nothing to log in with; what the unit hands over is there only while it runs."""
    handed_over = case.machine.at(CREDENTIALS)
    files = [path for path in (settings.key_file, settings.password_file) if path is not None]
    if any(path.is_relative_to(handed_over) and not path.exists() for path in files):
        return warn(
            "broker",
            f"not tried: {error}",
            "what systemd hands over while the unit runs",
            "start the unit, then ask the doctor again as root",
        )
    return fail("broker", str(error), "files that can be read and belong together", "mend them, or station.yaml")


def _resolved(settings: MqttSettings, addresses: list[tuple[Any, ...]]) -> Finding:
    """Return whether the host has an address; addresses gets (family, address) of those to try."""
    name = "broker.address"
    began_s = time.monotonic()
    try:
        found = within(
            RESOLVE_TIMEOUT_S, lambda: socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
        )
    except (OSError, UnicodeError) as error:  # TimeoutError is one of them
        why = getattr(error, "strerror", None) or str(error)
        return fail(name, f"{settings.host}: {why}", "an address", "check mqtt.host, /etc/resolv.conf and the network")
    addresses += [(family, address) for family, _, _, _, address in found][:MOST_ADDRESSES]
    told = ", ".join(str(address[0]) for _, address in addresses)
    return ok(name, f"{settings.host}: {told}, {1e3 * (time.monotonic() - began_s):.0f} ms")


def _reached(settings: MqttSettings, addresses: list[tuple[Any, ...]], connections: list[socket.socket]) -> Finding:
    """Return whether somebody listens; connections gets the first connection that came about."""
    name, why = "broker.port", ""
    for family, address in addresses:
        connection = socket.socket(family, socket.SOCK_STREAM)
        connection.settimeout(CONNECT_TIMEOUT_S)
        began_s = time.monotonic()
        try:
            connection.connect(address)
        except OSError as error:
            connection.close()
            why = error.strerror or f"no answer within {CONNECT_TIMEOUT_S:g} s"
            continue
        connections.append(connection)
        return ok(name, f"{address[0]} port {settings.port}: open, {1e3 * (time.monotonic() - began_s):.0f} ms")
    return fail(
        name,
        f"{settings.host} port {settings.port}: {why}",
        "a broker that listens",
        "check mqtt.port, that the broker runs, and the firewalls between (the unit's IPAddressAllow= is one)",
    )


def _handshake(
    settings: MqttSettings, tls: ssl.SSLContext, connection: socket.socket, now_utc: datetime
) -> tuple[Finding, list[Finding]]:
    """Return whether broker and station agree on TLS, and how long the broker's certificate lasts."""
    try:
        secure = tls.wrap_socket(connection, server_hostname=settings.host)
    except OSError as error:
        why = f"no answer within {CONNECT_TIMEOUT_S:g} s" if isinstance(error, TimeoutError) else likely_cause(error)
        return fail("broker.tls", why, "a broker that shows a certificate of ours", "mend it on the side it names"), []
    with secure:
        certificate, version = secure.getpeercert() or {}, secure.version()
    end_utc = datetime.fromtimestamp(ssl.cert_time_to_seconds(str(certificate["notAfter"])), UTC)
    expiry = _expiry("broker.certificate", end_utc, now_utc, "give the broker a new one")
    return ok("broker.tls", f"{version}, the broker's certificate holds"), [expiry]


def _logged_in(settings: MqttSettings, credentials: Credentials) -> Iterator[Finding]:
    """Yield what the broker says when we log in, and whether it can do what the agent needs."""
    login = log_in(settings, credentials)
    version = "MQTT 5" if settings.protocol == 5 else "MQTT 3.1.1"
    if login.reason is None:
        why = login.error or f"no answer within {LOGIN_TIMEOUT_S:g} s"
        yield fail("broker.login", why, f"a broker that answers in {version}", "see the broker's log at this minute")
    elif login.reason.is_failure:
        code = login.reason.value
        way_out = _WAYS_OUT.get(code, "see the broker's log at this minute")
        grade = warn if code == 0x85 else fail  # the agent's own name may be one that it knows
        yield grade("broker.login", f"refused: {login.reason} (0x{code:02X})", "a login", way_out)
    elif login.most_qos < 1:
        yield fail("broker.login", "the broker takes QoS 0 alone", "QoS 1: else verdicts get lost", "allow it there")
    elif not login.retains:
        yield warn(
            "broker.login", "the broker retains nothing", "a status that is there for who comes later", "allow it there"
        )
    else:
        yield ok("broker.login", f"{version}, {'as ' + settings.username if settings.username else 'no user name'}")


def log_in(settings: MqttSettings, credentials: Credentials) -> _Login:
    """Return what the broker answers to a login under a name of our own; the connection is closed again."""
    login = _Login()

    def on_connect(_client: Any, _userdata: Any, _flags: Any, reason: ReasonCode, properties: Any) -> None:
        login.most_qos = getattr(properties, "MaximumQoS", 2)
        login.retains = bool(getattr(properties, "RetainAvailable", True))
        login.reason = reason

    def on_log(_client: Any, _userdata: Any, level: int, text: str) -> None:
        if level == MQTT_LOG_ERR:
            login.error = login.error or likely_cause(text)  # what follows is only that there is no connection

    client_id = f"taktsight-doctor-{secrets.token_hex(3)}"  # 23 characters: more a 3.1.1 broker need not take
    client = new_client(settings, credentials, client_id, reconnect=False)
    client.on_connect, client.on_log = on_connect, on_log
    options: dict[str, Any] = {"clean_start": True} if settings.protocol == 5 else {}
    until_s = time.monotonic() + LOGIN_TIMEOUT_S
    try:
        client.connect(settings.host, settings.port, settings.keepalive_s, **options)
        state = MQTT_ERR_SUCCESS
        while login.reason is None and state == MQTT_ERR_SUCCESS and time.monotonic() < until_s:
            state = client.loop(0.1)
        if login.reason is None and state != MQTT_ERR_SUCCESS and not login.error:
            login.error = "the broker hung up: it does not speak this protocol, or refuses us without a word"
    except (OSError, ValueError) as error:
        login.error = likely_cause(error)
    finally:
        client.disconnect()
    return login


def _expiry(name: str, end_utc: datetime, now_utc: datetime, action: str) -> Finding:
    left = end_utc - now_utc
    if left.total_seconds() <= 0:
        return fail(name, f"expired on {end_utc:%Y-%m-%d}", "one that is valid", action)
    told = f"valid until {end_utc:%Y-%m-%d}, {left.days} days"
    return warn(name, told, f"{WARN_BEFORE.days} days or more", action) if left <= WARN_BEFORE else ok(name, told)
