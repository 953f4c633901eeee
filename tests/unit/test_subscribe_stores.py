import json
import random
import sqlite3
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from taktsight_subscribe import PostgresStore, SqliteStore, StoreError
from taktsight_subscribe.errors import RowRefused, SettingsError
from taktsight_subscribe.ledger import Arrived, Ledger
from taktsight_subscribe.messages import MAX_DEPTH, Key, read_verdict
from taktsight_subscribe.postgres_store import TCP_USER_TIMEOUT_MS
from taktsight_subscribe.store import Batch, Gap, Progress, Rejected

from tests.postgres import Postgres
from tests.scripted_station import verdict_fields

NOW = datetime(2026, 11, 20, 10, 0, 0, 123000, tzinfo=UTC)
EPOCH = "0123456789ab"


@pytest.fixture(scope="module")
def server():
    server = Postgres().start()
    yield server
    server.remove()


@pytest.fixture(params=["sqlite", "postgresql"])
def new_store(request, tmp_path):
    """Returns a function that returns a new Store object on the same database, open."""
    made = []
    schema = f"s{abs(hash(request.node.name))}"
    if request.param == "postgresql":
        psycopg = pytest.importorskip("psycopg")
        server = request.getfixturevalue("server")
        with psycopg.connect(server.url()) as connection:
            connection.execute(f"CREATE SCHEMA {schema}")

    def make():
        if request.param == "sqlite":
            made.append(SqliteStore(tmp_path / "verdicts.sqlite"))
        else:
            made.append(PostgresStore(server.url(schema)))
        made[-1].open()
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def store(new_store):
    return new_store()


def verdict(seq, **changes):
    return read_verdict(json.dumps(verdict_fields("cell7", EPOCH, seq, **changes)).encode(), NOW)


def progress(upto, **changes):
    return replace(Progress("cell7", EPOCH, "acme/cell7", 1, upto), **changes)


def gap(first, last):
    return Gap("cell7", EPOCH, first, last, "the row was damaged", NOW)


def rejected(payload=b"{", moment=NOW):
    return Rejected("acme/cell7/verdict", f"{hash(payload):x}", "not JSON", len(payload), payload, moment)


def positions(store, after=0):
    return [(one.position, one.verdict.seq) for one in store.after(after, 100)]


def test_a_verdict_comes_back_as_it_went_in(new_store):
    one = verdict(
        1, partId="SN ä\u2028", score=1 / 3, detail="\ud83d\ude00 \\u0041", creationTime="2026-11-20T09:59:59.007Z"
    )
    new_store().commit(Batch(verdicts=[one, verdict(2, score=None, run=None, partId=None, creationTime=None)]))
    found = new_store().find(one.key)
    assert replace(found, text="") == replace(one, text="")
    assert found.message == one.message
    assert new_store().find(Key("cell7", EPOCH, 2)).created_utc is None
    assert new_store().find(Key("cell7", EPOCH, 3)) is None


def test_a_verdict_that_is_there_stays_and_keeps_its_position(store):
    store.commit(Batch(verdicts=[verdict(1), verdict(2)]))
    store.commit(Batch(verdicts=[verdict(1, outcome="reject"), verdict(3)]))
    assert [seq for _, seq in positions(store)] == [1, 2, 3]
    assert store.find(verdict(1).key).outcome == "pass"
    assert [seq for _, seq in positions(store, after=positions(store)[1][0])] == [3]


def test_positions_are_never_given_again_even_when_old_verdicts_are_deleted(store, new_store):
    store.commit(Batch(verdicts=[verdict(1), verdict(2)]))
    last = positions(store)[-1][0]
    delete_verdicts(store)
    other = new_store()
    other.commit(Batch(verdicts=[verdict(3)]))
    assert positions(other)[0][0] > last


def test_epochs_come_back_with_what_lies_above_the_prefix_in_the_order_of_their_beginning(store, new_store):
    other = progress(0, station="cell8", begins=None)
    store.commit(Batch(verdicts=[verdict(n) for n in (1, 2, 5, 6, 9)], progress=[progress(2)], new_gaps=[gap(11, 12)]))
    store.commit(Batch(progress=[other]))
    store.commit(Batch(progress=[progress(3)]))
    first, second = new_store().epochs()
    assert (first.progress, second.progress) == (progress(3), other)
    assert first.above == [(5, 6), (9, 9)]
    assert first.gaps == [gap(11, 12)]


def test_the_prefix_never_goes_back(store):
    store.commit(Batch(progress=[progress(9)]))
    store.commit(Batch(progress=[progress(7, root="acme/moved")]))
    assert store.epochs()[0].progress == progress(9, root="acme/moved")


def test_a_gap_that_is_closed_in_part_leaves_its_rest(store):
    store.commit(Batch(new_gaps=[gap(1, 5)], progress=[progress(5)]))
    store.commit(Batch(verdicts=[verdict(3)], closed_gaps=[gap(1, 5)], new_gaps=[gap(1, 2), gap(4, 5)]))
    assert store.epochs()[0].gaps == [gap(1, 2), gap(4, 5)]


def test_a_rejected_message_that_repeats_is_counted_in_one_row_and_the_newest_rows_are_kept(store, monkeypatch):
    for second in range(3):
        store.commit(Batch(rejected=[rejected(moment=NOW + timedelta(seconds=second))]))
    store.commit(Batch(rejected=[rejected(b"other \0")]))
    assert rows(store, "SELECT reason, times, size_bytes FROM rejected ORDER BY times") == [
        ("not JSON", 1, 7),
        ("not JSON", 3, 1),
    ]


def test_how_far_a_loop_has_come_is_kept_by_consumer(store, new_store):
    assert store.handed_over("mes") == 0
    store.set_handed_over("mes", 7)
    store.set_handed_over("mes", 9)
    assert (new_store().handed_over("mes"), new_store().handed_over("other")) == (9, 0)


def test_a_batch_is_stored_as_a_whole_or_not_at_all(store):
    impossible = replace(verdict(2), trigger=1 << 70)
    with pytest.raises(RowRefused, match="refuses"):
        store.commit(Batch(verdicts=[verdict(1), impossible], progress=[progress(2)]))
    assert (positions(store), store.epochs()) == ([], [])
    store.commit(Batch(verdicts=[verdict(1)]))
    assert [seq for _, seq in positions(store)] == [1]


def test_text_that_databases_dislike_is_stored_all_the_same(store):
    odd = verdict(1, partId="a\0b", detail="\0 \ud800", later={"\0": ["\udfff"]})
    store.commit(Batch(verdicts=[odd]))
    assert store.find(odd.key).part_id == "a\ufffdb"
    assert set(store.find(odd.key).message) == set(odd.message)


def nested(depth):
    """The payload of a verdict that is so deep, with an escape that makes the store look into all of it."""
    text = json.dumps(verdict_fields("cell7", EPOCH, 1, detail="\u00e9"))
    return f'{text[:-1]}, "x": {"[" * (depth - 1)}{"]" * (depth - 1)}}}'.encode()


@pytest.mark.parametrize(("depth", "verdicts"), [(MAX_DEPTH, 1), (MAX_DEPTH + 1, 0), (600, 0), (980, 0)])
def test_a_verdict_is_stored_or_rejected_however_deep_it_is(store, depth, verdicts):
    plan = Ledger().plan([Arrived("acme/cell7", "verdict", nested(depth), NOW)])
    store.commit(plan.batch({}))
    assert len(positions(store)) == verdicts
    assert rows(store, "SELECT size_bytes FROM rejected") == [(len(nested(depth)),)][verdicts:]


def test_many_brackets_side_by_side_are_not_deep(store):
    wide = verdict(1, regions=[{"zone": f"[{number}]"} for number in range(500)])
    store.commit(Batch(verdicts=[wide]))
    assert store.find(wide.key).message == wide.message


def test_an_unreadable_message_on_a_topic_of_any_length_is_put_aside(store):
    root = "acme/" + random.Random(7).randbytes(20_000).hex()  # what compresses would fit into an index
    plan = Ledger().plan([Arrived(root, "verdict", b"no JSON", NOW), Arrived("ä" * 9000, "status", b"no JSON", NOW)])
    store.commit(plan.batch({}))
    assert rows(store, "SELECT topic FROM rejected ORDER BY topic") == [(root[:250],), ("ä" * 250,)]


def test_what_is_too_large_for_an_index_of_postgresql_is_refused_for_good(server):
    pytest.importorskip("psycopg")
    store = PostgresStore(server.url())
    store.open()
    with pytest.raises(RowRefused, match="index row"):
        store.commit(Batch(progress=[progress(1, station=random.Random(7).randbytes(20_000).hex())]))
    store.close()


def test_a_store_that_is_not_open_says_so(new_store):
    store = new_store()
    store.close()
    with pytest.raises(StoreError, match="not"):
        store.commit(Batch(verdicts=[verdict(1)]))


def test_a_sqlite_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE verdict (guilty INTEGER)")
    connection.close()
    with pytest.raises(StoreError, match="something else"):
        SqliteStore(path).open()
    path.write_bytes(b"no database at all" * 100)
    with pytest.raises(StoreError, match="not a database"):
        SqliteStore(path).open()
    with pytest.raises(StoreError, match="folder exists"):
        SqliteStore(tmp_path / "absent" / "v.sqlite").open()


def test_a_sqlite_store_syncs_every_commit_to_the_disk(tmp_path):
    store = SqliteStore(tmp_path / "v.sqlite")
    store.open()
    with store._reading() as connection:
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    store.close()


def test_tables_of_others_with_our_names_are_left_alone_in_postgresql(server):
    psycopg = pytest.importorskip("psycopg")
    with psycopg.connect(server.url()) as connection:
        connection.execute("CREATE SCHEMA court")
        connection.execute("CREATE TABLE court.verdict (guilty BOOLEAN)")
    with pytest.raises(StoreError, match="another schema"):
        PostgresStore(server.url("court")).open()


def test_a_database_that_is_not_there_is_a_store_error_without_the_password(server):
    pytest.importorskip("psycopg")
    store = PostgresStore(f"postgresql://mes:secret@127.0.0.1:{server.port}/nowhere")
    with pytest.raises(StoreError, match="nowhere") as caught:
        store.open()
    assert "secret" not in f"{caught.value} {store!r}"


@pytest.mark.parametrize(
    "conninfo",
    [
        "postgresql://mes:Ge%heim@127.0.0.1/plant",
        "postgresql://mes:Ge/heim@127.0.0.1/plant",
        "postgresql://mes:12/heim@127.0.0.1/plant",
        "postgresql://mes:a@heim@127.0.0.1/plant",
        "postgresql://mes:Ge/h?eim=1@127.0.0.1/plant",
        "user=mes password=Ge heim",
    ],
)
def test_a_connection_string_that_cannot_be_read_is_an_error_without_the_password(conninfo):
    pytest.importorskip("psycopg")
    with pytest.raises(SettingsError, match="percent-encode") as caught:
        PostgresStore(conninfo).open()
    assert "eim" not in f"{caught.value} {caught.value.__cause__!r}"
    assert caught.value.__context__ is None or caught.value.__suppress_context__


@pytest.mark.parametrize(
    "conninfo", ["", "host=@socket", "postgresql://mes:a%40%2F%25b@h1:5,h2/p?host=/run/postgresql"]
)
def test_a_connection_string_that_can_be_read_is_taken(conninfo):
    pytest.importorskip("psycopg")
    PostgresStore(conninfo)


def test_a_server_that_went_without_a_word_is_noticed_within_seconds(server):
    pytest.importorskip("psycopg")
    store = PostgresStore(server.url())
    store.open()
    with store._using() as connection:
        given = connection.info.get_parameters()
    store.close()
    assert int(given["tcp_user_timeout"]) == TCP_USER_TIMEOUT_MS <= 30_000


def delete_verdicts(store):
    if isinstance(store, SqliteStore):
        with store._transaction() as connection:
            connection.execute("DELETE FROM verdict")
    else:
        with store._using() as connection:
            connection.execute("DELETE FROM verdict")


def rows(store, query):
    with store._reading() if isinstance(store, SqliteStore) else store._using() as connection:
        return connection.execute(query).fetchall()
