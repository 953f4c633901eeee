"""What a station does with brokers: absent, slow, killed, picky. Mode `broker`: no consumer acknowledges."""

import hashlib
import json
import logging
import signal
import threading
import time

import numpy as np
import pytest

from agent.publishing.messages import heatmap_payload, status_message
from agent.publishing.publisher import Incoming, Undelivered
from tests.broker import Cable, Consumer, free_port, wait_until
from tests.schemas import faults, schema
from tests.station import HEATMAP, ORIGIN, ROOT, TestStation, contents

needs_broker = pytest.mark.broker
pytestmark = pytest.mark.usefixtures("impatience")


@pytest.fixture
def station(tmp_path, new_broker):
    """Returns a function that starts a station; every one is stopped in the end."""
    started = []

    def start(port, **settings):
        started.append(TestStation(tmp_path / f"outbox{len(started)}", port, **settings))
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


def validate(name, message):
    assert faults(message, schema(name)) == []


def seqs(consumer):
    """Return the seq of every verdict and notice, in the order of arrival."""
    return [message["seq"] for message in contents([*consumer.received]) if message.get("seq")]


def first_arrivals(consumer):
    return list(dict.fromkeys(seqs(consumer)))


def states(consumer):
    return [message["state"] for message in contents(consumer.on("/status"))]


def last_status(consumer):
    return contents(consumer.on("/status"))[-1]


def alarm_codes(consumer):
    return {alarm["code"] for alarm in last_status(consumer)["alarms"]}


@needs_broker
def test_a_verdict_arrives_with_qos_1_and_validates_against_the_schema(broker, station, consumer):
    mes, cell = consumer(broker.port), station(broker.port)
    cell.inspect(1, heatmap=HEATMAP)
    assert cell.stop() == Undelivered(verdicts=0, heatmaps=0)
    wait_until(lambda: mes.on("/verdict"))
    arrived = mes.on("/verdict")[0]
    assert (arrived.qos, arrived.retain) == (1, False)
    assert arrived.properties.ContentType == "application/json"
    validate("verdict", json.loads(arrived.payload))
    for status in contents(mes.on("/status")):
        validate("status", status)


@needs_broker
def test_a_heatmap_arrives_behind_its_verdict_with_the_digest_that_the_verdict_names(broker, station, consumer):
    mes, cell = consumer(broker.port), station(broker.port)
    cell.inspect(17, heatmap=HEATMAP)
    wait_until(lambda: len(mes.on("/heatmap/")) == 17)
    topics = [item.topic.removeprefix(f"{ROOT}/") for item in mes.received]
    picture, link = mes.on("/heatmap/17")[0], json.loads(mes.on("/verdict")[16].payload)["heatmap"]
    assert topics.index(link["topic"]) > [i for i, topic in enumerate(topics) if topic == "verdict"][16]
    assert hashlib.sha256(picture.payload).hexdigest() == link["sha256"]
    assert picture.properties.ContentType == link["contentType"]
    assert 3590 <= picture.properties.MessageExpiryInterval <= 3600
    assert cell.stop() == Undelivered(verdicts=0, heatmaps=0)


@needs_broker
@pytest.mark.parametrize("protocol", [5, 3])
def test_status_alone_is_retained_and_a_clean_stop_leaves_stopped(broker, station, consumer, protocol):
    mes, cell = consumer(broker.port, protocol=protocol), station(broker.port, protocol=protocol)
    cell.publisher.publish_status(status_message(ORIGIN, "running", counters={"parts": 2}))
    cell.inspect(2, heatmap=HEATMAP)
    assert cell.stop() == Undelivered(verdicts=0, heatmaps=0)
    mes.stop()
    latecomer = consumer(broker.port, protocol=protocol, name="late")
    wait_until(lambda: latecomer.received)
    status = last_status(latecomer)
    assert len(latecomer.received) == 1
    assert (status["state"], status["counters"], status["undelivered"]) == ("stopped", {"parts": 2}, 0)
    assert status["delivery"]["confirmed"] == status["lastSeq"] == 2
    assert (status["firstSeq"], status["deliveryMode"], status["consumers"]) == (3, "broker", {})


@needs_broker
@pytest.mark.parametrize("protocol", [5, 3])
def test_the_last_will_says_offline_and_the_status_returns_with_the_connection(broker, station, consumer, protocol):
    mes, cable = consumer(broker.port, protocol=protocol), Cable(broker.port)
    cell = station(cable.port, protocol=protocol)
    cell.publisher.publish_status(status_message(ORIGIN, "running"))
    wait_until(lambda: "running" in states(mes))
    cable.cut()
    wait_until(lambda: states(mes)[-2:] == ["offline", "running"])
    cable.remove()
    wait_until(lambda: states(mes)[-1] == "offline")


@needs_broker
def test_what_was_inspected_while_the_broker_was_absent_arrives_in_order(new_broker, station, consumer):
    broker = new_broker()
    cell = station(broker.port)
    cell.inspect(300)
    broker.start()
    mes = consumer(broker.port)
    cell.inspect(100)
    wait_until(lambda: len(seqs(mes)) >= 400)
    assert first_arrivals(mes) == list(range(1, 401))


@needs_broker
@pytest.mark.parametrize("protocol", [5, 3])
def test_nothing_is_missing_after_the_broker_was_killed_and_started_again(new_broker, station, consumer, protocol):
    remembers_subscriptions = ("persistence true", "autosave_on_changes true", "autosave_interval 1")
    broker = new_broker(lines=remembers_subscriptions).start()
    mes, cell = consumer(broker.port, protocol=protocol), station(broker.port, protocol=protocol)
    cell.inspect(100)
    wait_until(lambda: len(seqs(mes)) == 100 and cell.outbox.waiting == 0)
    broker.freeze()  # a broker loses what it confirmed and did not pass on before a kill: let it confirm nothing
    cell.inspect(100)
    time.sleep(0.05)
    broker.kill()
    cell.inspect(100)
    broker.start()
    cell.inspect(100)
    wait_until(lambda: set(seqs(mes)) == set(range(1, 401)))
    assert first_arrivals(mes) == list(range(1, 401))
    assert cell.stop().verdicts == 0


@needs_broker
def test_a_connection_cut_again_and_again_costs_duplicates_at_most(broker, station, consumer):
    mes, cable = consumer(broker.port), Cable(broker.port)
    cell = station(cable.port)
    for number in range(60):
        cell.inspect(10)
        if number % 20 == 10:
            cable.cut()
        time.sleep(0.01)
    assert cell.stop(8.0).verdicts == 0
    wait_until(lambda: set(seqs(mes)) == set(range(1, 601)))
    assert first_arrivals(mes) == list(range(1, 601))
    cable.remove()


@needs_broker
def test_verdicts_that_the_access_list_denies_wait_and_arrive_in_order_once_it_is_repaired(
    tmp_path, new_broker, station, consumer, caplog
):
    access = tmp_path / "access"
    access.write_text(f"topic readwrite {ROOT}/status\ntopic read {ROOT}/#\n", encoding="utf-8")
    broker = new_broker(lines=(f"acl_file {access}",)).start()
    mes, cell = consumer(broker.port), station(broker.port)
    with caplog.at_level(logging.ERROR):
        cell.inspect(100)
        wait_until(lambda: mes.on("/status") and "broker_refuses" in alarm_codes(mes))
    assert "Not authorized" in caplog.text
    assert cell.outbox.waiting == 100
    access.write_text(f"topic readwrite {ROOT}/#\n", encoding="utf-8")
    broker.signal(signal.SIGHUP)  # reads the list again
    wait_until(lambda: cell.outbox.waiting == 0)
    wait_until(lambda: "broker_refuses" not in alarm_codes(mes))
    wait_until(lambda: len(seqs(mes)) >= 100)  # confirmed by the broker is not yet come
    assert seqs(mes) == list(range(1, 101))
    assert last_status(mes)["delivery"]["refused"] >= 1


@needs_broker
def test_verdicts_wait_in_the_outbox_until_somebody_subscribes(broker, station, consumer):
    cell = station(broker.port)
    cell.inspect(5)
    wait_until(lambda: cell.publisher._courier._board.counts["noSubscribers"] >= 1)
    assert cell.outbox.waiting == 5
    mes = consumer(broker.port)
    wait_until(lambda: cell.outbox.waiting == 0)
    wait_until(lambda: len(seqs(mes)) >= 5)
    assert seqs(mes) == [1, 2, 3, 4, 5]
    cell.stop()
    assert last_status(mes)["delivery"]["noSubscribers"] >= 1


@needs_broker
def test_a_verdict_larger_than_the_broker_announces_goes_into_quarantine_and_a_notice_takes_its_place(
    new_broker, station, consumer, caplog
):
    broker = new_broker(lines=("max_packet_size 1800",)).start()
    mes, cell = consumer(broker.port), station(broker.port)
    noise = heatmap_payload(np.random.default_rng(0).random((256, 256), np.float32), 0.5)
    cell.inspect(2, heatmap=noise)
    cell.inspect(1, detail="\N{SNOWMAN}" * 500)  # 3 bytes each
    cell.inspect(2)
    assert cell.stop() == Undelivered(verdicts=0, heatmaps=0)
    wait_until(lambda: seqs(mes) == [1, 2, 3, 4, 5])
    notice = contents(mes.on("/missing"))[0]
    validate("missing", notice)
    assert (notice["first"], notice["last"]) == (3, 3)
    assert "the broker takes 1800" in notice["why"]
    wait_until(lambda: "stopped" in states(mes))
    assert last_status(mes)["undelivered"] == last_status(mes)["delivery"]["quarantined"] == 1
    assert last_status(mes)["delivery"]["heatmapsRefused"] == 2
    assert "verdicts_quarantined" in alarm_codes(mes)
    assert "the broker takes 1800" in caplog.text


@needs_broker
@pytest.mark.parametrize(
    ("protocol", "limit"),
    [
        (3, "max_packet_size 1800"),  # MQTT 3.1.1 cannot announce it: the broker hangs up
        (5, "message_size_limit 1800"),  # not announced either; its answer 0x95 is one that paho hangs up on
    ],
)
def test_a_verdict_that_makes_the_broker_hang_up_is_found_among_others_and_the_rest_flows(
    new_broker, station, consumer, protocol, limit
):
    broker = new_broker(lines=(limit,)).start()
    mes, cell = consumer(broker.port, protocol=protocol), station(broker.port, protocol=protocol)
    cell.inspect(10)
    cell.inspect(1, detail="\N{SNOWMAN}" * 500)
    cell.inspect(10)
    wait_until(lambda: cell.outbox.waiting == 0, timeout_s=15.0)
    assert sorted(set(seqs(mes))) == list(range(1, 22))
    assert [notice["seq"] for notice in contents(mes.on("/missing"))] == [11]


@needs_broker
def test_a_broker_that_crashes_again_and_again_costs_no_verdict(new_broker, station, consumer):
    broker = new_broker().start()
    cell = station(broker.port)
    cell.inspect(50)
    for _ in range(12):
        time.sleep(0.1)
        broker.kill()
        broker.start()
    mes = consumer(broker.port)
    wait_until(lambda: cell.outbox.waiting == 0)
    assert first_arrivals(mes) == list(range(1, 51))
    assert mes.on("/missing") == []


@needs_broker
def test_a_heatmap_that_the_broker_refuses_does_not_hold_up_verdicts(tmp_path, new_broker, station, consumer):
    access = tmp_path / "access"
    access.write_text(f"topic write {ROOT}/status\ntopic write {ROOT}/verdict\ntopic read #\n", encoding="utf-8")
    broker = new_broker(lines=(f"acl_file {access}",)).start()
    mes, cell = consumer(broker.port), station(broker.port)
    cell.inspect(20, heatmap=HEATMAP)
    assert cell.stop() == Undelivered(verdicts=0, heatmaps=0)
    wait_until(lambda: "stopped" in states(mes))
    assert seqs(mes) == list(range(1, 21))
    assert last_status(mes)["delivery"]["heatmapsRefused"] == 20


@needs_broker
def test_commands_reach_the_station_and_replies_come_back_with_their_correlation(broker, station, consumer):
    heard = []
    cell = station(broker.port, on_command=heard.append)
    mes = consumer(broker.port)
    wait_until(lambda: mes.on("/status"))
    mes.publish(f"{ROOT}/cmd/pause", b"stop it", correlation=b"\x01\x02")
    mes.publish(f"{ROOT}/cmd/pause", b"x" * 70_000)  # the broker withholds it
    mes.publish(f"{ROOT}/cmd/resume", b"go on")
    wait_until(lambda: len(heard) == 2)
    assert heard == [
        Incoming("pause", b"stop it", retained=False, correlation=b"\x01\x02"),
        Incoming("resume", b"go on", retained=False, correlation=None),
    ]
    cell.publisher.publish_reply("pause", {"result": "done"}, b"\x01\x02")
    wait_until(lambda: mes.on("/cmd/pause/reply"))
    reply = mes.on("/cmd/pause/reply")[0]
    assert (reply.retain, json.loads(reply.payload)) == (False, {"result": "done"})
    assert reply.properties.CorrelationData == b"\x01\x02"


@needs_broker
def test_a_retained_command_is_known_as_one_also_by_a_station_that_is_connected(broker, station, consumer):
    heard = []
    station(broker.port, on_command=heard.append)
    mes = consumer(broker.port)
    wait_until(lambda: mes.on("/status"))
    mes.publish(f"{ROOT}/cmd/pause", b"for now")
    wait_until(lambda: len(heard) == 1)
    mes.publish(f"{ROOT}/cmd/pause", b"for ever", retain=True)
    wait_until(lambda: len(heard) == 2)
    assert [(command.payload, command.retained) for command in heard] == [(b"for now", False), (b"for ever", True)]


def test_stop_reports_what_waits_for_an_absent_broker_within_its_timeout(station):
    cell = station(free_port())
    cell.inspect(7, heatmap=HEATMAP)
    began_s = time.monotonic()
    assert cell.publisher.stop(0.5) == Undelivered(verdicts=7, heatmaps=7)
    assert time.monotonic() - began_s < 0.6
    assert cell.publisher.stop(0.5) == Undelivered(verdicts=7, heatmaps=7)


def test_stop_returns_at_once_where_nothing_waits_for_the_absent_broker(station):
    cell = station(free_port())
    began_s = time.monotonic()
    assert cell.publisher.stop(5.0) == Undelivered(verdicts=0, heatmaps=0)
    assert time.monotonic() - began_s < 1.6


@needs_broker
def test_stop_keeps_its_timeout_when_the_broker_is_frozen(broker, station, consumer):
    mes, cell = consumer(broker.port), station(broker.port)
    cell.inspect(1)
    wait_until(lambda: cell.outbox.waiting == 0)
    broker.freeze()
    cell.inspect(98)
    began_s = time.monotonic()
    assert cell.publisher.stop(0.6) == Undelivered(verdicts=98, heatmaps=0)
    assert time.monotonic() - began_s < 0.75
    assert seqs(mes) == [1]


@needs_broker
def test_a_connection_on_which_nothing_is_confirmed_is_given_up(broker, station, consumer, monkeypatch, caplog):
    monkeypatch.setattr("agent.mqtt.courier.UNANSWERED_S", 0.3)
    mes, cell = consumer(broker.port), station(broker.port)
    wait_until(lambda: mes.on("/status"))
    broker.freeze()
    cell.inspect(3)
    wait_until(lambda: "confirmed nothing" in caplog.text)
    broker.signal(signal.SIGCONT)
    wait_until(lambda: cell.outbox.waiting == 0)
    assert first_arrivals(mes) == [1, 2, 3]


@needs_broker
def test_a_wrong_password_is_an_alarm_and_verdicts_wait(tmp_path, new_broker, station, caplog):
    passwords = tmp_path / "passwords"
    passwords.write_text("station:plain\n", encoding="utf-8")
    broker = new_broker(lines=(f"password_file {passwords}",), anonymous=False).start()
    password = tmp_path / "password"
    password.write_text("wrong\n", encoding="utf-8")
    cell = station(broker.port, username="station", password_file=password)
    cell.inspect(1)
    wait_until(lambda: "refused" in caplog.text)
    assert [record.levelname for record in caplog.records if "refused" in record.message] == ["ERROR"]
    assert cell.stop(0.2).verdicts == 1


@needs_broker
def test_no_thread_is_left_behind(broker, station):
    before = set(threading.enumerate())
    cell = station(broker.port)
    cable = Cable(broker.port)
    for _ in range(3):
        cable.cut()
    cell.stop()
    wait_until(lambda: not [thread for thread in set(threading.enumerate()) - before if "taktsight" in thread.name])
    wait_until(lambda: not [thread for thread in set(threading.enumerate()) - before if "paho" in thread.name])
    cable.remove()
