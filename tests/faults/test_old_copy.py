"""An old copy of the outbox put back between two runs: the real subscriber gets every part, and none twice."""

import json
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from taktsight_subscribe import SqliteStore, Subscriber

from agent.clock import Stamp
from agent.publishing.messages import verdict_message
from agent.verdict import Outcome, Reason, Verdict
from tests.broker import Mosquitto, wait_until
from tests.mes import Mes
from tests.station import ORIGIN, ROOT, TestStation

pytestmark = [pytest.mark.broker, pytest.mark.usefixtures("impatience")]


class Plant:
    """A station that waits for `mes`, and the subscriber of that name with its table."""

    def __init__(self, folder, port):
        self.folder, self.port = folder, port
        self.station = TestStation(folder / "outbox", port, consumers=("mes",))
        self.subscriber = None
        self.parts = 0

    def inspect(self, count):
        """Let so many parts go by, each with its own number for ever."""
        for _ in range(count):
            self.parts += 1
            verdict = Verdict(self.parts, Outcome.PASS, Reason.SCORE, score=0.25, threshold=0.5, latency_ms=31.5)
            message = verdict_message(verdict, ORIGIN, Stamp(datetime.now(UTC), 0.0), None)
            self.station.outbox.store([(message, None)])
        self.station.publisher.wake()

    def come(self):
        """Start the subscriber."""
        store = SqliteStore(self.folder / "mes.sqlite")
        self.subscriber = Subscriber(ROOT, consumer="mes", store=store, port=self.port).__enter__()

    def go(self):
        """End the subscriber."""
        if self.subscriber is not None:
            self.subscriber.__exit__(None, None, None)
        self.subscriber = None

    def settle(self):
        """Wait until the station keeps nothing any more."""
        wait_until(lambda: self.station.outbox.waiting == 0)

    def copy(self):
        """Copy the outbox as it is, and go on."""
        self.station.stop(0.4)
        shutil.copytree(self.folder / "outbox", self.folder / "copy")
        self.station.start()

    def put_back(self):
        """Put the copy in the place of the outbox, between two runs."""
        self.station.stop(0.4)
        shutil.rmtree(self.folder / "outbox")
        shutil.copytree(self.folder / "copy", self.folder / "outbox")
        self.station.start()

    def epochs(self):
        return self._column("SELECT DISTINCT epoch FROM verdict ORDER BY position")

    def stored(self):
        """Return the numbers of the parts in the subscriber's table, in the order in which they came."""
        return self._column("SELECT trigger FROM verdict ORDER BY position")

    def gaps(self):
        return self._column("SELECT reason FROM gap")

    def _column(self, query):
        with closing(sqlite3.connect(self.folder / "mes.sqlite")) as connection:
            return [row[0] for row in connection.execute(query)]


@pytest.fixture
def broker(tmp_path):
    broker = Mosquitto(tmp_path).start()
    yield broker
    broker.stop()


@pytest.fixture
def plant(tmp_path, broker):
    plant = Plant(tmp_path, broker.port)
    yield plant
    plant.go()
    plant.station.stop(0.2)


def alarms(plant):
    return [alarm.code for alarm in plant.station.outbox.alarms()]


@pytest.mark.parametrize("more", [1, 2, 100])  # parts that the subscriber has beyond the copy
@pytest.mark.parametrize("is_there", [True, False])
def test_every_part_is_there_once_after_an_old_copy_was_put_back(plant, is_there, more):
    plant.come()
    plant.inspect(20)
    plant.settle()
    plant.copy()
    plant.inspect(more)
    plant.settle()
    if not is_there:
        plant.go()
    plant.put_back()
    plant.inspect(30)  # under seqs that the subscriber has
    if not is_there:
        plant.come()
    plant.inspect(30)
    plant.settle()
    assert plant.stored() == list(range(1, plant.parts + 1))
    assert (len(plant.epochs()), plant.gaps(), alarms(plant)) == (2, [], ["outbox_old_copy"])


def test_rows_that_wait_in_the_copy_and_have_come_since_do_not_come_twice(plant):
    plant.inspect(10)
    plant.copy()
    plant.come()
    plant.inspect(10)
    plant.settle()
    plant.put_back()
    assert plant.station.outbox.waiting == 10
    plant.inspect(5)
    plant.settle()
    assert plant.stored() == list(range(1, 26))


def test_runs_in_which_nobody_was_heard_are_published_too(plant):
    plant.come()
    plant.inspect(10)
    plant.settle()
    plant.copy()
    plant.inspect(10)
    plant.settle()
    plant.go()
    plant.put_back()
    plant.inspect(3)
    plant.station.restart()
    plant.inspect(3)
    plant.come()
    plant.settle()
    assert plant.stored() == list(range(1, 27))
    plant.station.restart()
    plant.inspect(3)
    plant.settle()
    assert plant.stored() == list(range(1, 30))
    assert alarms(plant) == []


def test_an_outbox_that_is_no_copy_goes_on_in_its_epoch_over_kills_and_restarts(plant):
    plant.come()
    for _ in range(3):
        plant.inspect(20)
        plant.station.restart()  # with rows under way
    plant.go()
    plant.inspect(5)
    plant.station.restart()
    plant.inspect(5)
    plant.come()
    plant.settle()
    assert plant.stored() == list(range(1, 71))
    assert (len(plant.epochs()), alarms(plant)) == (1, [])


def nonsense(station):
    return json.dumps({"schema": "taktsight.ack/1", "epoch": station.outbox.epoch, "upto": 10**12, "resend": True})


def test_a_consumer_that_says_nonsense_begins_one_epoch_and_loses_and_doubles_nothing_of_another(plant, broker):
    plant.come()
    plant.inspect(10)
    plant.settle()
    liar = Mes(broker.port, ROOT, "liar")
    liar.acknowledges = False
    plant.station.stop(0.4)
    plant.station.settings = replace(plant.station.settings, consumers=("mes", "liar"))
    plant.station.start()
    for run in range(4):
        plant.inspect(10)
        for _ in range(20):
            liar.send_ack(nonsense(plant.station).encode())
        wait_until(lambda upto=10 * (run + 2): len(plant.stored()) == upto)
        plant.station.restart()
    liar.go()
    assert plant.stored() == list(range(1, 51))
    assert len(plant.epochs()) == 2
