import io
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion
from rich.console import Console

from agent.clock import Stamp
from agent.errors import BrokerError
from agent.mqtt.publisher import MqttPublisher, MqttSettings, outbox_consumers
from agent.outbox.outbox import Outbox, OutboxSettings
from agent.publishing.messages import Origin, new_id, verdict_message
from agent.publishing.publisher import Undelivered
from agent.verdict import Outcome, Reason, Region, Verdict
from agent.watch import read_row, watch
from tests.broker import Consumer, free_port, wait_until
from tests.verdicts import NOON, sent

ROOT = "acme/plant1/hall2/line3/cell7"
PROJECT = Path(__file__).parents[2]
ORIGIN = Origin("cell7", new_id(), "bottle", "d" * 64, "onnx", simulated=True, on_no_verdict="reject")
needs_broker = pytest.mark.broker


def three_outcomes():
    region = Region(x_px=120, y_px=84, width_px=9, height_px=9, area_px=50, peak=12.5)
    rejected = Verdict(
        2,
        Outcome.REJECT,
        Reason.SCORE,
        "unlike good parts at x 124, y 88 px",
        part_id="S/N \x1b[2J",
        score=9.0,
        threshold=0.5,
        regions=(region,),
    )
    late = Verdict(3, Outcome.NO_VERDICT, Reason.LATE, detail="210 ms, 200 allowed")
    verdicts = [Verdict(1, Outcome.PASS, Reason.SCORE, score=0.25, threshold=0.5, latency_ms=31.5), rejected, late]
    return [sent(verdict, ORIGIN, verdict.trigger_id) for verdict in verdicts]


def bad_payloads(good):
    deep = b"[" * 60_000
    return [
        b"\xff\x00",
        b"[]",
        b"{}",
        deep,
        b'{"schema": "taktsight.verdict/1"}',
        json.dumps({**good, "seq": "x"}).encode(),
        json.dumps({**good, "outcome": ["pass"]}).encode(),
        json.dumps({**good, "score": "high"}).encode(),
        json.dumps({**good, "score": 10**400}).encode(),
        json.dumps({key: value for key, value in {**good, "outcome": "reject"}.items() if key != "detail"}).encode(),
    ]


def watched(port, payloads, *, console, count=3):
    """What watch() returns while the payloads come again and again: duplicates all the way."""
    sender = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv311)
    sender.connect("127.0.0.1", port)
    sender.loop_start()
    ended = threading.Event()

    def send():
        while not ended.wait(0.05):
            for payload in payloads:
                sender.publish(f"{ROOT}/verdict", payload, qos=1)

    sending = threading.Thread(target=send)
    sending.start()
    try:
        return watch(MqttSettings(topic=ROOT, port=port, protocol=3), count=count, timeout_s=8.0, console=console)
    finally:
        ended.set()
        sending.join()
        sender.disconnect()
        sender.loop_stop()


@needs_broker
def test_watch_prints_one_aligned_line_per_part_and_each_part_once(broker):
    page = io.StringIO()
    good = three_outcomes()
    payloads = [json.dumps(message).encode() for message in good for _ in range(2)]
    assert watched(broker.port, payloads, console=Console(file=page, width=80)) == good
    head, *lines = page.getvalue().splitlines()
    assert len(lines) == 3
    assert [line[head.index("outcome") :].split("  ")[0] for line in lines] == ["PASS", "REJECT", "NO VERDICT"]
    assert lines[1].startswith("S/N ?[2J")
    assert lines[1].endswith("unlike good parts at x 124, y 88 px")
    assert lines[2].endswith("late: 210 ms, 200 allowed")


@needs_broker
def test_watch_warns_of_what_it_cannot_read_and_goes_on(broker):
    page = io.StringIO()
    good = three_outcomes()
    bad = bad_payloads(good[0])
    assert watched(broker.port, [*bad, json.dumps(good[0]).encode()], console=Console(file=page), count=1) == good[:1]
    assert page.getvalue().count("warning: unreadable message") >= len(bad)


@needs_broker
def test_watch_draws_a_coloured_table_in_a_terminal(broker):
    page = io.StringIO()
    payloads = [json.dumps(message).encode() for message in [*three_outcomes(), {"schema": "other"}]]
    terminal = Console(file=page, force_terminal=True, width=120, height=30, color_system="standard", _environ={})
    assert len(watched(broker.port, payloads, console=terminal)) == 3
    assert "\x1b[1;32mPASS" in page.getvalue()
    assert "\x1b[1;31mREJECT" in page.getvalue()
    assert "\x1b[1;33mNO VERDICT" in page.getvalue()
    assert "S/N ?[2J" in page.getvalue()


@needs_broker
def test_watch_returns_what_came_when_its_time_is_over(broker):
    began_s = time.monotonic()
    settings = MqttSettings(topic=ROOT, port=broker.port)
    assert watch(settings, count=1, timeout_s=0.5, console=Console(file=io.StringIO())) == []
    assert time.monotonic() - began_s < 1.0


def test_watch_says_that_no_broker_was_found():
    settings = MqttSettings(topic=ROOT, port=free_port())
    with pytest.raises(BrokerError, match="no broker at"):
        watch(settings, count=1, timeout_s=0.2, console=Console(file=io.StringIO()))


def test_the_demo_broker_carries_verdicts_and_ends_when_asked(tmp_path):
    pytest.importorskip("amqtt", reason="amqtt is not installed: run `pip install taktsight[demo]`")
    port = free_port()
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, str(PROJECT / "demo" / "broker.py"), str(port)], **quiet) as process:
        assert process.stdout.readline() == b"ready\n"
        mes = Consumer(port, f"{ROOT}/#", protocol=3)
        settings = MqttSettings(topic=ROOT, port=port, protocol=3)
        outbox = Outbox(OutboxSettings(tmp_path), "cell7")
        outbox.set_consumers(outbox_consumers(settings))
        station = MqttPublisher(settings, ORIGIN, outbox)
        station.start()
        verdicts = [Verdict(seq, Outcome.NO_VERDICT, Reason.LATE) for seq in (1, 2, 3)]
        outbox.store([(verdict_message(verdict, ORIGIN, Stamp(NOON, 0.0)), None) for verdict in verdicts])
        station.wake()
        assert station.stop(8.0) == Undelivered(verdicts=0, heatmaps=0)
        wait_until(lambda: [json.loads(item.payload)["seq"] for item in mes.on("/verdict")] == [1, 2, 3])
        wait_until(lambda: json.loads(mes.on("/status")[-1].payload)["state"] == "stopped")
        mes.stop()
        outbox.close()
        process.send_signal(signal.SIGTERM)
        _, complaints = process.communicate(timeout=5)
        assert (process.returncode, complaints) == (0, b"")


@pytest.mark.parametrize(
    ("reason", "detail", "cause"),
    [
        (Reason.LATE, "210 ms, 200 allowed", "late: 210 ms, 200 allowed"),
        (Reason.SATURATED, "saturated: 12 % of the part is white", "saturated: 12 % of the part is white"),
    ],
)
def test_a_reason_that_its_detail_begins_with_is_said_once(reason, detail, cause):
    message = sent(Verdict(1, Outcome.NO_VERDICT, reason, detail), ORIGIN, 1)
    assert read_row(message).cause == cause
