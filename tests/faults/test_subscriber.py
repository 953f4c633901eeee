"""A scripted station, a real broker, a real subscriber: every part is in the table once, whatever breaks in between."""

import json
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode
from taktsight_subscribe import BrokerError, NoReply, PostgresStore, SqliteStore, Subscriber, send_command
from taktsight_subscribe.broker import Broker
from taktsight_subscribe.commands import NO_SUBSCRIBERS
from taktsight_subscribe.connection import Connection

from tests.broker import Cable, Mosquitto, free_port, wait_until
from tests.postgres import Postgres
from tests.schemas import faults, schema
from tests.scripted_station import ScriptedStation, picture_link, status_fields, verdict_fields
from tests.station import HEATMAP, TestStation

ROOT = "acme/plant1/hall2/line3/cell7"
EVERY_STATION = "acme/plant1/+/+/+"
FAST = "set_tcp_nodelay true"
REMEMBERS = ("persistence true", "autosave_on_changes true", "autosave_interval 1", FAST)
PICTURE = b"\xff\xd8" + bytes(range(256)) * 8
pytestmark = pytest.mark.broker


@pytest.fixture(autouse=True)
def impatience(monkeypatch):
    """Shorter waits, so that the tests are soon over."""
    monkeypatch.setattr("agent.mqtt.courier.RECONNECT_MIN_S", 0.1)
    monkeypatch.setattr("taktsight_subscribe.connection.RECONNECT_MIN_S", 0.1)
    monkeypatch.setattr("taktsight_subscribe.connection.RECONNECT_MAX_S", 0.4)
    monkeypatch.setattr("taktsight_subscribe.receiver.STORE_RETRY_MIN_S", 0.1)
    monkeypatch.setattr("taktsight_subscribe.receiver.STORE_RETRY_MAX_S", 0.3)
    monkeypatch.setattr("taktsight_subscribe.acks.HOLE_PATIENCE_S", 0.05)
    monkeypatch.setattr("taktsight_subscribe.acks.RESEND_MIN_S", 0.1)
    monkeypatch.setattr("taktsight_subscribe.acks.LOST_AFTER_S", 0.4)


@pytest.fixture
def new_broker(tmp_path):
    """Returns a function that starts a broker; every one is stopped in the end."""
    made = []

    def make(*lines):
        made.append(Mosquitto(tmp_path, lines=lines or (FAST,)).start())
        return made[-1]

    yield make
    for one in made:
        one.stop()


@pytest.fixture
def broker(new_broker):
    return new_broker()


@pytest.fixture
def new_station(new_broker):
    """Returns a function that starts a station; every one is stopped in the end."""
    made = []

    def make(port, root=ROOT, **options):
        made.append(ScriptedStation(port, root, **options))
        return made[-1]

    yield make
    for one in made:
        one.stop()


@pytest.fixture
def table(tmp_path):
    return Table(tmp_path / "verdicts.sqlite")


@pytest.fixture
def subscriber(new_station, table):
    """Returns a function that starts a subscriber; every one is stopped in the end."""
    made = []

    def start(port, topic=EVERY_STATION, **options):
        options = {"consumer": "mes", "store": SqliteStore(table.path), **options}
        made.append(Subscriber(topic, port=port, **options).__enter__())
        return made[-1]

    yield start
    for one in made:
        one.__exit__(None, None, None)


def is_known(station):
    """Whether the station has heard of a subscriber: all that it publishes from now on arrives in order."""
    return any(ack["resend"] for ack in station.acks)


class Table:
    """What a SQLite store has, read as another program would."""

    def __init__(self, path):
        self.path = path

    def rows(self, query):
        if not self.path.exists():
            return []
        with closing(sqlite3.connect(f"file:{self.path}?mode=ro", uri=True)) as connection:
            try:
                return connection.execute(query).fetchall()
            except sqlite3.OperationalError as error:
                assert "no such table" in str(error), error
                return []

    def seqs(self):
        return [seq for (seq,) in self.rows("SELECT seq FROM verdict ORDER BY seq")]

    def gaps(self):
        return self.rows("SELECT first, last, reason FROM gap ORDER BY epoch, first")


def has_everything(station, table, count):
    return station.waiting == 0 and table.seqs() == list(range(1, count + 1))


def test_every_part_is_stored_acknowledged_and_handed_over_once(broker, new_station, subscriber, table):
    station = new_station(broker.port)
    station.store(500)
    with Subscriber(EVERY_STATION, consumer="mes", store=SqliteStore(table.path), port=broker.port) as mes:
        seqs = set()
        for verdict in mes:
            assert table.rows(f"SELECT outcome FROM verdict WHERE seq = {verdict.seq}") == [(verdict.outcome,)]
            assert verdict.seq not in seqs
            seqs.add(verdict.seq)
            if len(seqs) == 500:
                break
    assert seqs == set(range(1, 501))
    wait_until(lambda: has_everything(station, table, 500))
    assert is_known(station)
    assert station.acks[-1]["upto"] == 500
    assert len(station.acks) < 150


@pytest.mark.parametrize("protocol", [5, 3])
def test_the_agents_own_publisher_and_this_subscriber_agree(new_broker, subscriber, table, tmp_path, protocol):
    broker = new_broker("max_queued_messages 20", FAST)
    agent = TestStation(tmp_path / "outbox", broker.port, consumers=("mes",), protocol=protocol)
    try:
        agent.inspect(150, heatmap=HEATMAP)
        mes = subscriber(broker.port, protocol=protocol, heatmaps=tmp_path / "maps")
        wait_until(lambda: len(table.seqs()) > 20)
        agent.restart()
        agent.inspect(150, heatmap=HEATMAP)
        verdicts = [mes.next(10) for _ in range(300)]
        assert sorted(verdict.seq for verdict in verdicts) == list(range(1, 301))
        wait_until(lambda: agent.outbox.waiting == 0)
        second_run = [verdict.key for verdict in verdicts if verdict.seq > 150]  # a slow disk may cost some of them
        wait_until(lambda: any(mes.heatmap(key) is not None for key in second_run))
        assert table.gaps() == []
    finally:
        agent.stop(0.0)


def test_what_is_sent_to_a_station_validates_against_the_published_schemas(broker, new_station, subscriber):
    station = new_station(broker.port)
    subscriber(broker.port)
    station.store(2)
    wait_until(lambda: station.waiting == 0)
    for ack in station.acks:
        ack.pop("consumer")
        assert faults(ack, schema("ack")) == []
    station.reply = {"result": "done", "detail": "ok"}
    commands = {
        "recipe": {"name": "bottle"},
        "pause": {"reason": "x"},
        "resume": {},
        "capture": {"count": 3},
        "threshold": {"score": None},
        "selftest": {},
    }
    for name, arguments in commands.items():
        send_command(ROOT, name, arguments, issuer="mes", port=broker.port)
        command = station.commands[-1]
        assert command.pop("topic") == f"{ROOT}/cmd/{name}"
        assert faults(command, schema("command")) == []


@pytest.mark.parametrize("protocol", [5, 3])
def test_duplicates_holes_and_disorder_leave_each_part_once(broker, new_station, subscriber, table, protocol):
    station = new_station(broker.port, mischief=3)
    mes = subscriber(broker.port, protocol=protocol)
    station.store(400)
    seqs = [mes.next(10).seq for _ in range(400)]
    assert sorted(seqs) == list(range(1, 401))
    wait_until(lambda: has_everything(station, table, 400))
    assert table.gaps() == []


def test_parts_that_will_never_come_are_recorded_and_do_not_stop_the_rest(
    broker, new_station, subscriber, table, caplog
):
    station = new_station(broker.port)
    subscriber(broker.port)
    station.store(3)
    station.store_missing(4, "quarantined: too large")
    station.store(3)
    wait_until(lambda: station.waiting == 0)
    assert table.seqs() == [1, 2, 3, 8, 9, 10]
    assert table.gaps() == [(4, 7, "quarantined: too large")]
    assert "cell7: parts 4 to 7 are missing: quarantined" in caplog.text


def test_what_the_station_lost_becomes_a_gap_and_the_prefix_goes_on(broker, new_station, subscriber, table):
    station = new_station(broker.port)
    station.store(2)
    mes = subscriber(broker.port)
    wait_until(lambda: station.waiting == 0)
    station.hold_back()
    station.store(5)
    station.forget(5)
    station.speak()
    wait_until(lambda: station.waiting == 0)
    assert mes.next(5) is not None
    assert table.seqs() == [1, 2, 6, 7]
    assert [gap[:2] for gap in table.gaps()] == [(3, 5)]


def test_a_new_consumer_begins_where_the_station_still_has_something(broker, new_station, subscriber, table):
    station = new_station(broker.port, silent=True)  # a status that promises part 1 would make a gap of it
    station.store(50)
    station.forget(40)
    station.speak()
    subscriber(broker.port)
    wait_until(lambda: station.waiting == 0)
    assert (table.seqs(), table.gaps()) == (list(range(41, 51)), [])


def test_a_new_epoch_counts_from_one_again(broker, new_station, subscriber, table):
    station = new_station(broker.port)
    subscriber(broker.port)
    station.store(5)
    wait_until(lambda: station.waiting == 0)
    station.begin_epoch()
    station.store(3)
    wait_until(lambda: station.waiting == 0)
    assert table.rows("SELECT upto FROM progress ORDER BY rowid") == [(5,), (3,)]
    assert len(table.seqs()) == 8


def test_nothing_is_missing_after_the_broker_was_killed_in_mid_stream(new_broker, new_station, subscriber, table):
    broker = new_broker(*REMEMBERS)
    station = new_station(broker.port)
    subscriber(broker.port)
    for _ in range(3):
        station.store(300)
        wait_until(lambda: len(table.seqs()) >= station.last - 250)
        broker.kill()
        broker.start()
    wait_until(lambda: has_everything(station, table, 900), timeout_s=15)


def test_nothing_is_missing_after_the_connection_was_cut_again_and_again(broker, new_station, subscriber, table):
    cable = Cable(broker.port)
    station = new_station(broker.port)
    mes = subscriber(cable.port)
    wait_until(lambda: is_known(station))
    station.store(1000)
    seqs = []
    while len(seqs) < 1000:
        seqs.append(mes.next(10).seq)
        if len(seqs) % 200 == 100:
            cable.cut()
    assert seqs == sorted(seqs) == list(range(1, 1001))
    wait_until(lambda: has_everything(station, table, 1000))
    cable.remove()


@pytest.mark.parametrize("mischief", [None, 5])
def test_a_subscriber_killed_ten_times_misses_nothing_and_has_nothing_twice(
    broker, new_station, table, tmp_path, mischief
):
    station = new_station(broker.port, mischief=mischief)
    printed = tmp_path / "printed"
    kills = 10 if mischief is None else 2
    for kill in range(kills + 1):
        station.store(300 if mischief is None else 60)
        before = len(table.seqs())
        process = start_command(broker.port, table, printed)
        if kill < kills:
            wait_until(lambda: len(table.seqs()) > before)  # noqa: B023
            process.kill()
        else:
            wait_until(lambda: has_everything(station, table, station.last), timeout_s=20)
            wait_until(lambda: len(handed_over(printed)) == station.last)
            process.terminate()
        process.wait(timeout=10)
    assert process.returncode == 0
    assert table.gaps() == []
    assert handed_over(printed) == set(range(1, station.last + 1))


def start_command(port, table, printed):
    arguments = ["run", EVERY_STATION, "--port", str(port), "--store", str(table.path), "--json"]
    with printed.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "taktsight_subscribe", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.DEVNULL,
        )


def handed_over(printed):
    found = set()
    for text in printed.read_text(encoding="utf-8").replace("}{", "}\n{").splitlines():
        try:
            found.add(json.loads(text)["seq"])
        except ValueError:  # killed in mid-line: it comes again
            continue
    return found


def test_a_subscriber_away_for_longer_than_the_broker_queues_gets_the_rest_from_the_station(
    new_broker, new_station, subscriber, table
):
    broker = new_broker("max_queued_messages 20", FAST)
    station = new_station(broker.port)
    first = subscriber(broker.port)
    station.store(10)
    wait_until(lambda: station.waiting == 0)
    first.__exit__(None, None, None)
    station.store(500)
    time.sleep(0.3)
    subscriber(broker.port)
    wait_until(lambda: has_everything(station, table, 510), timeout_s=15)
    assert table.gaps() == []


def test_a_part_whose_loop_failed_comes_again_and_those_that_were_done_do_not(broker, new_station, subscriber, table):
    station = new_station(broker.port)
    first = subscriber(broker.port)
    wait_until(lambda: is_known(station))
    first.__exit__(None, None, None)
    station.store(5)

    def work(seqs, fails_at):
        with Subscriber(EVERY_STATION, consumer="mes", store=SqliteStore(table.path), port=broker.port) as mes:
            for verdict in mes:
                if verdict.seq == fails_at:
                    raise RuntimeError("the MES is on fire")
                seqs.append(verdict.seq)
                if verdict.seq == 5:
                    break

    done = []
    with pytest.raises(RuntimeError, match="on fire"):
        work(done, fails_at=3)
    work(done, fails_at=None)
    assert done == [1, 2, 3, 4, 5]


def test_what_run_stored_is_there_for_a_later_loop(broker, new_station, table):
    station = new_station(broker.port)
    storing = Subscriber(EVERY_STATION, consumer="mes", store=SqliteStore(table.path), port=broker.port)
    thread = threading.Thread(target=storing.run, daemon=True)
    thread.start()
    wait_until(lambda: is_known(station))
    station.store(20)
    wait_until(lambda: station.waiting == 0)
    storing.stop()
    thread.join(5)
    with Subscriber(EVERY_STATION, consumer="mes", store=SqliteStore(table.path), port=free_port()) as mes:
        assert [mes.next(5).seq for _ in range(20)] == list(range(1, 21))
        assert mes.next(0) is None


def test_nothing_is_acknowledged_while_the_store_fails_and_all_of_it_after(
    broker, new_station, subscriber, table, caplog
):
    station = new_station(broker.port)
    store = FailingStore(table.path)
    subscriber(broker.port, store=store)
    station.store(5)
    wait_until(lambda: station.waiting == 0)
    store.fails = True
    station.store(200)
    wait_until(lambda: "nothing is acknowledged until the store is back" in caplog.text)
    time.sleep(0.3)
    assert station.waiting == 200
    assert max(ack["upto"] for ack in station.acks) == 5
    store.fails = False
    wait_until(lambda: has_everything(station, table, 205))


class FailingStore(SqliteStore):
    """As on a full disk: what is written fails."""

    fails = False

    def commit(self, batch):
        if self.fails:
            with self._transaction() as connection:
                connection.execute("PRAGMA max_page_count = 1")
                connection.execute("CREATE TABLE filler AS SELECT zeroblob(1000000)")
        super().commit(batch)


class FrozenStore(SqliteStore):
    """As behind a database whose process stands still: what is written takes until it is let go."""

    def __init__(self, path):
        super().__init__(path)
        self.goes_on = threading.Event()

    def commit(self, batch):
        self.goes_on.wait()
        super().commit(batch)


@pytest.fixture
def frozen_store(table, monkeypatch):
    monkeypatch.setattr("taktsight_subscribe.patience.PATIENCE_S", 0.1)
    monkeypatch.setattr("taktsight_subscribe.patience.POLL_S", 0.02)
    store = FrozenStore(table.path)
    yield store
    store.goes_on.set()


def test_a_store_that_does_not_answer_is_a_warning_while_it_lasts(new_station, broker, frozen_store, table, caplog):
    station = new_station(broker.port)
    with Subscriber(EVERY_STATION, consumer="mes", store=frozen_store, port=broker.port):
        station.store(5)
        wait_until(lambda: "the store has not answered for" in caplog.text)
        assert station.waiting == 5
        frozen_store.goes_on.set()
        wait_until(lambda: has_everything(station, table, 5))


def test_statuses_of_an_absence_do_not_push_verdicts_out_of_the_brokers_queue(
    new_broker, new_station, subscriber, table
):
    station = new_station(new_broker("max_queued_messages 20", FAST).port, consumers=())
    first = subscriber(station.port)
    wait_until(lambda: first._receiver._greeted != set())
    first.__exit__(None, None, None)
    for _ in range(40):
        station.publish("status", json.dumps(status_fields("cell7", station.epoch, 1, 0)).encode(), retain=True)
    station.store(10)
    wait_until(lambda: station.waiting == 0)
    station._client.publish(f"{ROOT}/last", b"", qos=1).wait_for_publish(5)
    subscriber(station.port)
    wait_until(lambda: has_everything(station, table, 10))


def test_a_subscription_refused_on_a_reconnection_is_asked_for_again(broker, caplog):
    cable = Cable(broker.port)
    connection = Connection(Broker(port=cable.port), "mes", {"a/verdict": 1})
    wait_until(lambda: connection.run(0.01) or connection.is_ready)
    refusal, taken = [ReasonCode(PacketTypes.SUBACK, "Not authorized")], connection._on_subscribe
    connection._client.on_subscribe = lambda *given: taken(*given[:3], refusal, given[4])
    cable.cut()
    wait_until(lambda: connection.run(0.01) or "does not let us read a/verdict" in caplog.text)
    connection._client.on_subscribe = taken
    wait_until(lambda: connection.run(0.01) or connection.is_ready)
    assert connection.times_ready == 2
    connection.close(1.0)
    cable.remove()


@pytest.mark.parametrize("protocol", [5, 3])
def test_what_is_not_subscribed_to_any_more_is_not_stored_and_the_broker_forgets_it(
    broker, subscriber, tmp_path, table, protocol
):
    first = subscriber(broker.port, protocol=protocol, heatmaps=tmp_path / "maps")
    wait_until(lambda: first._receiver._greeted_on)
    first.__exit__(None, None, None)
    cell8 = ROOT.replace("cell7", "cell8")
    other = SqliteStore(tmp_path / "other.sqlite")  # nothing but the broker remembers
    second = subscriber(broker.port, cell8, store=other, protocol=protocol)
    wait_until(lambda: second._receiver._greeted_on)
    verdicts = {ROOT: verdict_fields("cell7", "0" * 12, 1), cell8: verdict_fields("cell8", "1" * 12, 1)}
    with asking(broker.port) as is_heard:
        for topic in (f"{ROOT}/verdict", f"{ROOT}/missing", f"{ROOT}/status", f"{cell8}/heatmap/3"):
            is_heard(topic, json.dumps(verdicts[ROOT]).encode())
            wait_until(lambda: not is_heard(topic, b"anything"))  # noqa: B023
        assert is_heard(f"{cell8}/verdict", json.dumps(verdicts[cell8]).encode())
    assert second.next(8.0).station == "cell8"
    assert Table(other.path).rows("SELECT station FROM verdict") == [("cell8",)]
    assert Table(other.path).rows("SELECT * FROM rejected") == []


@contextmanager
def asking(port):
    """Yield a function that publishes and returns whether anybody is subscribed to the topic."""
    answers = {}
    client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
    client.on_publish = lambda _client, _data, mid, reason, _properties: answers.update({mid: reason.value})
    client.connect("127.0.0.1", port)
    client.loop_start()

    def is_heard(topic, payload):
        mid = client.publish(topic, payload, qos=1).mid
        wait_until(lambda: mid in answers)
        return answers[mid] != NO_SUBSCRIBERS

    yield is_heard
    client.disconnect()
    client.loop_stop()


def test_a_station_in_the_name_of_another_one_is_refused_with_a_warning(broker, new_station, subscriber, table, caplog):
    station = new_station(broker.port)
    subscriber(broker.port)
    station.store(1)
    wait_until(lambda: station.waiting == 0)
    other = new_station(broker.port, "acme/plant1/hall2/line3/cell8")
    other.publish("verdict", json.dumps(verdict_fields("cell7", station.epoch, 2, outcome="pass")).encode())
    wait_until(lambda: "station cell7 is known at acme/plant1/hall2/line3/cell7" in caplog.text)
    station.store(1, outcome="reject")
    other.store(1)
    wait_until(lambda: station.waiting + other.waiting == 0)
    booked = table.rows("SELECT station, seq, outcome FROM verdict ORDER BY station, seq")
    assert booked == [("cell7", 1, "pass"), ("cell7", 2, "reject"), ("cell8", 1, "pass")]


def test_a_killed_postgresql_costs_nothing(broker, new_station, subscriber, caplog):
    psycopg = pytest.importorskip("psycopg")
    server = Postgres().start()
    try:
        station = new_station(broker.port)
        mes = subscriber(broker.port, store=PostgresStore(server.url()))
        wait_until(lambda: is_known(station))
        station.store(300)
        seqs = [mes.next(10).seq]
        server.kill()
        station.store(300)
        wait_until(lambda: "nothing is acknowledged until the store is back" in caplog.text)
        server.start()
        seqs += [mes.next(20).seq for _ in range(599)]
        assert seqs == list(range(1, 601))
        wait_until(lambda: station.waiting == 0)
        with psycopg.connect(server.url()) as connection:
            counted = connection.execute("SELECT count(*), max(seq), min(message->>'outcome') FROM verdict").fetchone()
        assert counted == (600, 600, "pass")
        mes.__exit__(None, None, None)
    finally:
        server.remove()


def test_a_message_that_is_none_of_ours_is_kept_aside_and_the_next_ones_flow(
    broker, new_station, subscriber, table, caplog
):
    station = new_station(broker.port)
    subscriber(broker.port)
    wait_until(lambda: is_known(station))
    newer = json.dumps(verdict_fields("cell7", "0" * 12, 1, schema="taktsight.verdict/2")).encode()
    for payload in (b"\xff", b"{", b"{", newer, b'"' + b"x" * (2 << 20) + b'"'):
        station.publish("verdict", payload)
    station.publish("missing", b"[]")
    station.publish("status", b"", retain=True)
    station.store(3)
    wait_until(lambda: station.waiting == 0)
    rejected = table.rows("SELECT times, size_bytes FROM rejected ORDER BY size_bytes, times")
    assert rejected == [(1, 1), (2, 1), (1, 2), (1, len(newer)), (1, (2 << 20) + 2)]
    assert "kept in table rejected" in caplog.text
    assert table.seqs() == [1, 2, 3]


def test_the_same_key_with_other_contents_is_an_alarm(broker, new_station, subscriber, table, caplog):
    station = new_station(broker.port)
    subscriber(broker.port)
    station.store(1)
    wait_until(lambda: station.waiting == 0)
    station.publish("verdict", json.dumps(verdict_fields("cell7", station.epoch, 1, outcome="reject")).encode())
    wait_until(lambda: "came twice with different contents" in caplog.text)
    assert table.rows("SELECT outcome FROM verdict") == [("pass",)]


def test_a_station_that_does_not_list_us_is_a_warning_said_once(broker, new_station, subscriber, table, caplog):
    listed = new_station(broker.port)
    unlisted = new_station(broker.port, "acme/plant1/hall2/line3/cell8", consumers=("other",))
    by_broker = new_station(broker.port, "acme/plant1/hall2/line3/cell9", consumers=())
    subscriber(broker.port)
    wait_until(lambda: caplog.text.count("Add it to mqtt.consumers: mes") == 2)
    for station in (listed, unlisted, by_broker):
        station.store(2)
        station.say_status()
    wait_until(lambda: len(table.seqs()) == 6 and listed.waiting == 0)
    assert caplog.text.count("Add it to mqtt.consumers: mes") == 2
    assert "cell7 (" not in caplog.text
    assert unlisted.waiting == 2


def test_heatmaps_lie_beside_their_verdicts_and_wrong_ones_do_not(broker, new_station, subscriber, tmp_path, caplog):
    station = new_station(broker.port, "acme/plant1/hall2/line3/cell 7.b")
    mes = subscriber(broker.port, heatmaps=tmp_path / "maps", heatmaps_mb=0.005)
    wait_until(lambda: is_known(station))
    station.store(4, heatmap=picture_link(PICTURE))
    verdicts = [mes.next(5) for _ in range(4)]
    for seq, picture in ((1, b"other"), (2, PICTURE), (3, PICTURE), (4, PICTURE), (99, PICTURE)):
        station.publish_picture(seq, picture)
    wait_until(lambda: mes.heatmap(verdicts[3].key) is not None)
    wait_until(lambda: "came without its verdict" in caplog.text)
    assert "is not the one that its verdict names" in caplog.text
    assert mes.heatmap(verdicts[3].key).read_bytes() == PICTURE
    files = sorted(str(path.relative_to(tmp_path / "maps")) for path in (tmp_path / "maps").rglob("*.*"))
    assert files == [f"cell%207%2Eb/{station.epoch}-{seq}.jpg" for seq in (3, 4)]  # 2 had to go: 5 KB is the limit


def test_a_heatmap_folder_that_fails_holds_up_no_verdict(broker, new_station, subscriber, table, caplog):
    maps = table.path.parent / "maps"
    station = new_station(broker.port)
    subscriber(broker.port, heatmaps=maps)
    (maps / "cell7").write_text("in the way", encoding="utf-8")
    station.store(1, heatmap=picture_link(PICTURE))
    wait_until(lambda: table.seqs() == [1])
    station.publish_picture(1, PICTURE)
    wait_until(lambda: "a heatmap was not written" in caplog.text)
    station.store(5)
    wait_until(lambda: has_everything(station, table, 6))


def test_a_wrong_password_is_an_error_and_not_an_endless_wait(tmp_path, table):
    (tmp_path / "passwords").write_text("mes:plain\n", encoding="utf-8")
    broker = Mosquitto(tmp_path, lines=(f"password_file {tmp_path}/passwords",), anonymous=False).start()
    try:
        options = {"username": "mes", "password": "wrong", "port": broker.port}
        with (
            Subscriber(ROOT, consumer="mes", store=SqliteStore(table.path), **options) as mes,
            pytest.raises(BrokerError, match="refuses us"),
        ):
            mes.next(5)
    finally:
        broker.stop()


def test_acknowledgements_that_the_access_list_denies_are_an_alarm(
    tmp_path, new_broker, new_station, subscriber, caplog
):
    access = tmp_path / "access"
    access.write_text(f"topic readwrite {ROOT}/verdict\ntopic readwrite {ROOT}/status\n", encoding="utf-8")
    station = new_station(new_broker(f"acl_file {access}", FAST).port)
    subscriber(station.port)
    wait_until(lambda: "the broker does not take our acknowledgements (Not authorized)" in caplog.text)


def test_a_topic_without_any_station_is_worth_a_word(broker, new_station, subscriber, caplog, monkeypatch):
    monkeypatch.setattr("taktsight_subscribe.receiver.SILENCE_S", 0.2)
    new_station(broker.port)
    subscriber(broker.port, "acme/+")
    wait_until(lambda: "no station found at acme/+" in caplog.text)


def test_two_programs_with_one_name_are_told_so(broker, subscriber, tmp_path, caplog):
    subscriber(broker.port)
    subscriber(broker.port, store=SqliteStore(tmp_path / "other.sqlite"))
    wait_until(lambda: "is another program running as taktsight-mes" in caplog.text)


def test_a_command_is_answered_by_the_station(broker, new_station):
    station = new_station(broker.port)
    wait_until(lambda: station.acks == [] and station._is_up)
    station.reply = {"result": "done", "detail": "paused", "before": "running", "after": "paused"}
    reply = send_command(ROOT, "pause", {"reason": "new nest"}, issuer="mes", port=broker.port)
    assert (reply.result, reply.detail, reply.message["after"]) == ("done", "paused", "paused")
    sent = station.commands[0]
    assert (sent["issuer"], sent["arguments"], sent["topic"]) == ("mes", {"reason": "new nest"}, f"{ROOT}/cmd/pause")
    assert abs(sent["id"] / 1000 - time.time()) < 60
    assert sent["expires"].endswith("Z")


def test_a_command_that_nobody_hears_or_answers_is_no_success(broker, new_station):
    with pytest.raises(NoReply, match="nobody listens"):
        send_command(ROOT, "resume", issuer="mes", port=broker.port)
    station = new_station(broker.port)
    wait_until(lambda: station._is_up)
    time.sleep(0.1)
    with pytest.raises(NoReply, match="no reply within"):
        send_command(ROOT, "resume", issuer="mes", port=broker.port, timeout_s=0.3)
    with pytest.raises(BrokerError, match="no broker"):
        send_command(ROOT, "resume", issuer="mes", port=free_port())
