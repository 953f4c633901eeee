import gc
import hashlib
import json
import logging
import shutil
import subprocess
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from agent.messages import Origin, heatmap_payload, new_epoch, status_message, verdict_message
from agent.mqtt import MqttPublisher, MqttSettings
from agent.publisher import Undelivered
from agent.verdict import Outcome, Reason, Verdict
from tests.broker import Cable, Consumer, Mosquitto, free_port, wait_until

ROOT = "acme/plant1/hall2/line3/cell7"
PROJECT = Path(__file__).parents[2]
SCHEMA = json.loads((PROJECT / "agent" / "verdict.schema.json").read_text(encoding="utf-8"))
HEATMAP = heatmap_payload(np.linspace(0, 2, 64 * 64, dtype=np.float32).reshape(64, 64), 1.0)
ORIGIN = Origin("cell7", new_epoch(), "bottle", "d" * 64, "onnx", simulated=True, on_no_verdict="reject")
needs_broker = pytest.mark.broker


@pytest.fixture(autouse=True)
def impatience(monkeypatch):
    """Tries a lost connection again after 0.2 s and not 1 s, so that the tests are soon over."""
    monkeypatch.setattr("agent.mqtt_client.RECONNECT_MIN_S", 0.2)


@pytest.fixture
def new_broker(tmp_path):
    """Returns a function that makes a broker, not yet started; every one is stopped in the end."""
    made = []

    def make(**options):
        made.append(Mosquitto(tmp_path, **options))
        return made[-1]

    yield make
    for one in made:
        one.stop()


@pytest.fixture
def broker(new_broker):
    return new_broker().start()


@pytest.fixture
def publisher(new_broker):
    """Returns a function that starts a publisher; every one is stopped in the end."""
    started = []

    def start(port, **settings):
        started.append(MqttPublisher(MqttSettings(topic=ROOT, port=port, **settings), ORIGIN))
        started[-1].start()
        return started[-1]

    yield start
    for one in started:
        one.stop(0.0)


@pytest.fixture
def consumer(new_broker):
    """Returns a function that starts a consumer of the whole station; every one is stopped in the end."""
    started = []

    def start(port, **options):
        started.append(Consumer(port, f"{ROOT}/#", **options))
        return started[-1]

    yield start
    for one in started:
        one.stop()


def publish(publisher, numbers, *, heatmap=None):
    for seq in numbers:
        verdict = Verdict(seq, Outcome.PASS, Reason.SCORE, score=0.25, threshold=0.5, latency_ms=31.5)
        message = verdict_message(verdict, ORIGIN, seq=seq, created_utc=datetime.now(UTC), heatmap=heatmap)
        publisher.publish_verdict(message, heatmap)


def verdict_seqs(consumer):
    return [json.loads(item.payload)["seq"] for item in consumer.on("/verdict")]


def states(consumer):
    return [json.loads(item.payload)["state"] for item in consumer.on("/status")]


def last_status(consumer):
    return json.loads(consumer.on("/status")[-1].payload)


@needs_broker
def test_a_verdict_arrives_with_qos_1_and_validates_against_the_schema(broker, publisher, consumer):
    mes, station = consumer(broker.port), publisher(broker.port)
    publish(station, [1], heatmap=HEATMAP)
    assert station.stop(5.0) == Undelivered(verdicts=0, heatmaps=0)
    wait_until(lambda: mes.on("/verdict"))
    arrived = mes.on("/verdict")[0]
    assert (arrived.qos, arrived.retain) == (1, False)
    assert arrived.properties.ContentType == "application/json"
    Draft202012Validator(SCHEMA).validate(json.loads(arrived.payload))


@needs_broker
def test_a_heatmap_arrives_on_the_topic_and_with_the_digest_that_the_verdict_names(broker, publisher, consumer):
    mes, station = consumer(broker.port), publisher(broker.port)
    publish(station, [17], heatmap=HEATMAP)
    wait_until(lambda: mes.on("/heatmap/") and mes.on("/verdict"))
    picture, link = mes.on("/heatmap/")[0], json.loads(mes.on("/verdict")[0].payload)["heatmap"]
    assert picture.topic == f"{ROOT}/{link['topic']}" == f"{ROOT}/heatmap/17"
    assert hashlib.sha256(picture.payload).hexdigest() == link["sha256"]
    assert picture.properties.ContentType == link["contentType"]
    assert 3590 <= picture.properties.MessageExpiryInterval <= 3600


@needs_broker
def test_a_station_without_heatmaps_sends_none_and_links_to_none(broker, publisher, consumer):
    mes, station = consumer(broker.port), publisher(broker.port, heatmaps=False)
    publish(station, [1], heatmap=HEATMAP)
    station.stop(5.0)
    wait_until(lambda: mes.on("/verdict") and "stopped" in states(mes))
    assert json.loads(mes.on("/verdict")[0].payload)["heatmap"] is None
    assert mes.on("/heatmap/") == []


@needs_broker
@pytest.mark.parametrize("protocol", [5, 3])
def test_status_alone_is_retained_and_a_clean_stop_leaves_stopped(broker, publisher, consumer, protocol):
    station = publisher(broker.port, protocol=protocol)
    station.publish_status(status_message(ORIGIN, "running", counters={"parts": 2}))
    publish(station, [1, 2], heatmap=HEATMAP)
    assert station.stop(5.0) == Undelivered(verdicts=0, heatmaps=0)
    latecomer = consumer(broker.port, protocol=protocol)
    wait_until(lambda: latecomer.received)
    status = last_status(latecomer)
    assert len(latecomer.received) == 1
    assert (status["state"], status["counters"], status["undelivered"]) == ("stopped", {"parts": 2}, 0)
    assert status["delivery"]["confirmed"] == 2


@needs_broker
@pytest.mark.parametrize("protocol", [5, 3])
def test_the_last_will_says_offline_and_the_status_returns_with_the_connection(broker, publisher, consumer, protocol):
    mes, cable = consumer(broker.port, protocol=protocol), Cable(broker.port)
    station = publisher(cable.port, protocol=protocol)
    station.publish_status(status_message(ORIGIN, "running"))
    wait_until(lambda: "running" in states(mes))
    cable.cut()
    wait_until(lambda: states(mes)[-2:] == ["offline", "running"])
    cable.remove()
    wait_until(lambda: states(mes)[-1] == "offline")


@needs_broker
def test_what_was_inspected_while_the_broker_was_absent_arrives_in_order(new_broker, publisher, consumer):
    broker = new_broker()
    station = publisher(broker.port)
    began_s = time.monotonic()
    publish(station, range(1, 301))
    assert time.monotonic() - began_s < 1.0
    broker.start()
    mes = consumer(broker.port)
    publish(station, range(301, 401))
    wait_until(lambda: len(verdict_seqs(mes)) >= 400)
    assert verdict_seqs(mes) == list(range(1, 401))


@needs_broker
@pytest.mark.parametrize("protocol", [5, 3])
def test_nothing_is_missing_after_the_broker_was_killed_and_started_again(new_broker, publisher, consumer, protocol):
    remembers_subscriptions = ("persistence true", "autosave_on_changes true", "autosave_interval 1")
    broker = new_broker(lines=remembers_subscriptions).start()
    mes = consumer(broker.port, protocol=protocol)
    station = publisher(broker.port, protocol=protocol)
    publish(station, range(1, 101))
    wait_until(lambda: len(verdict_seqs(mes)) == 100)
    broker.freeze()  # a broker loses what it confirmed and did not pass on before a kill: let it confirm nothing
    publish(station, range(101, 201))
    time.sleep(0.05)
    broker.kill()
    publish(station, range(201, 301))
    broker.start()
    publish(station, range(301, 401))
    wait_until(lambda: set(verdict_seqs(mes)) == set(range(1, 401)))
    once = list(dict.fromkeys(verdict_seqs(mes)))
    assert once == sorted(once)
    assert station.stop(5.0).verdicts == 0


@needs_broker
def test_a_connection_cut_again_and_again_costs_duplicates_at_most(broker, publisher, consumer):
    mes, cable = consumer(broker.port), Cable(broker.port)
    station = publisher(cable.port)
    for seq in range(1, 601):
        publish(station, [seq])
        if seq % 200 == 100:
            cable.cut()
        time.sleep(0.003)
    assert station.stop(8.0).verdicts == 0
    wait_until(lambda: set(verdict_seqs(mes)) == set(range(1, 601)))
    once = list(dict.fromkeys(verdict_seqs(mes)))
    assert once == sorted(once)
    cable.remove()


@needs_broker
def test_a_message_that_the_access_list_denies_is_counted_and_alarmed(
    tmp_path, new_broker, publisher, consumer, caplog
):
    access = tmp_path / "access"
    access.write_text(f"topic readwrite {ROOT}/status\ntopic read {ROOT}/#\n", encoding="utf-8")
    broker = new_broker(lines=(f"acl_file {access}",)).start()
    mes, station = consumer(broker.port), publisher(broker.port)

    with caplog.at_level(logging.ERROR):
        publish(station, range(1, 4))
        wait_until(lambda: mes.on("/status") and last_status(mes)["undelivered"] >= 1)
        assert station.stop(5.0).verdicts == 3
    wait_until(lambda: last_status(mes)["undelivered"] == last_status(mes)["delivery"]["refused"] == 3)
    assert "refused by the broker" in caplog.text
    assert "Not authorized" in caplog.text


@needs_broker
def test_a_verdict_without_any_subscriber_is_sent_and_counted_apart(broker, publisher, consumer):
    station = publisher(broker.port)
    publish(station, range(1, 6))
    assert station.stop(5.0).verdicts == 0
    latecomer = consumer(broker.port)
    wait_until(lambda: latecomer.received)
    assert last_status(latecomer)["delivery"]["noSubscribers"] == 5


@needs_broker
def test_a_message_larger_than_the_broker_takes_is_refused_and_the_next_ones_flow(
    new_broker, publisher, consumer, caplog
):
    broker = new_broker(lines=("max_packet_size 2500",)).start()
    mes, station = consumer(broker.port), publisher(broker.port)
    noise = heatmap_payload(np.random.default_rng(0).random((256, 256), np.float32), 0.5)
    publish(station, range(1, 4), heatmap=noise)
    assert station.stop(5.0) == Undelivered(verdicts=0, heatmaps=3)
    wait_until(lambda: verdict_seqs(mes) == [1, 2, 3])
    assert "the broker takes 2500" in caplog.text


@needs_broker
def test_a_full_memory_sheds_heatmaps_first_and_counts_every_verdict_it_loses(new_broker, publisher, consumer, caplog):
    broker = new_broker()
    station = publisher(broker.port, max_waiting_verdicts=20)
    publish(station, range(1, 16), heatmap=HEATMAP)
    wait_until(lambda: "10 heatmaps shed" in caplog.text or "heatmaps shed" in caplog.text)
    assert "verdicts lost" not in caplog.text
    publish(station, range(16, 26), heatmap=HEATMAP)
    mes = consumer(broker.start().port)
    wait_until(lambda: verdict_seqs(mes) == list(range(6, 26)))
    assert mes.on("/heatmap/") == []
    assert station.stop(5.0) == Undelivered(verdicts=5, heatmaps=25)
    wait_until(lambda: "stopped" in states(mes))
    status = last_status(mes)
    assert (status["undelivered"], status["delivery"]["lost"]) == (5, 5)
    assert status["delivery"]["heatmapsShed"] == 25


def test_stop_reports_what_waits_for_an_absent_broker_within_its_timeout(publisher):
    station = publisher(free_port())
    publish(station, range(1, 8), heatmap=HEATMAP)
    began_s = time.monotonic()
    assert station.stop(0.5) == Undelivered(verdicts=7, heatmaps=7)
    assert 0.3 < time.monotonic() - began_s < 0.6
    assert station.stop(0.5) == Undelivered(verdicts=7, heatmaps=7)


def test_stop_returns_at_once_where_nothing_waits_for_the_absent_broker(publisher):
    station = publisher(free_port())
    began_s = time.monotonic()
    assert station.stop(5.0) == Undelivered(verdicts=0, heatmaps=0)
    assert time.monotonic() - began_s < 1.6


@needs_broker
def test_stop_keeps_its_timeout_when_the_broker_is_frozen(broker, publisher, consumer):
    mes, station = consumer(broker.port), publisher(broker.port)
    publish(station, [1])
    wait_until(lambda: verdict_seqs(mes) == [1])
    broker.freeze()
    publish(station, range(2, 100), heatmap=HEATMAP)
    began_s = time.monotonic()
    assert station.stop(0.6) == Undelivered(verdicts=98, heatmaps=98)
    assert time.monotonic() - began_s < 0.75


@needs_broker
def test_a_wrong_password_is_an_alarm_and_inspection_goes_on(tmp_path, new_broker, publisher, caplog):
    passwords = tmp_path / "passwords"
    passwords.write_text("station:plain\n", encoding="utf-8")
    broker = new_broker(lines=(f"password_file {passwords}",), anonymous=False).start()
    password = tmp_path / "password"
    password.write_text("wrong\n", encoding="utf-8")
    station = publisher(broker.port, username="station", password_file=password)
    publish(station, [1])
    wait_until(lambda: "refused" in caplog.text)
    assert [record.levelname for record in caplog.records if "refused" in record.message] == ["ERROR"]
    assert station.stop(0.2).verdicts == 1


@needs_broker
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # paho forgets a refused TLS socket
def test_a_station_shows_its_certificate_and_checks_the_brokers(tmp_path, new_broker, publisher):
    make_certificates(tmp_path)
    lines = (
        f"cafile {tmp_path}/authority.crt",
        f"certfile {tmp_path}/broker.crt",
        f"keyfile {tmp_path}/broker.key",
        "require_certificate true",
    )
    broker = new_broker(lines=lines).start()
    ca, cert, key = (tmp_path / name for name in ("authority.crt", "station.crt", "station.key"))
    station = publisher(broker.port, ca_file=ca, cert_file=cert, key_file=key)
    publish(station, range(1, 21))
    assert station.stop(8.0).verdicts == 0
    stranger = publisher(broker.port, ca_file=cert)
    publish(stranger, [1])
    assert stranger.stop(0.5).verdicts == 1
    wait_until(lambda: not [thread for thread in threading.enumerate() if "paho" in thread.name])
    gc.collect()


def make_certificates(folder):
    """Write a certificate authority, and a broker's and a station's certificate by it, into folder."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed: run `apt-get install openssl`")

    def openssl(*arguments):
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, timeout=20, **quiet)

    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *new_key, "-keyout", "authority.key", "-out", "authority.crt", "-subj", "/CN=plant")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n", encoding="utf-8")
    signed_by = ("-CA", "authority.crt", "-CAkey", "authority.key", "-CAcreateserial", "-extfile", "names")
    for name in ("broker", "station"):
        openssl("req", *new_key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        openssl("x509", "-req", "-in", f"{name}.csr", *signed_by, "-out", f"{name}.crt", "-days", "1")
