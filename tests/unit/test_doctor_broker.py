"""The doctor's way to the broker, against brokers that are absent, silent, of another mind, and real."""

import contextlib
import socket
import ssl
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest

from agent.doctor import broker as doctor_broker
from agent.doctor.broker import broker, certificate_files, secret_files
from agent.doctor.finding import Grade
from agent.mqtt.client import MqttSettings, new_client
from tests.broker import Mosquitto, free_port
from tests.certificates import Authority
from tests.machines import case_at, grades, machine_at, only

GOOD_PATH = {"broker.address": "ok", "broker.port": "ok", "broker.login": "ok"}


class FakeBroker:
    """Listens on loopback and answers each CONNECT with the same bytes; TLS where it is given a certificate."""

    def __init__(self, answer, *, certificate=None):
        self._answer = answer
        self._tls = None
        if certificate is not None:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(*certificate)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.heard = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(3)
                if self._tls is None:
                    self._talk(connection)
                else:
                    with self._tls.wrap_socket(connection, server_side=True) as secure:
                        self._talk(secure)

    def _talk(self, connection):
        packet = connection.recv(1024)
        if not packet:
            return
        self.heard.append(packet)
        connection.sendall(self._answer)
        while connection.recv(1024):
            pass

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)


@pytest.fixture
def fake():
    """Returns a function that starts a fake broker; all end with the test."""
    with contextlib.ExitStack() as stack:

        def start(answer=bytes((0x20, 3, 0, 0, 0)), **options):
            made = FakeBroker(answer, **options)
            stack.callback(made.close)
            return made

        yield start


@pytest.fixture
def ask(tmp_path):
    """Returns a function that gives the findings about a broker, with these keys of mqtt in station.yaml."""

    def asked(port, *, machine=None, **keys):
        settings = {"topic": "a/b", "host": "127.0.0.1", "port": port, **keys}
        lines = "".join(f"\n  {key}: {value}" for key, value in settings.items())
        here = machine or machine_at(tmp_path / "root", now_utc=lambda: datetime.now(UTC))
        return list(broker(case_at(tmp_path, here, f"mqtt:{lines}")))

    return asked


def test_a_station_without_a_broker_is_fine(tmp_path):
    assert grades(broker(case_at(tmp_path, machine_at(tmp_path)))) == {"broker": "ok"}


def test_a_broker_that_lets_us_in_is_fine_and_hears_a_name_of_our_own(fake, ask):
    there = fake()
    assert grades(ask(there.port)) == GOOD_PATH
    (packet,) = there.heard
    assert b"taktsight-doctor-" in packet
    assert b"taktsight-a-b" not in packet  # the agent's own name would throw it out
    assert packet[9] & 0b0000_0100 == 0  # no last will


@pytest.mark.parametrize(
    ("code", "grade", "word", "action"),
    [
        (0x86, "fail", "Bad user name or password", "mqtt.username"),
        (0x87, "fail", "Not authorized", "access list"),
        (0x85, "warn", "Client identifier not valid", "taktsight-doctor-*"),
        (0x84, "fail", "Unsupported protocol version", "mqtt.protocol"),
        (0x88, "fail", "Server unavailable", "no room"),
        (0x9C, "fail", "Use another server", "log"),
    ],
)
def test_a_refusal_is_told_in_words_with_a_way_out(fake, ask, *, code, grade, word, action):
    found = only(ask(fake(bytes((0x20, 3, 0, code, 0))).port), "broker.login")
    assert str(found.grade) == grade
    assert word.lower() in found.found.lower()
    assert f"(0x{code:02X})" in found.found
    assert action in found.action


def test_a_refusal_of_an_older_broker_is_told_too(fake, ask):
    found = only(ask(fake(bytes((0x20, 2, 0, 5))).port, protocol=3), "broker.login")
    assert "Not authorized" in found.found
    assert found.grade is Grade.FAIL


@pytest.mark.parametrize(
    ("properties", "grade", "text"),
    [((0x24, 0), "fail", "QoS 0 alone"), ((0x25, 0), "warn", "retains nothing"), ((0x24, 1), "ok", "MQTT 5")],
)
def test_a_broker_that_cannot_do_what_the_agent_needs_is_told(fake, ask, properties, grade, text):
    found = only(ask(fake(bytes((0x20, 5, 0, 0, 2, *properties))).port), "broker.login")
    assert str(found.grade) == grade
    assert text in found.found


def test_a_broker_that_says_nothing_is_not_waited_for(fake, ask, monkeypatch):
    monkeypatch.setattr(doctor_broker, "LOGIN_TIMEOUT_S", 0.3)
    began_s = time.monotonic()
    found = only(ask(fake(b"").port), "broker.login")
    assert (found.grade, found.found) == (Grade.FAIL, "no answer within 0.3 s")
    assert time.monotonic() - began_s < 2


def test_something_else_than_a_broker_is_told(fake, ask):
    found = only(ask(fake(b"HTTP/1.1 400 Bad Request\r\n\r\n" + b" " * 200).port), "broker.login")
    assert found.grade is Grade.FAIL
    assert "does not speak this protocol" in found.found


def test_a_closed_port_fails_and_ends_the_way(ask):
    found = ask(free_port())
    assert grades(found) == {"broker.address": "ok", "broker.port": "fail"}
    assert "Connection refused" in found[1].found


def test_a_host_without_an_address_fails_and_ends_the_way(ask, monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(doctor_broker.socket, "getaddrinfo", unknown)
    (found,) = ask(1883)
    assert (found.name, found.grade) == ("broker.address", Grade.FAIL)
    assert "Name or service not known" in found.found


def test_a_name_server_that_hangs_is_not_waited_for(ask, monkeypatch):
    monkeypatch.setattr(doctor_broker, "RESOLVE_TIMEOUT_S", 0.1)
    monkeypatch.setattr(doctor_broker.socket, "getaddrinfo", lambda *_, **__: time.sleep(2))
    began_s = time.monotonic()
    (found,) = ask(1883)
    assert "no answer within 0.1 s" in found.found
    assert time.monotonic() - began_s < 1


# TLS


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


def test_a_certificate_of_our_authority_is_believed_and_its_end_told(fake, ask, authority):
    there = fake(certificate=authority.issue("broker", ends=timedelta(days=90, minutes=5)))
    found = ask(there.port, ca_file=authority.file)
    assert grades(found) == {
        **GOOD_PATH,
        "broker.tls": "ok",
        "broker.certificate": "ok",
        "broker.certificate authority.crt": "ok",
    }
    assert only(found, "broker.certificate").found.endswith("90 days")
    assert "TLSv1." in only(found, "broker.tls").found


def test_a_broker_whose_certificate_ends_soon_warns(fake, ask, authority):
    there = fake(certificate=authority.issue("broker", ends=timedelta(days=20)))
    assert only(ask(there.port, ca_file=authority.file), "broker.certificate").grade is Grade.WARN


@pytest.mark.parametrize(
    ("issued", "text"),
    [
        ({"ends": -timedelta(hours=1)}, "has expired"),
        ({"begins": timedelta(days=1)}, "not valid yet"),
        ({"address": "10.0.0.1"}, "for another name"),
    ],
)
def test_a_certificate_that_does_not_hold_fails_and_ends_the_way(fake, ask, authority, issued, text):
    there = fake(certificate=authority.issue("broker", **issued))
    found = ask(there.port, ca_file=authority.file)
    assert text in only(found, "broker.tls").found
    assert only(found, "broker.tls").grade is Grade.FAIL
    assert "broker.login" not in grades(found)


def test_a_broker_of_another_authority_fails(fake, ask, authority, tmp_path):
    there = fake(certificate=authority.issue("broker"))
    found = ask(there.port, ca_file=Authority(tmp_path, "other").file)
    assert "unknown authority: check mqtt.ca_file" in only(found, "broker.tls").found


def test_a_port_without_tls_fails(fake, ask, authority):
    found = only(ask(fake().port, ca_file=authority.file), "broker.tls")
    assert found.grade is Grade.FAIL


def test_our_own_certificates_are_held_against_the_calendar(authority, tmp_path):
    cert, key = authority.issue("station", ends=timedelta(days=365))
    settings = MqttSettings(topic="a", ca_file=authority.file, cert_file=cert, key_file=key)
    days = {"ok": 300, "warn": 340, "fail": 366}
    for grade, passed in days.items():
        found = certificate_files(settings, datetime.now(UTC) + timedelta(days=passed))
        assert grades(found) == {"broker.certificate authority.crt": "ok", "broker.certificate station.crt": grade}


def test_a_key_for_everybody_warns(authority, tmp_path):
    cert, key = authority.issue("station")
    settings = MqttSettings(topic="a", ca_file=authority.file, cert_file=cert, key_file=key)
    key.chmod(0o644)
    (found,) = secret_files(settings)
    assert (found.name, found.grade) == ("broker.key_file", Grade.WARN)
    key.chmod(0o640)
    assert grades(secret_files(settings)) == {"broker.key_file": "ok"}
    key.unlink()
    assert list(secret_files(settings)) == []


def test_files_that_cannot_be_used_fail_and_those_of_systemd_warn(ask, authority, tmp_path):
    cert, key = authority.issue("station")
    key.write_text("no key")
    found = ask(1, ca_file=authority.file, cert_file=cert, key_file=key)
    assert only(found, "broker").grade is Grade.FAIL
    absent = tmp_path / "root/run/credentials/taktsight-agent@cell7.service/mqtt.key"
    found = ask(1, ca_file=authority.file, cert_file=cert, key_file=absent)
    assert only(found, "broker").grade is Grade.WARN
    assert "start the unit" in only(found, "broker").action


# a real broker


@pytest.mark.broker
def test_mosquitto_lets_the_doctor_in_and_the_agent_stays(ask, tmp_path):
    there = Mosquitto(tmp_path).start()
    try:
        settings = MqttSettings(topic="a/b", port=there.port)
        agent = new_client(settings, doctor_broker.load_credentials(settings), "taktsight-a-b", reconnect=False)
        gone = threading.Event()
        agent.on_disconnect = lambda *_: gone.set()
        agent.connect("127.0.0.1", there.port)
        agent.loop_start()
        for protocol in (5, 3):
            assert grades(ask(there.port, protocol=protocol)) == GOOD_PATH
        assert not gone.wait(0.3)
        agent.disconnect()
        agent.loop_stop()
    finally:
        there.stop()


@pytest.mark.broker
@pytest.mark.parametrize("with_certificate", [True, False])
def test_mosquitto_that_wants_a_certificate(ask, authority, tmp_path, with_certificate):
    cert, key = authority.issue("station")
    key.chmod(0o600)
    authority.issue("broker")
    lines = (
        "require_certificate true",
        f"cafile {authority.file}",
        f"certfile {tmp_path}/broker.crt",
        f"keyfile {tmp_path}/broker.key",
    )
    there = Mosquitto(tmp_path, lines=lines).start()
    try:
        own = {"cert_file": cert, "key_file": key} if with_certificate else {}
        found = ask(there.port, ca_file=authority.file, **own)
    finally:
        there.stop()
    if with_certificate:
        assert set(grades(found).values()) == {"ok"}
    else:
        assert "wants a certificate" in only(found, "broker.login").found


@pytest.mark.broker
def test_mosquitto_that_knows_another_password(ask, tmp_path):
    (tmp_path / "password").write_text("wrong\n")
    (tmp_path / "password").chmod(0o600)
    there = Mosquitto(tmp_path, anonymous=False).start()
    try:
        found = ask(there.port, username="cell7", password_file=tmp_path / "password")
    finally:
        there.stop()
    assert only(found, "broker.login").grade is Grade.FAIL
    assert "Not authorized" in only(found, "broker.login").found
