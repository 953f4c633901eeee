import io
import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import paho.mqtt.client as mqtt
import pytest
from click.testing import CliRunner
from paho.mqtt.enums import CallbackAPIVersion
from rich.console import Console

from agent.__main__ import commands
from agent.clock import Stamp
from agent.errors import BrokerError
from agent.mqtt.publisher import MqttPublisher, MqttSettings, outbox_consumers
from agent.outbox.outbox import Outbox, OutboxSettings
from agent.publishing.messages import Alarm, Origin, new_id, status_message, verdict_message
from agent.publishing.publisher import Undelivered
from agent.verdict import Outcome, Reason, Region, Verdict
from agent.watch import LiveLines, read_row, read_status, watch
from agent.watch_subscription import Backlog, Gate
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


@pytest.mark.parametrize("value", ["nan", "inf", "1e999", "-1"])
def test_a_timeout_that_is_no_time_is_wrong_usage(value):
    answer = CliRunner().invoke(commands, ["watch", ROOT, f"--timeout={value}"])
    assert (answer.exit_code, "Invalid value for '--timeout'" in answer.output) == (2, True)


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


def test_watch_says_with_which_protocol_to_ask_a_broker_that_speaks_the_other_one():
    pytest.importorskip("amqtt", reason="amqtt is not installed: run `pip install taktsight[demo]`")
    port = free_port()
    program = [sys.executable, str(PROJECT / "demo" / "broker.py"), str(port)]
    with subprocess.Popen(program, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        with pytest.raises(BrokerError, match="Unsupported protocol version: ask with --protocol 3"):
            watch(MqttSettings(topic=ROOT, port=port), count=1, timeout_s=8.0, console=Console(file=io.StringIO()))
        process.send_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("reason", "detail", "cause"),
    [
        (Reason.LATE, "210 ms, 200 allowed", "late: 210 ms, 200 allowed"),
        (Reason.TOO_DARK, "", "too_dark"),
    ],
)
def test_a_part_that_was_not_judged_says_why(reason, detail, cause):
    message = sent(Verdict(1, Outcome.NO_VERDICT, reason, detail), ORIGIN, 1)
    assert read_row(message).cause == cause


def status(state="running", *, alarms=(), **waiting):
    message = status_message(ORIGIN, state, alarms=alarms, created_utc=NOON)
    consumers = {name: {"acknowledged": 0, "waiting": number} for name, number in waiting.items()}
    return message if state == "offline" else {**message, "consumers": consumers}


@needs_broker
def test_watch_says_how_the_station_does_before_any_verdict_comes(broker, monkeypatch):
    monkeypatch.setattr("agent.watch.PATIENCE_S", 0.3)
    page = io.StringIO()
    alarm = Alarm("score_drift", "look at the lamp \x1b[2J")
    sender = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
    sender.connect("127.0.0.1", broker.port)
    sender.loop_start()
    said = iter([status("ready"), *[status(alarms=[alarm], mes=5, erp=2)] * 3, status(mes=5, erp=0), status("offline")])
    due_s = 0.0

    def say_one_now_and_then():
        nonlocal due_s
        if time.monotonic() < due_s:
            return False
        due_s = time.monotonic() + 0.3
        message = next(said, None)
        if message is not None:
            sender.publish(f"{ROOT}/status", json.dumps(message), qos=1, retain=True)
        return message is None

    settings = MqttSettings(topic=ROOT, port=broker.port)
    watch(settings, count=1, timeout_s=15.0, console=Console(file=page), give_up=say_one_now_and_then)
    sender.disconnect()
    sender.loop_stop()
    assert [line for line in page.getvalue().splitlines()[1:] if "no station" not in line] == [
        "note: cell7 is ready: bottle",
        "note: cell7 is running: bottle",
        "note: alarm score_drift: look at the lamp ?[2J",
        "note: verdicts wait at the station, not acknowledged by erp, mes: check that it runs",
        "note: cell7 is offline: killed, or cut off from the broker",
    ]


@needs_broker
def test_watch_doubts_its_topic_where_no_station_speaks(broker, monkeypatch):
    monkeypatch.setattr("agent.watch.PATIENCE_S", 0.1)
    page = io.StringIO()
    watch(MqttSettings(topic=ROOT, port=broker.port), count=1, timeout_s=1.0, console=Console(file=page))
    assert [line[:40] for line in page.getvalue().splitlines()[1:]] == ["note: no station speaks at acme/plant1/h"]


@needs_broker
def test_watch_says_once_that_the_broker_is_away(broker, monkeypatch):
    monkeypatch.setattr("agent.watch.PATIENCE_S", 0.1)
    page = io.StringIO()
    broker.kill()
    settings = MqttSettings(topic=ROOT, port=broker.port)
    with pytest.raises(BrokerError, match="no broker at"):
        watch(settings, count=1, timeout_s=0.6, console=Console(file=page))
    assert page.getvalue().splitlines()[1:] == [f"note: no broker answers at 127.0.0.1:{broker.port} yet: trying again"]


@pytest.fixture
def unheard(broker, tmp_path, monkeypatch):
    """The outbox of a station without consumers that has told of 20 verdicts, which nobody listens for."""
    monkeypatch.setattr("agent.watch.PATIENCE_S", 0.3)
    monkeypatch.setattr("agent.watch_subscription.RETAINED_S", 30.0)
    settings = MqttSettings(topic=ROOT, port=broker.port)
    outbox = Outbox(OutboxSettings(tmp_path, reserve_mb=0.0), "cell7")
    outbox.set_consumers(outbox_consumers(settings))
    verdicts = [Verdict(seq, Outcome.NO_VERDICT, Reason.LATE) for seq in range(1, 21)]
    outbox.store([(verdict_message(verdict, ORIGIN, Stamp(NOON, 0.0)), None) for verdict in verdicts])
    station = MqttPublisher(settings, ORIGIN, outbox)
    station.start()
    witness = Consumer(broker.port, f"{ROOT}/status", name="witness")
    wait_until(lambda: witness.received)
    yield outbox
    witness.stop()
    station.stop(1.0)
    outbox.close()


@needs_broker
def test_watch_leaves_what_waits_for_a_subscriber_to_the_mes(broker, unheard):
    page = io.StringIO()
    settings = MqttSettings(topic=ROOT, port=broker.port)
    note = "20 verdicts wait at the station for the first who subscribes: start the MES"
    watching = {"count": 20, "timeout_s": 20.0, "console": Console(file=page)}
    assert watch(settings, give_up=lambda: note in page.getvalue(), **watching) == []
    assert unheard.waiting == 20
    mes = Consumer(broker.port, f"{ROOT}/verdict")
    wait_until(lambda: unheard.waiting == 0)
    assert len(mes.received) >= 20
    mes.stop()


@needs_broker
def test_watch_takes_what_waits_where_it_is_told_to(broker, unheard):
    settings, console = MqttSettings(topic=ROOT, port=broker.port), Console(file=io.StringIO())
    assert len(watch(settings, count=20, timeout_s=20.0, console=console, take_waiting=True)) == 20


def test_watch_asks_for_verdicts_of_a_station_without_consumers_as_soon_as_somebody_has_them():
    gate = Gate(is_open=False)
    gate.note(None, is_offline=True)
    gate.note(Backlog(waiting=7, taken=0, unheard=0), is_offline=False)
    gate.note(Backlog(waiting=9, taken=5, unheard=1), is_offline=False)
    assert (gate.is_open, gate.waiting) == (False, 9)
    gate.note(Backlog(waiting=8, taken=64, unheard=1), is_offline=False)
    assert (gate.is_open, gate.waiting) == (True, 0)
    for backlog in (None, Backlog(waiting=0, taken=0, unheard=3)):
        other = Gate(is_open=False)
        other.note(backlog, is_offline=False)
        assert other.is_open


@pytest.mark.parametrize(
    "change", [{"state": "asleep"}, {"alarms": 3}, {"alarms": [{"code": "halted"}]}, {"consumers": {"mes": {}}}]
)
def test_a_status_that_cannot_be_read_is_refused(change):
    assert read_status(status(mes=1)).away == ("mes",)
    assert read_status(status(mes=5, erp=0)).away == ()
    with pytest.raises(ValueError, match=r"unknown|missing|type"):
        read_status({**status(mes=1), **change})


@pytest.mark.parametrize(("width", "height"), [(80, 24), (120, 12), (200, 60)])
def test_a_terminal_shows_every_figure_and_the_whole_cause_of_its_newest_parts(width, height):
    row = read_row(three_outcomes()[1])
    long = replace(
        row, cause="too_dark: brightness 0.012, need 0.182: check the lamp, the exposure and whatever is before it"
    )
    terminal = Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None)
    lines = LiveLines(terminal)
    lines.standing(("cell7 is running: bottle",))
    for number in range(100):
        lines.add(replace(long, trigger=str(number)))
    terminal.print(lines.picture())
    shown = terminal.file.getvalue().splitlines()
    assert 0.7 * height < len(shown) < height
    assert max(map(len, shown)) <= width
    words = " ".join(" ".join(shown).split())
    assert words.startswith("cell7 is running: bottle part trigger outcome score threshold ms cause")
    assert words.endswith(f"99 REJECT 9.000 0.500 - {long.cause}")
