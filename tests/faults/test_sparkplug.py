import gc
import json
import logging
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from agent.clock import Stamp
from agent.mqtt.client import MqttSettings
from agent.outbox.outbox import Outbox, OutboxSettings
from agent.publishing.messages import Origin, status_message, verdict_message
from agent.sparkplug.link import BirthNumbers
from agent.sparkplug.messages import REBIRTH
from agent.sparkplug.payload import DataType, Metric, Payload, decode, encode
from agent.sparkplug.publisher import BIRTH_NUMBER_FILE, CONSUMER, SparkplugPublisher, SparkplugSettings
from agent.verdict import Outcome, Reason, Verdict
from calibration.errors import SettingsError
from tests.broker import Cable, free_port, wait_until

ROOT = "acme/plant1/hall2/line3/cell7"
ORIGIN = Origin("cell7", "0" * 12, "bottle", "d" * 64, "onnx", simulated=True, on_no_verdict="reject")
BEGAN_UTC = datetime(2026, 11, 22, 10, tzinfo=UTC)
NODE, DEVICE = "line3", "line3/cell7"
pytestmark = pytest.mark.broker


@pytest.fixture(autouse=True)
def impatience(monkeypatch):
    """Tries a lost connection again after 0.1 s and not 1 s, so that the tests are soon over."""
    monkeypatch.setattr("agent.mqtt.client.RECONNECT_MIN_S", 0.1)
    monkeypatch.setattr("agent.mqtt.client.RECONNECT_MAX_S", 0.2)


class Host:
    """A Sparkplug host application: writes down what arrives, sends commands, says whether it is online."""

    def __init__(self, port):
        self.heard = []  # (verb, node or device, payload, qos, retained)
        self._subscribed = threading.Event()
        self._client = paho.Client(CallbackAPIVersion.VERSION2, client_id="scada", protocol=paho.MQTTv5)
        self._client.reconnect_delay_set(0.1, 0.2)
        self._client.on_connect = lambda client, *_: client.subscribe("spBv1.0/#", qos=1)
        self._client.on_subscribe = lambda *_: self._subscribed.set()
        self._client.on_message = self._on_message
        self._client.connect("127.0.0.1", port, 10)
        self._client.loop_start()
        assert self._subscribed.wait(5)

    def on(self, *verbs):
        return [item[2] for item in list(self.heard) if item[0] in verbs]

    def verbs(self):
        return [item[0] for item in list(self.heard)]

    def seqs(self):
        """Return (number, historical) of the verdicts, as they came."""
        told = [{metric.name: metric for metric in payload.metrics} for payload in self.on("DDATA")]
        return [(one["Verdict/Seq"].value, one["Verdict/Seq"].historical) for one in told if "Verdict/Seq" in one]

    def await_verdicts(self, numbers):
        wait_until(lambda: {seq for seq, _ in self.seqs()} >= set(numbers))

    def say(self, topic, payload, *, retain=False):
        self._client.publish(topic, payload, qos=1, retain=retain).wait_for_publish(5)

    def command(self, *metrics, retain=False):
        self.say("spBv1.0/plant1/NCMD/line3", encode(Payload(1, metrics)), retain=retain)

    def state(self, online, timestamp_ms):
        payload = json.dumps({"online": online, "timestamp": timestamp_ms})
        self.say("spBv1.0/STATE/scada", payload, retain=True)

    def stop(self):
        self._client.disconnect()
        self._client.loop_stop()

    def _on_message(self, _client, _userdata, message):
        namespace, group, verb, *who = message.topic.split("/")
        if (namespace, group) == ("spBv1.0", "plant1") and verb != "NCMD":
            self.heard.append((verb, "/".join(who), decode(message.payload), message.qos, message.retain))


@pytest.fixture
def new_host():
    made = []

    def make(port):
        made.append(Host(port))
        return made[-1]

    yield make
    for one in made:
        one.stop()


@pytest.fixture
def host(broker, new_host):
    return new_host(broker.port)


@pytest.fixture
def outbox(tmp_path):
    made = Outbox(OutboxSettings(tmp_path / "outbox", reserve_mb=0.1), "cell7")
    made.set_consumers([CONSUMER])
    yield made
    made.close()


@pytest.fixture
def station(tmp_path, outbox):
    """Returns a function that starts a publisher of the outbox; every one is stopped in the end."""
    started = []

    def start(port, *, protocol=5, primary_host=None, **rest):
        mqtt = MqttSettings(topic=ROOT, port=port, protocol=protocol, **rest)
        settings = SparkplugSettings("plant1", "line3", "cell7", primary_host)
        started.append(SparkplugPublisher(mqtt, settings, outbox, tmp_path))
        started[-1].start()
        return started[-1]

    yield start
    for one in started:
        one.stop(0.0)


def store(outbox, count, *publishers):
    """Store verdicts on the parts that came one second after the other."""
    parts = range(outbox.last_seq + 1, outbox.last_seq + count + 1)
    verdicts = [Verdict(part, Outcome.PASS, Reason.SCORE, score=0.25, threshold=0.5) for part in parts]
    stamps = [Stamp(BEGAN_UTC + timedelta(seconds=part), part * 1000.0) for part in parts]
    batch = [(verdict_message(*pair), None) for pair in zip(verdicts, [ORIGIN] * count, stamps, strict=True)]
    outbox.store(batch)
    for publisher in publishers:
        publisher.wake()


def values(payload):
    return {metric.name: metric.value for metric in payload.metrics}


def bdseq(payload):
    return values(payload)["bdSeq"]


def test_a_connection_begins_with_both_births_and_then_tells_every_verdict(broker, host, outbox, station):
    sparkplug = station(broker.port)
    sparkplug.publish_status(status_message(ORIGIN, "running"))
    wait_until(lambda: "DBIRTH" in host.verbs())
    store(outbox, 2, sparkplug)
    host.await_verdicts([1, 2])
    births = [item for item in host.heard if item[0] in ("NBIRTH", "DBIRTH")]
    assert [(verb, who, qos, retained) for verb, who, _, qos, retained in births] == [
        ("NBIRTH", NODE, 0, False),
        ("DBIRTH", DEVICE, 0, False),
    ]
    node, device = (item[2] for item in births)
    assert (node.seq, device.seq, values(node)) == (0, 1, {"bdSeq": 0, REBIRTH: False})
    told = [payload for payload in host.on("DDATA") if "Verdict/Seq" in values(payload)]
    assert {metric.name for payload in told for metric in payload.metrics} <= set(values(device))
    assert all(metric.datatype is not None for metric in device.metrics)
    assert all(metric.datatype is None for payload in told for metric in payload.metrics)
    assert [values(payload)["Verdict/Outcome"] for payload in told] == ["pass", "pass"]
    created_ms = [payload.metrics[0].timestamp_ms for payload in told]
    assert created_ms == [int((BEGAN_UTC + timedelta(seconds=part)).timestamp() * 1000) for part in (1, 2)]
    assert host.seqs() == [(1, False), (2, False)]


def test_sequence_numbers_count_to_255_and_then_from_0_again(broker, host, outbox, station):
    sparkplug = station(broker.port)
    wait_until(lambda: "DBIRTH" in host.verbs())
    for _ in range(6):
        store(outbox, 50, sparkplug)
    host.await_verdicts(range(1, 301))
    seqs = [payload.seq for payload in host.on("NBIRTH", "DBIRTH", "DDATA")]
    assert seqs == [number % 256 for number in range(302)]


def test_a_verdict_leaves_the_outbox_when_the_broker_has_read_it(new_broker, outbox, station):
    broker = new_broker().start()
    sparkplug = station(broker.port)
    store(outbox, 100, sparkplug)
    wait_until(lambda: outbox.acknowledged()[CONSUMER] == 100)
    broker.freeze()
    store(outbox, 3, sparkplug)
    assert sparkplug.stop(0.4).verdicts == 3
    assert outbox.acknowledged()[CONSUMER] == 100


def test_a_status_is_told_when_it_changes_and_in_every_birth(broker, host, outbox, station):
    sparkplug = station(broker.port)
    wait_until(lambda: "DBIRTH" in host.verbs())
    sparkplug.publish_status(status_message(ORIGIN, "paused"))
    wait_until(lambda: any(values(payload).get("Station/State") == "paused" for payload in host.on("DDATA")))
    host.command(Metric(REBIRTH, DataType.BOOLEAN, True))
    wait_until(lambda: len(host.on("DBIRTH")) == 2)
    assert values(host.on("DBIRTH")[1])["Station/State"] == "paused"


@pytest.mark.parametrize("protocol", [5, 3])
def test_the_will_tells_the_death_of_a_lost_connection_with_the_number_of_its_birth(
    broker, host, station, tmp_path, protocol
):
    (tmp_path / BIRTH_NUMBER_FILE).write_text("254\n")
    cable = Cable(broker.port)
    station(cable.port, protocol=protocol)
    wait_until(lambda: "DBIRTH" in host.verbs())
    cable.cut()
    wait_until(lambda: len(host.on("DBIRTH")) == 2)
    assert [bdseq(payload) for payload in host.on("NBIRTH")] == [255, 0]
    assert [bdseq(payload) for payload in host.on("NDEATH")] == [255]
    assert host.on("NDEATH")[0].seq is None
    cable.remove()
    wait_until(lambda: len(host.on("NDEATH")) == 2)
    assert bdseq(host.on("NDEATH")[1]) == 0


@pytest.mark.parametrize("protocol", [5, 3])
def test_a_clean_stop_sends_what_waits_and_then_both_deaths(broker, host, outbox, station, protocol):
    sparkplug = station(broker.port, protocol=protocol)
    wait_until(lambda: "DBIRTH" in host.verbs())
    store(outbox, 200, sparkplug)
    assert sparkplug.stop(5.0).verdicts == 0
    wait_until(lambda: "NDEATH" in host.verbs())
    verbs = host.verbs()
    assert verbs[:204] == ["NBIRTH", "DBIRTH"] + ["DDATA"] * 200 + ["DDEATH", "NDEATH"]
    assert host.on("DDEATH")[0].seq == 202
    assert {bdseq(payload) for payload in host.on("NDEATH")} == {bdseq(host.on("NBIRTH")[0])}
    assert next(item for item in host.heard if item[0] == "NDEATH")[3] == 1


def test_a_request_for_rebirth_is_answered_with_both_births_and_the_same_number(broker, host, outbox, station):
    sparkplug = station(broker.port)
    wait_until(lambda: "DBIRTH" in host.verbs())
    store(outbox, 1, sparkplug)
    host.await_verdicts([1])
    host.command(Metric("Node Control/Reboot", DataType.BOOLEAN, True), Metric(REBIRTH, DataType.BOOLEAN, True))
    wait_until(lambda: len(host.on("DBIRTH")) == 2)
    store(outbox, 1, sparkplug)
    host.await_verdicts([2])
    assert host.verbs() == ["NBIRTH", "DBIRTH", "DDATA", "NBIRTH", "DBIRTH", "DDATA"]
    assert [payload.seq for payload in host.on("NBIRTH", "DBIRTH", "DDATA")] == [0, 1, 2, 0, 1, 2]
    assert bdseq(host.on("NBIRTH")[0]) == bdseq(host.on("NBIRTH")[1])
    assert values(host.on("DBIRTH")[1])["Verdict/Seq"] == 1
    assert host.seqs() == [(1, False), (2, False)]


def test_other_commands_and_garbage_are_ignored_and_counted(broker, host, outbox, station):
    host.command(Metric(REBIRTH, DataType.BOOLEAN, True), retain=True)
    sparkplug = station(broker.port)
    wait_until(lambda: "DBIRTH" in host.verbs())
    host.command(Metric(REBIRTH, DataType.BOOLEAN, False))
    host.command(Metric("Node Control/Next Server", DataType.BOOLEAN, True))
    for garbage in (b"", b"\xff" * 100, b"ONLINE", b"\x12\x80\x80\x80\x80\x10", bytes(70_000)):
        host.say("spBv1.0/plant1/NCMD/line3", garbage)
    wait_until(lambda: sparkplug.counters()["ignoredCommands"] == 8)
    store(outbox, 1, sparkplug)
    host.await_verdicts([1])
    assert host.verbs() == ["NBIRTH", "DBIRTH", "DDATA"]


def test_after_a_restart_of_the_broker_what_was_made_meanwhile_comes_in_order_and_as_history(
    new_broker, new_host, outbox, station
):
    broker = new_broker().start()
    host, sparkplug = new_host(broker.port), station(broker.port)
    wait_until(lambda: "DBIRTH" in host.verbs())
    store(outbox, 5, sparkplug)
    host.await_verdicts(range(1, 6))
    wait_until(lambda: outbox.acknowledged()[CONSUMER] == 5)
    broker.kill()
    store(outbox, 95, sparkplug)
    host.stop()
    broker.start()
    again = new_host(broker.port)
    again.command(Metric(REBIRTH, DataType.BOOLEAN, True))  # as a host does that missed the birth
    wait_until(lambda: outbox.acknowledged()[CONSUMER] == 100)
    store(outbox, 3, sparkplug)
    again.await_verdicts([103])
    assert [seq for seq, _ in again.seqs()] == sorted(seq for seq, _ in again.seqs())
    assert all(historical == (seq <= 100) for seq, historical in again.seqs())
    assert sparkplug.counters()["historical"] == 95
    assert bdseq(again.on("NBIRTH")[-1]) > bdseq(host.on("NBIRTH")[0])


def test_what_the_broker_had_not_read_when_the_connection_broke_is_sent_again(broker, host, outbox, station):
    cable = Cable(broker.port)
    sparkplug = station(cable.port)
    for _ in range(4):
        for _ in range(25):
            store(outbox, 3, sparkplug)
        cable.cut()
    wait_until(lambda: outbox.acknowledged()[CONSUMER] == 300)
    host.await_verdicts(range(1, 301))
    first_time = list(dict.fromkeys(seq for seq, _ in host.seqs()))
    assert first_time == sorted(first_time)
    cable.remove()


def test_verdicts_wait_while_the_primary_host_is_offline(broker, host, outbox, station, caplog):
    caplog.set_level(logging.INFO, "agent.sparkplug.publisher")
    host.state(False, 1000)
    sparkplug = station(broker.port, primary_host="scada")
    wait_until(lambda: "waiting for the primary host" in caplog.text)
    store(outbox, 3, sparkplug)
    host.say("spBv1.0/STATE/other", '{"online": true, "timestamp": 5000}')
    host.say("STATE/scada", "ONLINE")
    for no_state in ("ONLINE", '{"online": true}', '{"online": true, "timestamp": 999}'):
        host.say("spBv1.0/STATE/scada", no_state)
    wait_until(lambda: sparkplug.counters()["ignoredStates"] == 3)
    assert (host.heard, outbox.acknowledged()[CONSUMER]) == ([], 0)

    host.state(True, 2000)
    store(outbox, 1, sparkplug)
    host.await_verdicts([1, 2, 3, 4])
    assert host.seqs()[:3] == [(1, True), (2, True), (3, True)]

    host.state(False, 1999)  # the will of a connection before: not true any more
    wait_until(lambda: sparkplug.counters()["ignoredStates"] == 4)
    host.state(False, 2000)
    wait_until(lambda: "NDEATH" in host.verbs())
    assert "DDEATH" in host.verbs()
    wait_until(lambda: outbox.acknowledged()[CONSUMER] == 4)
    store(outbox, 2, sparkplug)
    assert "DBIRTH" not in host.verbs()[host.verbs().index("NDEATH") :]

    host.state(True, 3000)
    host.await_verdicts([5, 6])
    assert [(seq, historical) for seq, historical in host.seqs() if seq > 4] == [(5, True), (6, True)]
    numbers = [bdseq(payload) for payload in host.on("NBIRTH")]
    assert len(numbers) == 2
    assert numbers[0] < numbers[1]


def test_a_new_epoch_of_the_outbox_is_told_from_its_first_number(broker, host, tmp_path):
    class Replaced(Outbox):
        """An outbox whose database is found damaged, as `read` would find it."""

        def lose(self):
            self._set_aside(self._database, RuntimeError("test"))

    outbox = Replaced(OutboxSettings(tmp_path / "other", reserve_mb=0.1), "cell7")
    outbox.set_consumers([CONSUMER])
    settings = SparkplugSettings("plant1", "line3", "cell7")
    sparkplug = SparkplugPublisher(MqttSettings(topic=ROOT, port=broker.port), settings, outbox, tmp_path)
    sparkplug.start()
    try:
        store(outbox, 7, sparkplug)
        wait_until(lambda: outbox.acknowledged()[CONSUMER] == 7)
        outbox.lose()
        store(outbox, 1, sparkplug)
        wait_until(lambda: outbox.acknowledged()[CONSUMER] == outbox.last_seq < 7)
        wait_until(lambda: host.seqs() and host.seqs()[-1][0] == 2)
        missing = [values(payload) for payload in host.on("DDATA") if "Missing/First" in values(payload)]
        assert [(one["Missing/Epoch"], one["Missing/First"]) for one in missing] == [(outbox.epoch, 1)]
    finally:
        sparkplug.stop(0.0)
        outbox.close()


def test_an_outbox_that_does_not_wait_for_sparkplug_is_an_alarm_and_nothing_is_sent(
    broker, host, outbox, station, caplog
):
    outbox.set_consumers(["mes"])
    sparkplug = station(broker.port)
    store(outbox, 1, sparkplug)
    wait_until(lambda: "set_consumers comes first" in caplog.text)
    assert host.heard == []


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors as Linux shows them")
def test_a_broker_that_stays_away_costs_no_descriptors_even_without_garbage_collection(station, tmp_path):
    def attempts():
        path = tmp_path / BIRTH_NUMBER_FILE
        return int(path.read_text()) if path.exists() else -1

    gc.disable()
    try:
        station(free_port())
        wait_until(lambda: attempts() >= 1)
        before = len(list(Path("/proc/self/fd").iterdir()))
        wait_until(lambda: attempts() >= 7)
        wait_until(lambda: len(list(Path("/proc/self/fd").iterdir())) <= before + 4)  # two attempts' worth
    finally:
        gc.enable()


def test_a_stop_returns_at_once_where_no_broker_is(outbox, station):
    store(outbox, 4)
    sparkplug = station(free_port())
    wait_until(lambda: sparkplug.counters()["births"] == 0)
    began_s = time.monotonic()
    assert sparkplug.stop(5.0).verdicts == 4
    assert time.monotonic() - began_s < 3.0


def test_a_missing_certificate_is_refused_before_anything_starts(outbox, tmp_path):
    mqtt = MqttSettings(topic=ROOT, ca_file=tmp_path / "none.crt")
    with pytest.raises(SettingsError, match="ca_file"):
        SparkplugPublisher(mqtt, SparkplugSettings("plant1", "line3", "cell7"), outbox, tmp_path)


@pytest.mark.parametrize(
    ("written", "following"), [(None, 0), ("0\n", 1), ("255\n", 0), ("", 0), ("x", 0), ("\xff", 0)]
)
def test_connections_are_counted_over_restarts(tmp_path, written, following):
    path = tmp_path / BIRTH_NUMBER_FILE
    if written is not None:
        path.write_text(written, encoding="latin-1")
    assert BirthNumbers(path).next() == following
    assert BirthNumbers(path).next() == following + 1


def test_a_number_that_cannot_be_written_costs_no_connection(tmp_path, caplog):
    numbers = BirthNumbers(tmp_path / "gone" / BIRTH_NUMBER_FILE)
    assert [numbers.next(), numbers.next()] == [0, 1]
    assert "cannot be written" in caplog.text
