"""Verdicts leave the station when every consumer has acknowledged them: what brokers forget costs nothing."""

import json
import random
import time

import pytest

from agent.errors import StorageError
from agent.mqtt.publisher import MqttPublisher, MqttSettings
from agent.outbox.outbox import Outbox, OutboxSettings
from tests.broker import Cable, Mosquitto, wait_until
from tests.mes import Mes
from tests.station import ORIGIN, ROOT, TestStation

pytestmark = [pytest.mark.broker, pytest.mark.usefixtures("impatience")]


@pytest.fixture
def plant(tmp_path):
    """Returns a function that makes brokers, stations and consumers; all are ended in the end."""
    made = []

    def make(kind, *arguments, **options):
        if kind is TestStation:
            arguments = (tmp_path / "outbox", *arguments)
        if kind is Mosquitto:
            arguments = (tmp_path,)
        made.append(kind(*arguments, **options))
        return made[-1]

    yield make
    for one in reversed(made):
        if isinstance(one, TestStation):
            one.stop(0.0)
        elif isinstance(one, Mosquitto):
            one.stop()
        elif isinstance(one, Mes):
            one.go()


@pytest.fixture
def broker(plant):
    return plant(Mosquitto).start()


@pytest.mark.parametrize("protocol", [5, 3])
def test_what_the_consumer_acknowledges_leaves_the_outbox(plant, broker, protocol):
    mes = plant(Mes, broker.port, ROOT, protocol=protocol)
    station = plant(TestStation, broker.port, consumers=("mes",), protocol=protocol)
    station.inspect(300)
    wait_until(lambda: station.outbox.waiting == 0)
    assert mes.seqs == list(range(1, 301))
    assert station.stop().verdicts == 0
    wait_until(lambda: mes.statuses[-1]["state"] == "stopped")
    status = mes.statuses[-1]
    assert status["consumers"] == {"mes": {"acknowledged": 300, "waiting": 0}}
    assert (status["firstSeq"], status["lastSeq"], status["deliveryMode"]) == (301, 300, "consumers")


def test_a_publisher_refuses_an_outbox_that_does_not_wait_for_its_consumers(tmp_path):
    outbox = Outbox(OutboxSettings(tmp_path / "outbox", reserve_mb=0.0), "cell7")
    outbox.set_consumers(("mes", "sparkplug"))
    MqttPublisher(MqttSettings(topic=ROOT, consumers=("mes",)), ORIGIN, outbox)
    with pytest.raises(StorageError, match="archive"):
        MqttPublisher(MqttSettings(topic=ROOT, consumers=("mes", "archive")), ORIGIN, outbox)
    outbox.close()


def test_what_no_consumer_acknowledged_is_there_in_the_next_run(plant, broker):
    mes = plant(Mes, broker.port, ROOT)
    mes.acknowledges = False
    station = plant(TestStation, broker.port, consumers=("mes",))
    station.inspect(30)
    wait_until(lambda: len(mes.seqs) == 30)
    station.restart()
    assert station.outbox.waiting == 30
    mes.acknowledges = True
    mes.go()
    mes.come()
    wait_until(lambda: station.outbox.waiting == 0)
    assert mes.seqs == list(range(1, 31))


def test_a_consumer_away_beyond_the_brokers_queue_gets_everything_when_it_is_back(plant):
    broker = plant(Mosquitto, lines=("max_queued_messages 100",)).start()
    mes = plant(Mes, broker.port, ROOT)
    station = plant(TestStation, broker.port, consumers=("mes",))
    station.inspect(50)
    wait_until(lambda: station.outbox.waiting == 0)
    mes.go()
    for _ in range(30):
        station.inspect(50)
        time.sleep(0.01)
    mes.come()
    wait_until(lambda: station.outbox.waiting == 0)
    assert sorted(mes.seqs) == list(range(1, 1551))


@pytest.mark.parametrize("persistence", [True, False])
def test_nothing_is_missing_after_the_broker_was_killed_while_the_consumer_was_away(plant, persistence):
    broker = plant(Mosquitto, lines=(f"persistence {str(persistence).lower()}",)).start()
    mes = plant(Mes, broker.port, ROOT)
    station = plant(TestStation, broker.port, consumers=("mes",))
    station.inspect(100)
    wait_until(lambda: station.outbox.waiting == 0)
    mes.go()
    station.inspect(200)
    wait_until(lambda: station.publisher._courier._delivery.resent >= 1)  # the broker has confirmed the first ones
    broker.kill()
    station.inspect(200)
    broker.start()
    station.inspect(100)
    mes.come()
    wait_until(lambda: station.outbox.waiting == 0)
    assert mes.seqs == list(range(1, 601))


def test_a_live_consumer_is_not_held_up_by_one_that_is_away_and_comes_back(plant, broker):
    mes = plant(Mes, broker.port, ROOT)
    archive = plant(Mes, broker.port, ROOT, "archive", session=False)
    station = plant(TestStation, broker.port, consumers=("mes", "archive"))
    station.inspect(20)
    wait_until(lambda: station.outbox.waiting == 0)
    archive.go()
    station.inspect(400)
    wait_until(lambda: len(mes.seqs) == 420)
    assert mes.copies < 64
    assert station.outbox.waiting == 400
    assert station.outbox.acknowledged()["archive"] == 20
    archive.come()
    wait_until(lambda: station.outbox.waiting == 0)
    assert sorted(archive.seqs) == list(range(1, 421))
    assert mes.seqs == list(range(1, 421))


def test_an_absent_consumer_costs_a_message_now_and_then_and_no_flood(plant, broker):
    mes = plant(Mes, broker.port, ROOT)
    station = plant(TestStation, broker.port, consumers=("mes", "never"))
    station.inspect(200)
    wait_until(lambda: len(mes.seqs) == 200)
    time.sleep(3.5)
    assert 1 <= mes.copies <= 3


def test_acknowledgements_that_cannot_be_true_are_counted_and_not_believed(plant, broker):
    mes = plant(Mes, broker.port, ROOT)
    stranger = plant(Mes, broker.port, ROOT, "stranger")
    mes.acknowledges = stranger.acknowledges = False
    station = plant(TestStation, broker.port, consumers=("mes",))
    station.inspect(10)
    wait_until(lambda: len(mes.seqs) == 10)

    def ack(**changed):
        right = {"schema": "taktsight.ack/1", "epoch": station.outbox.epoch, "upto": 10, "resend": False}
        return json.dumps(right | changed).encode()

    mes.send_ack(ack(epoch="f" * 12))
    mes.send_ack(ack(upto=11))
    mes.send_ack(ack(upto="10"))
    mes.send_ack(ack(more="x" * 1024))
    mes.send_ack(b"\x00")
    mes.send_ack(ack(upto=10**30))
    stranger.send_ack(ack())
    wait_until(lambda: mes.statuses[-1]["delivery"]["ignoredAcks"] == 6)  # of the stranger it hears nothing
    station.stop(0.4)
    mes.send_ack(ack(), retain=True)
    station.start()
    wait_until(lambda: mes.statuses[-1]["delivery"]["ignoredAcks"] == 1 and mes.statuses[-1]["state"] == "starting")
    assert station.outbox.waiting == 10
    mes.send_ack(b"", retain=True)
    mes.send_ack(ack())
    wait_until(lambda: station.outbox.waiting == 0)


def test_a_cut_connection_costs_copies_at_most(plant, broker):
    mes, cable = plant(Mes, broker.port, ROOT), Cable(broker.port)
    station = plant(TestStation, cable.port, consumers=("mes",))
    for number in range(60):
        station.inspect(10)
        if number % 12 == 6:
            cable.cut()
        time.sleep(0.01)
    wait_until(lambda: station.outbox.waiting == 0)
    assert mes.seqs == list(range(1, 601))
    cable.remove()


def test_load_resends_and_reconnections_together_never_hang_it(plant, broker, request):
    """paho's lock order once hung a publisher that shared a lock with its callbacks: load from all sides at once."""
    duration_s = 600.0 if request.config.getoption("--long", default=False) else 20.0
    rng = random.Random(7)
    mes, cable = plant(Mes, broker.port, ROOT), Cable(broker.port)
    archive = plant(Mes, broker.port, ROOT, "archive", session=False)
    station = plant(TestStation, cable.port, consumers=("mes", "archive"))
    end_s, progress_s, stored = time.monotonic() + duration_s, time.monotonic(), 0
    seen = 0
    while time.monotonic() < end_s:
        if station.outbox.waiting < 500:
            stored += len(station.inspect(rng.randint(1, 40)))
        station.publisher.publish_status({**mes.statuses[-1], "state": "running"} if mes.statuses else {})
        if rng.random() < 0.005:
            cable.cut()
        if rng.random() < 0.005:
            archive.go()
            archive.come()
        if len(mes.stored) > seen:
            seen, progress_s = len(mes.stored), time.monotonic()
        assert time.monotonic() - progress_s < 20.0, "no verdict arrives any more"
        time.sleep(0.002)
    wait_until(lambda: station.outbox.waiting == 0, timeout_s=60.0)
    assert sorted(mes.seqs) == sorted(archive.seqs) == list(range(1, stored + 1))
    cable.remove()
