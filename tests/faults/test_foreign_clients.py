"""Verdicts and heatmaps as MQTT 5 clients that are not ours read them, from a real station through a real broker."""

import functools
import hashlib
import json
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from agent.clock import Stamp
from agent.mqtt.publisher import MqttPublisher, MqttSettings, outbox_consumers
from agent.outbox.outbox import Outbox, OutboxSettings
from agent.publishing.messages import Origin, heatmap_payload, new_id, verdict_message
from agent.verdict import Outcome, Reason, Region, Verdict
from tests.broker import Mosquitto, wait_until
from tests.node import QUIET, apt_install, lacking, start_node
from tests.schemas import closed, faults, schema

ROOT = "acme/plant1/hall2/line3/cell7"
ORIGIN = Origin("cell7", new_id(), "bottle", "d" * 64, "onnx", simulated=True, on_no_verdict="reject")
MQTT_JS = "mqtt@5.16.0"
PARTS = 3

pytestmark = pytest.mark.broker


@functools.cache
def mosquitto_sub():
    """Return the path of mosquitto_sub, installed on the spot where we may."""
    if shutil.which("mosquitto_sub") is None:
        apt_install("mosquitto-clients")
    return shutil.which("mosquitto_sub") or lacking(
        "mosquitto_sub is not installed: run `apt-get install mosquitto-clients`"
    )


@pytest.fixture
def broker(tmp_path):
    folder = tmp_path / "broker"
    folder.mkdir()
    one = Mosquitto(folder).start()
    yield one
    one.stop()


@pytest.fixture
def station(tmp_path, broker):
    """Returns a function that stores three parts with their heatmaps and starts a publisher.

    It returns the outbox and, by seq, the messages as they were stored.
    """
    opened = []

    def start(*consumers):
        outbox = Outbox(OutboxSettings(tmp_path / "outbox", reserve_mb=0.0), "cell7")
        settings = MqttSettings(topic=ROOT, port=broker.port, consumers=consumers)
        outbox.set_consumers(outbox_consumers(settings))
        publisher = MqttPublisher(settings, ORIGIN, outbox)
        opened.append((publisher, outbox))
        stored = outbox.store([part(number) for number in range(1, PARTS + 1)])
        publisher.start()
        return outbox, {message["seq"]: message for message in stored}

    yield start
    for publisher, outbox in opened:
        publisher.stop(2.0)
        outbox.close()


def part(number):
    """A verdict with what other languages may stumble over, and its heatmap."""
    anomaly_map = np.random.default_rng(number).random((64, 48), np.float32)
    heatmap = heatmap_payload(anomaly_map, 0.5)
    verdict = Verdict(
        trigger_id=number,
        outcome=Outcome.REJECT,
        reason=Reason.SCORE,
        detail='Kratzer am Boden: „tief“, 0,3 mm; "quoted" \\ and a tab\t',
        part_id=f"Größe {number} 部品 🙂",
        score=1.7976931348623157e308,
        threshold=0.1 + 0.2,
        regions=(Region(1.5, 2.25, 3, 4, 9, float("inf")),),
        latency_ms=31.5,
    )
    return verdict_message(verdict, ORIGIN, Stamp(datetime.now(UTC), 1000.0 * number), heatmap), heatmap


def check(received, stored):
    """What came is what was stored: verdicts by their JSON, heatmaps by the digest in the verdict."""
    verdicts = {item["message"]["seq"]: item for item in received if item["topic"] == f"{ROOT}/verdict"}
    assert {seq: item["message"] for seq, item in verdicts.items()} == stored
    assert {item["contentType"] for item in verdicts.values()} == {"application/json"}
    assert all(faults(item["message"], closed(schema("verdict"))) == [] for item in verdicts.values())
    pictures = {item["topic"]: item for item in received if "/heatmap/" in item["topic"]}
    links = [message["heatmap"] for message in stored.values()]
    assert {topic: item["sha256"] for topic, item in pictures.items()} == {
        f"{ROOT}/{link['topic']}": link["sha256"] for link in links
    }
    assert {item["contentType"] for item in pictures.values()} == {link["contentType"] for link in links}
    assert all(3500 <= item["expiry"] <= 3600 for item in pictures.values())


def by_mosquitto_sub(line):
    """One line of mosquitto_sub: topic, content type, expiry, payload in hex."""
    topic, content_type, expiry, digits = line.split("|")
    payload = bytes.fromhex(digits)
    return {
        "topic": topic,
        "contentType": content_type,
        "expiry": int(expiry) if expiry else None,
        "sha256": hashlib.sha256(payload).hexdigest(),
        "message": json.loads(payload) if topic.endswith("/verdict") else None,
    }


def test_mosquitto_sub_reads_verdicts_and_heatmaps(tmp_path, broker, station):
    command = [mosquitto_sub(), "-V", "5", "-p", str(broker.port), "-q", "1", "-i", "display", "-C", str(2 * PARTS)]
    command += ["-W", "15", "-t", f"{ROOT}/verdict", "-t", f"{ROOT}/heatmap/+", "-F", "%t|%C|%E|%x"]
    printed = tmp_path / "printed"
    with printed.open("wb") as file:
        client = subprocess.Popen(command, **{**QUIET, "stdout": file})
        try:
            _, stored = station()
            assert client.wait(20) == 0
        finally:
            client.kill()
            client.wait()
    check([by_mosquitto_sub(line) for line in printed.read_text(encoding="utf-8").splitlines()], stored)


def test_a_consumer_in_another_language_reads_all_and_its_acknowledgement_empties_the_outbox(tmp_path, broker, station):
    printed = tmp_path / "printed"
    script = Path(__file__).parent / "foreign_client.cjs"
    with printed.open("wb") as file:
        arguments = (str(broker.port), ROOT, "mes", str(2 * PARTS))
        client = start_node(script, *arguments, package=MQTT_JS, stdout=file)
        try:
            outbox, stored = station("mes")
            wait_until(lambda: client.poll() is not None, timeout_s=20)
        finally:
            client.kill()
            client.wait()
    check([json.loads(line) for line in printed.read_text(encoding="utf-8").splitlines()], stored)
    wait_until(lambda: outbox.waiting == 0)
