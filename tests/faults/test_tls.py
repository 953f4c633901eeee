"""Certificates and passwords over the years: rotation under load, expiry, wrong clocks. Inspection goes on in all."""

import gc
import signal
import socket
import ssl
import subprocess
import threading
import time
from datetime import timedelta

import pytest

from agent.mqtt.certificates import load_credentials
from agent.mqtt.publisher import MqttSettings
from tests.broker import Mosquitto, free_port, wait_until
from tests.certificates import Authority
from tests.mes import Mes
from tests.station import ROOT, TestStation

pytestmark = pytest.mark.broker


@pytest.fixture(autouse=True)
def impatience(monkeypatch):
    """Looks at certificates ten times a second, so that the tests are soon over."""
    monkeypatch.setattr("agent.mqtt.courier.RECONNECT_MIN_S", 0.1)
    monkeypatch.setattr("agent.mqtt.courier.RECONNECT_MAX_S", 0.2)
    monkeypatch.setattr("agent.mqtt.certificates.CHECK_EVERY_S", 0.1)
    monkeypatch.setattr("agent.mqtt.delivery_report.LOOK_EVERY_S", 0.05)
    monkeypatch.setattr("agent.mqtt.delivery_report.LEAST_PAUSE_S", 0.1)


class Plant:
    """A broker with a TLS listener for stations and a plain one for the MES, and the authority of both."""

    def __init__(self, folder, *, more=(), **certificate):
        self.folder = folder
        self.authority = Authority(folder)
        self.cert, self.key = self.authority.issue("station")
        self.authority.issue("broker", **certificate)
        self.plain_port = free_port()
        lines = (
            *(more or ("require_certificate true",)),
            f"cafile {self.authority.file}",
            f"certfile {folder}/broker.crt",
            f"keyfile {folder}/broker.key",
            f"listener {self.plain_port} 127.0.0.1",
        )
        self.broker = Mosquitto(folder, lines=lines).start()
        wait_until(self._lets_the_mes_in)
        self.stations, self.consumers = [], []

    def station(self, **settings):
        with_tls = {"ca_file": self.authority.file, "cert_file": self.cert, "key_file": self.key}
        folder = self.folder / f"outbox{len(self.stations)}"
        self.stations.append(TestStation(folder, self.broker.port, **{**with_tls, **settings}))
        return self.stations[-1]

    def mes(self):
        self.consumers.append(Mes(self.plain_port, ROOT))
        return self.consumers[-1]

    def _lets_the_mes_in(self):
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.plain_port)) == 0

    def end(self):
        for mes in self.consumers:
            mes.go()
        for station in self.stations:
            station.stop(0.0)
        self.broker.stop()


@pytest.fixture
def plant(tmp_path):
    """Returns a function that makes the plant; all is ended in the end, and no socket was forgotten."""
    made = []

    def make(**options):
        made.append(Plant(tmp_path, **options))
        return made[-1]

    yield make
    for one in made:
        one.end()
    wait_until(lambda: not [thread for thread in threading.enumerate() if "paho" in thread.name])
    gc.collect()


def alarms(station):
    return {alarm.code: alarm.detail for alarm in station.publisher._courier._credentials.alarms}


def test_a_station_shows_its_certificate_and_checks_the_brokers(plant, tmp_path, caplog):
    here = plant()
    mes = here.mes()
    station = here.station(consumers=("mes",))
    station.inspect(20)
    assert station.stop(8.0).verdicts == 0
    assert mes.seqs == list(range(1, 21))
    distrustful = here.station(ca_file=Authority(tmp_path, "other").file)
    distrustful.inspect(1)
    wait_until(lambda: "unknown authority: check mqtt.ca_file" in caplog.text)
    assert distrustful.stop(0.2).verdicts == 1


def test_a_station_without_the_certificate_that_the_broker_wants_is_told_so(plant, caplog):
    here = plant()
    anonymous = here.station(cert_file=None, key_file=None)
    anonymous.inspect(1)
    wait_until(lambda: "the broker wants a certificate" in caplog.text)
    assert anonymous.stop(0.2).verdicts == 1


def test_no_older_tls_than_1_2_is_spoken(plant):
    here = plant()
    settings = MqttSettings(topic=ROOT, ca_file=here.authority.file, cert_file=here.cert, key_file=here.key)
    context = load_credentials(settings).tls
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname


def test_certificates_rotated_under_load_cost_no_verdict(plant, caplog):
    caplog.set_level("INFO")
    here = plant()
    mes = here.mes()
    station = here.station(consumers=("mes",))
    stored = 0
    for rotation in range(3):
        for _ in range(40):
            stored += len(station.inspect(3))
            time.sleep(0.01)
        used = station.publisher._courier._credentials.current
        here.authority.issue("station", ends=timedelta(days=400 + rotation))
        wait_until(lambda used=used: station.publisher._courier._credentials.current is not used)
    wait_until(lambda: station.outbox.waiting == 0)
    assert mes.seqs == list(range(1, stored + 1))
    assert "connecting anew" in caplog.text
    assert "offline" not in {status["state"] for status in mes.statuses}


def test_certificates_that_do_not_fit_together_change_nothing_but_raise_an_alarm(plant, caplog):
    here = plant()
    mes = here.mes()
    station = here.station(consumers=("mes",))
    wait_until(lambda: mes.statuses)
    right = here.cert.read_bytes()
    here.cert.write_bytes(right[: len(right) // 2])
    wait_until(lambda: "credentials_unusable" in alarms(station))
    wait_until(lambda: "credentials_unusable" in {alarm["code"] for alarm in mes.statuses[-1]["alarms"]})
    station.inspect(10)
    wait_until(lambda: station.outbox.waiting == 0)
    here.cert.write_bytes(right)
    wait_until(lambda: "credentials_unusable" not in alarms(station))
    station.inspect(10)
    wait_until(lambda: station.outbox.waiting == 0)
    assert "the old ones stay" in caplog.text


def test_a_certificate_that_runs_out_soon_is_an_alarm_with_its_date(plant):
    here = plant()
    here.authority.issue("station", ends=timedelta(days=12, hours=1))
    mes = here.mes()
    here.station(consumers=("mes",))
    wait_until(lambda: mes.statuses)
    alarm = next(alarm for alarm in mes.statuses[-1]["alarms"] if alarm["code"] == "certificate_expires")
    assert "station.crt expires on " in alarm["detail"]
    assert "in 12 days" in alarm["detail"]


@pytest.mark.parametrize(
    ("begins", "ends", "cause"),
    [(-20, -10, "has expired; our clock says 20"), (10, 20, "is not valid yet; our clock says 20")],
)
def test_where_clock_and_certificate_disagree_verdicts_wait_and_the_log_names_the_clock(
    plant, caplog, begins, ends, cause
):
    here = plant(begins=timedelta(days=begins), ends=timedelta(days=ends))
    mes = here.mes()
    station = here.station(consumers=("mes",))
    station.inspect(5)
    wait_until(lambda: cause in caplog.text)
    station.inspect(5)
    assert station.outbox.waiting == 10
    here.authority.issue("broker")
    here.broker.signal(signal.SIGHUP)  # as if the clock had been set: now they agree
    wait_until(lambda: station.outbox.waiting == 0)
    assert mes.seqs == list(range(1, 11))


def test_an_expired_certificate_of_our_own_is_named_by_the_log_and_the_alarm(plant, caplog):
    here = plant()
    here.authority.issue("station", begins=-timedelta(days=20), ends=-timedelta(days=1))
    station = here.station()
    station.inspect(1)
    wait_until(lambda: "our certificate has expired" in caplog.text)  # as the broker says
    assert "station.crt expired on" in caplog.text  # as we see
    assert "expired on" in alarms(station)["certificate_expires"]
    here.authority.issue("station")
    mes = here.mes()
    wait_until(lambda: station.outbox.waiting == 0)
    assert mes.seqs == [1]


def test_a_changed_password_is_taken_over_without_a_restart(plant, tmp_path, caplog):
    password, passwords = tmp_path / "password", tmp_path / "passwords"

    def give(word):
        passwords.write_text(f"station:{word}\n", encoding="utf-8")
        hashed = ["mosquitto_passwd", "-U", str(passwords)]
        subprocess.run(hashed, stdin=subprocess.DEVNULL, capture_output=True, timeout=20, check=False)

    give("old")
    password.write_text("old\n", encoding="utf-8")
    here = plant(more=(f"password_file {passwords}",))
    mes = here.mes()
    station = here.station(consumers=("mes",), username="station", password_file=password)
    station.inspect(10)
    wait_until(lambda: station.outbox.waiting == 0)
    give("new")
    here.broker.kill()
    here.broker.start()
    wait_until(lambda: "refused" in caplog.text)
    station.inspect(10)
    password.write_text("new\n", encoding="utf-8")
    wait_until(lambda: station.outbox.waiting == 0)
    assert mes.seqs == list(range(1, 21))
