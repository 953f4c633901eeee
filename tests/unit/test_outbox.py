import contextlib
import hashlib
import json
import shutil
import sqlite3
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from agent.errors import OutboxFull, StorageError
from agent.outbox.database import FILE, Row, checksum
from agent.outbox.folder import discard, kept_rows
from agent.outbox.outbox import MemoryOutbox, Outbox, OutboxSettings, Taken
from agent.publishing.messages import HeatmapPayload

STATION = "cell7"


def verdict(trigger, detail="", link=None):
    return {"schema": "taktsight.verdict/1", "station": STATION, "trigger": trigger, "detail": detail, "heatmap": link}


def with_picture(trigger):
    data = trigger.to_bytes(4, "big") * 500
    payload = HeatmapPayload(data, hashlib.sha256(data).hexdigest(), width=8, height=8, full_scale=1.0)
    return verdict(trigger, link={"topic": None, "sha256": payload.sha256}), payload


def batch(*triggers):
    return [(verdict(trigger), None) for trigger in triggers]


def numbers(rows):
    return [row.seq for row in rows]


def content(row):
    return json.loads(row.payload)


def codes(outbox):
    return [alarm.code for alarm in outbox.alarms()]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "outbox"


@pytest.fixture
def outbox(folder):
    """Returns a function that opens the outbox, as at the start of the agent; the last one is closed first."""
    opened = []

    def start(station=STATION, **changes):
        for one in opened:
            one.close()
        opened.append(Outbox(OutboxSettings(folder, reserve_mb=0.1, **changes), station))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def change(folder, statement, *values):
    """Change the file behind the outbox's back."""
    with contextlib.closing(sqlite3.connect(folder / FILE, isolation_level=None)) as connection:
        connection.execute(statement, values)


def test_a_new_outbox_is_empty_and_waits_for_nobody(outbox):
    box = outbox()
    assert (box.first_seq, box.last_seq, box.waiting, box.read(0, 10)) == (1, 0, 0, [])
    assert (box.alarms(), box.acknowledged(), len(box.epoch)) == ([], {}, 12)


def test_a_stored_verdict_is_read_back_byte_for_byte_as_it_was_returned(outbox):
    box = outbox()
    messages = box.store(batch(7, 8))
    rows = box.read(0, 10)
    assert [content(row) for row in rows] == messages
    assert [(row.seq, row.topic) for row in rows] == [(1, "verdict"), (2, "verdict")]
    assert messages[1]["resultId"] == f"{STATION}/{box.epoch}/2"
    assert box.read(1, 10) == rows[1:]
    assert box.read(0, 1) == rows[:1]
    assert outbox().read(0, 10) == rows


def test_epoch_and_seq_go_on_over_restarts_even_where_all_was_acknowledged(outbox):
    box = outbox()
    box.set_consumers(["mes"])
    box.store(batch(1, 2, 3))
    box.read(0, 10)
    assert box.acknowledge("mes", 3)
    again = outbox()
    assert (again.epoch, again.first_seq, again.last_seq, again.waiting) == (box.epoch, 4, 3, 0)
    assert again.store(batch(4))[0]["seq"] == 4


def test_how_far_the_source_is_taken_is_there_after_a_restart_with_the_rows(outbox):
    box = outbox()
    assert box.taken is None
    box.store(batch(1, 2), Taken("a" * 12, 2))
    box.store(batch(3))
    assert box.taken == Taken("a" * 12, 2)
    box = outbox()
    assert (box.taken, box.last_seq) == (Taken("a" * 12, 2), 3)
    box.store(batch(4), Taken("b" * 12, 1))
    assert outbox().taken == Taken("b" * 12, 1)


def test_how_far_the_source_is_taken_is_in_the_transaction_of_the_rows(outbox, monkeypatch):
    box = outbox()
    box.store(batch(1), Taken("a" * 12, 1))
    honest = box._database._write_about

    def refusing(name, value):
        if name == "taken":
            raise OutboxFull("disk full")
        honest(name, value)

    monkeypatch.setattr(box._database, "_write_about", refusing)
    with pytest.raises(OutboxFull):
        box.store(batch(2, 3), Taken("a" * 12, 3))
    assert (box.taken, box.last_seq) == (Taken("a" * 12, 1), 1)
    box = outbox()
    assert (box.taken, numbers(box.read(0, 10))) == (Taken("a" * 12, 1), [1])


def test_a_batch_that_the_disk_refuses_takes_nothing_from_the_source(outbox):
    box = outbox(max_mb=0.2)
    taken = 0
    with pytest.raises(OutboxFull):
        for taken in range(1, 10_000):
            box.store([(verdict(taken, "x" * 5000), None)], Taken("a" * 12, taken))
    assert taken > 1
    assert box.taken == Taken("a" * 12, taken - 1)
    assert outbox().taken == Taken("a" * 12, taken - 1)


def test_an_outbox_of_before_that_says_nothing_of_its_source_opens(outbox, folder):
    box = outbox()
    box.store(batch(1, 2), Taken("a" * 12, 2))
    box.close()
    change(folder, "DELETE FROM about WHERE name = 'taken'")
    box = outbox()
    assert (box.taken, box.last_seq, box.alarms()) == (None, 2, [])
    box.store(batch(3), Taken("b" * 12, 1))
    assert outbox().taken == Taken("b" * 12, 1)


def test_a_new_epoch_knows_nothing_of_the_source(outbox, folder):
    box = outbox()
    box.store(batch(1), Taken("a" * 12, 1))
    box.close()
    (folder / FILE).unlink()
    assert outbox().taken is None


def test_rows_go_only_when_every_consumer_has_them(outbox, folder):
    box = outbox()
    box.set_consumers(["mes", "backup"])
    box.store(batch(*range(1, 11)))
    box.read(0, 10)
    box.acknowledge("mes", 10)
    assert (box.first_seq, box.acknowledged()) == (1, {"backup": 0, "mes": 10})
    box.acknowledge("backup", 4)
    assert numbers(box.read(0, 100)) == [5, 6, 7, 8, 9, 10]
    box.close()
    with contextlib.closing(sqlite3.connect(folder / FILE)) as connection:
        assert connection.execute("SELECT min(seq), count(*) FROM waiting").fetchone() == (4, 7)  # and the witness


def test_a_new_consumer_starts_at_the_first_kept_row_and_a_forgotten_one_holds_nothing_back(outbox):
    box = outbox()
    box.set_consumers(["mes", "slow"])
    box.store(batch(1, 2, 3))
    box.read(0, 10)
    box.acknowledge("mes", 3)
    box.set_consumers(["mes"])
    assert box.waiting == 0
    box.set_consumers(["mes", "new"])
    assert box.acknowledged() == {"mes": 3, "new": 3}


@pytest.mark.parametrize(("consumer", "upto"), [("stranger", 1), ("mes", 3), ("mes", -1)])
def test_an_acknowledgement_that_cannot_be_meant_is_refused(outbox, consumer, upto):
    box = outbox()
    box.set_consumers(["mes"])
    box.store(batch(1, 2))
    box.read(0, 10)
    assert not box.acknowledge(consumer, upto)
    assert box.waiting == 2


def test_what_was_never_handed_out_cannot_be_acknowledged_but_what_waited_before_the_restart_can(outbox):
    box = outbox()
    box.set_consumers(["mes"])
    box.store(batch(1, 2))
    assert not box.acknowledge("mes", 2)
    assert outbox().acknowledge("mes", 2)


def test_an_older_acknowledgement_takes_nothing_back(outbox):
    box = outbox()
    box.set_consumers(["mes"])
    box.store(batch(1, 2, 3))
    box.read(0, 10)
    assert box.acknowledge("mes", 3)
    assert box.acknowledge("mes", 1)
    assert box.acknowledged() == {"mes": 3}


def test_a_crash_after_an_acknowledgement_brings_rows_again_and_loses_none(outbox, folder, tmp_path):
    box = outbox()
    box.set_consumers(["mes"])
    box.store(batch(1, 2, 3))
    box.read(0, 10)
    box.acknowledge("mes", 2)
    shutil.copytree(folder, tmp_path / "crashed")
    with contextlib.closing(Outbox(OutboxSettings(tmp_path / "crashed", reserve_mb=0), STATION)) as after:
        assert (after.last_seq, numbers(after.read(after.first_seq - 1, 10))[-1]) == (3, 3)


def test_a_batch_is_stored_whole_or_not_at_all(outbox):
    box = outbox()
    with pytest.raises(ValueError, match="JSON"):
        box.store([with_picture(1), (verdict(2, detail=float("nan")), None)])
    assert (box.last_seq, box.next_heatmap(10)) == (0, None)
    assert box.store(batch(3))[0]["seq"] == 1


def test_an_empty_batch_stores_nothing(outbox):
    box = outbox()
    assert (box.store([]), box.last_seq) == ([], 0)


def test_heatmaps_are_linked_by_the_seq_of_their_verdict_and_outlive_a_restart(outbox):
    box = outbox()
    box.store([*batch(1), with_picture(2)])
    assert content(box.read(1, 1)[0])["heatmap"]["topic"] == "heatmap/2"
    box = outbox()
    assert box.next_heatmap(1) is None
    assert box.next_heatmap(2).data == with_picture(2)[1].data
    box.remove_heatmap(2)
    assert box.next_heatmap(2) is None


def test_a_verdict_whose_heatmap_could_not_be_kept_links_to_none(outbox):
    box = outbox(heatmap_mb=0.001)
    message = box.store([with_picture(1)])[0]
    assert (message["heatmap"], box.heatmaps_shed) == (None, 1)


def test_beyond_its_size_the_outbox_refuses_keeps_what_it_has_and_goes_on_after_acknowledgements(outbox):
    box, warned_at = outbox(max_mb=0.3), 0
    box.set_consumers(["mes"])
    with pytest.raises(OutboxFull, match="bring the consumers back"):
        for trigger in range(1000):
            box.store([(verdict(trigger, detail="x" * 2000), None)])
            warned_at = trigger if codes(box) == ["storage_low"] and not warned_at else warned_at
    full = box.last_seq
    assert 50 < full < 150
    assert 0.3 * full < warned_at < 0.7 * full  # long before
    assert codes(box) == ["storage_full", "storage_low"]
    assert numbers(box.read(0, 1000)) == list(range(1, full + 1))
    box.acknowledge("mes", full)
    assert box.store(batch(1))[0]["seq"] == full + 1
    assert codes(box) == []


def test_a_refused_row_goes_into_quarantine_and_a_missing_has_its_place_over_restarts(outbox):
    box = outbox()
    box.store([*batch(1), with_picture(2), *batch(3)])
    original = box.read(0, 10)
    row = box.quarantine(2, "the broker takes 2500 bytes")
    assert (row.topic, content(row)["first"], content(row)["last"]) == ("missing", 2, 2)
    assert content(row)["why"] == "the broker takes 2500 bytes"
    assert box.read(0, 10) == [original[0], row, original[2]]
    assert box.next_heatmap(3) is None
    assert box.quarantine(2, "again") == row
    box = outbox()
    assert box.read(0, 10) == [original[0], row, original[2]]
    assert codes(box) == ["verdicts_quarantined"]


def test_a_row_that_does_not_wait_cannot_go_into_quarantine(outbox):
    box = outbox()
    box.store(batch(1))
    with pytest.raises(StorageError, match="does not wait"):
        box.quarantine(1, "never handed out")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE waiting SET payload = x'7b7d' WHERE seq = 2",
        "UPDATE waiting SET payload = '{}' WHERE seq = 2",
        "UPDATE waiting SET topic = 'missing' WHERE seq = 2",
        "UPDATE waiting SET topic = CAST(x'ff' AS TEXT) WHERE seq = 2",
        "UPDATE waiting SET checksum = x'00' WHERE seq = 2",
    ],
)
def test_a_changed_row_comes_as_missing_and_is_kept_in_quarantine(outbox, folder, statement):
    box = outbox()
    box.store(batch(1, 2, 3))
    before = box.read(0, 10)
    box.close()
    change(folder, statement)
    box = outbox()
    rows = box.read(0, 10)
    assert [row.topic for row in rows] == ["verdict", "missing", "verdict"]
    assert [rows[0], rows[2]] == [before[0], before[2]]
    box = outbox()
    assert box.read(0, 10) == rows
    assert codes(box) == ["verdicts_quarantined"]


@pytest.mark.parametrize(("where", "lost"), [("seq = 1", {1}), ("seq BETWEEN 2 AND 3", {2, 3}), ("seq >= 4", {4, 5})])
def test_rows_lost_from_the_file_come_as_missing_so_that_nobody_waits_for_them(outbox, folder, where, lost):
    box = outbox()
    box.store(batch(1, 2, 3, 4, 5))
    box.close()
    change(folder, f"DELETE FROM waiting WHERE {where}")
    box = outbox()
    rows = box.read(0, 3) + box.read(3, 3)
    assert numbers(rows) == [1, 2, 3, 4, 5]
    assert {row.seq for row in rows if row.topic == "missing"} == lost
    assert codes(box) == ["verdicts_quarantined"]
    assert box.store(batch(6))[0]["seq"] == 6


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / FILE).write_bytes(b"no database at all" * 500),
        lambda folder: (folder / FILE).write_bytes((folder / FILE).read_bytes()[:5000]),
        lambda folder: (folder / FILE).write_bytes(b""),
        lambda folder: (folder / FILE).unlink(),
        lambda folder: change(folder, "DROP TABLE waiting"),
        lambda folder: change(folder, "UPDATE about SET value = '0' WHERE name = 'last_seq'"),
        lambda folder: change(
            folder, "UPDATE about SET value = '1', checksum = ? WHERE name = 'last_seq'", checksum(0, "last_seq", b"1")
        ),
        lambda folder: change(folder, "DELETE FROM about WHERE name = 'identity'"),
    ],
)
def test_a_damaged_database_is_kept_aside_and_a_new_epoch_begins_by_saying_so(outbox, folder, damage):
    box = outbox()
    box.set_consumers(["mes"])
    box.store([with_picture(1), *batch(2, 3)])
    old = box.epoch
    box.close()
    damage(folder)
    box = outbox()
    box.set_consumers(["mes"])
    assert box.epoch != old
    assert not box.acknowledge("mes", 3)
    (notice,) = box.read(0, 10)
    assert (notice.seq, notice.topic, content(notice)["first"], content(notice)["last"]) == (1, "missing", 1, 1)
    assert f"epoch {old} ended at seq 3" in content(notice)["why"]
    assert codes(box) == ["database_damaged"]
    assert len(list(folder.glob("damaged-*"))) == 1
    assert box.store(batch(4))[0]["seq"] == 2
    assert box.next_heatmap(10) is None
    assert outbox().epoch == box.epoch


def test_a_crash_before_the_consumers_were_told_of_a_damaged_database_tells_them_at_the_next_start(outbox, folder):
    outbox().close()
    (folder / FILE).unlink()
    box = outbox()
    assert [row.topic for row in box.read(0, 10)] == ["missing"]
    box.close()
    next(folder.glob("damaged-*/told")).unlink()
    assert [row.topic for row in outbox().read(0, 10)] == ["missing", "missing"]
    assert outbox().last_seq == 2


def test_an_older_copy_of_the_file_is_noticed_because_its_seqs_were_used_already(outbox, folder):
    box = outbox()
    box.store(batch(1))
    box.close()
    copy = (folder / FILE).read_bytes()
    box = outbox()
    box.store(batch(2))
    box.close()
    (folder / FILE).write_bytes(copy)
    box = outbox()
    assert codes(box) == ["database_damaged"]


def test_damage_in_mid_run_costs_the_batch_nothing_and_is_seen_by_the_reader(outbox, folder):
    box = outbox()
    box.set_consumers(["mes"])
    box.store(batch(1, 2, 3))
    box.read(0, 10)
    old = box.epoch
    change(folder, "DROP TABLE waiting")
    (message,) = box.store(batch(4))
    assert (message["seq"], message["epoch"]) == (2, box.epoch)
    assert box.epoch != old
    assert not box.acknowledge("mes", 3)
    assert [row.topic for row in box.read(0, 10)] == ["missing", "verdict"]
    assert box.acknowledge("mes", 2)


def test_a_reader_that_meets_the_damage_first_gets_nothing_and_then_the_new_epoch(outbox, folder):
    box = outbox()
    box.store(batch(1, 2, 3))
    old = box.epoch
    change(folder, "ALTER TABLE waiting RENAME TO elsewhere")
    assert box.read(0, 10) == []
    assert box.epoch != old
    assert "0 undelivered messages can still be read" in content(box.read(0, 10)[0])["why"]


def test_another_stations_folder_is_refused(outbox):
    outbox()
    with pytest.raises(StorageError, match="outbox of station cell7, wanted cell8: give each station its own"):
        outbox(station="cell8")


def test_an_outbox_of_a_later_version_is_refused_and_left_alone(outbox, folder):
    outbox().close()
    text = json.dumps({"format": 99, "station": STATION, "epoch": "0" * 12})
    change(
        folder,
        "UPDATE about SET value = ?, checksum = ? WHERE name = 'identity'",
        text,
        checksum(0, "identity", text.encode()),
    )
    with pytest.raises(StorageError, match="format 99, this version reads 1"):
        outbox()
    assert not list(folder.glob("damaged-*"))


def test_a_folder_in_use_is_refused_until_it_is_let_go(folder):
    with contextlib.closing(Outbox(OutboxSettings(folder, reserve_mb=0), STATION)):
        with pytest.raises(StorageError, match="used by another process"):
            Outbox(OutboxSettings(folder, reserve_mb=0), STATION)
        with pytest.raises(StorageError, match="stop the agent"):
            next(kept_rows(folder))
    Outbox(OutboxSettings(folder, reserve_mb=0), STATION).close()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="give the outbox a folder it can write"):
        Outbox(OutboxSettings(tmp_path / "file" / "outbox"), STATION)


def test_a_closed_outbox_stores_nothing_and_closes_twice(outbox):
    box = outbox()
    box.close()
    box.close()
    with pytest.raises(StorageError, match="closed"):
        box.store(batch(1))
    assert box.read(0, 10) == []


def test_a_person_can_export_what_waits_is_quarantined_or_was_set_aside_and_then_discard_it(outbox, folder):
    box = outbox()
    box.store(batch(1, 2, 3, 4))
    box.read(0, 10)
    box.quarantine(4, "too large")
    box.close()
    change(folder, "UPDATE waiting SET payload = x'7b7d' WHERE seq = 2")
    (folder / "last-seq").write_bytes((folder / "last-seq").read_bytes()[:13])
    change(folder, "DELETE FROM about WHERE name = 'acknowledged'")
    box = outbox()
    box.store(batch(5))
    box.close()
    files = {path: path.stat().st_mtime_ns for path in folder.glob("outbox.db*")}
    rows = list(kept_rows(folder))
    assert [(row.state, row.seq, row.topic, row.intact) for row in rows] == [
        ("quarantined", 4, "verdict", True),
        ("set aside", 1, "verdict", True),
        ("set aside", 2, "verdict", False),
        ("set aside", 3, "verdict", True),
        ("set aside", 4, "missing", True),
        ("waiting", 1, "missing", True),
        ("waiting", 2, "verdict", True),
    ]
    assert (rows[0].why, json.loads(rows[0].payload)["trigger"]) == ("too large", 4)
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert discard(folder) == 1
    assert [row.state for row in kept_rows(folder)] == ["waiting", "waiting"]
    assert codes(outbox()) == []


def test_a_folder_without_an_outbox_cannot_be_exported(tmp_path):
    with pytest.raises(StorageError, match="name the folder of an outbox"):
        next(kept_rows(tmp_path))


def test_one_thread_stores_while_another_reads_and_acknowledges(outbox):
    box = outbox()
    box.set_consumers(["mes"])
    stop, seen = threading.Event(), []

    def deliver():
        while not (stop.is_set() and box.waiting == 0):
            rows = box.read(box.first_seq - 1, 64)
            seen.extend(numbers(rows))
            if rows:
                box.acknowledge("mes", rows[-1].seq)

    thread = threading.Thread(target=deliver)
    thread.start()
    for start in range(0, 600, 3):
        box.store(batch(start, start + 1, start + 2))
    stop.set()
    thread.join(timeout=20)
    assert seen == list(range(1, 601))
    assert box.alarms() == []


def test_a_memory_outbox_numbers_verdicts_and_remembers_the_last_thousand():
    box = MemoryOutbox()
    for start in range(0, 1100, 2):
        box.store(batch(start, start + 1))
    assert (box.last_seq, len(box.messages), box.messages[-1]["seq"]) == (1100, 1000, 1100)
    assert (box.messages[0]["epoch"], box.alarms(), box.taken) == (box.epoch, [], None)
    box.store(batch(1), Taken("a" * 12, 1))
    assert box.taken == Taken("a" * 12, 1)
    box.close()


class Life(RuleBasedStateMachine):
    """Any order of store, read, acknowledge, quarantine, restart and crash, against a plain list."""

    @initialize()
    def begin(self):
        self.home = Path(tempfile.mkdtemp())
        self.generation = 0
        self.box = self.opened()
        self.epoch = self.box.epoch
        self.names = ["a"]
        self.box.set_consumers(self.names)
        self.written = []  # trigger numbers; seq is the place, from 1
        self.gone = set()  # seqs in quarantine
        self.acknowledged = 0  # the highest seq that all consumers of the time had
        self.trigger = 0

    def opened(self):
        return Outbox(OutboxSettings(self.home / str(self.generation), reserve_mb=0), STATION)

    @rule(count=st.integers(1, 5))
    def store(self, count):
        triggers = [self.trigger + place for place in range(count)]
        self.trigger += count
        messages = self.box.store(batch(*triggers))
        assert [message["seq"] for message in messages] == [len(self.written) + 1 + place for place in range(count)]
        self.written += triggers

    @rule(who=st.integers(0, 1), share=st.floats(0, 1))
    def acknowledge(self, who, share):
        self.box.read(self.box.first_seq - 1, 10**6)
        name = self.names[who % len(self.names)]
        known = self.box.acknowledged()[name]
        assert self.box.acknowledge(name, known + round(share * (len(self.written) - known)))
        self.acknowledged = max(self.acknowledged, min(self.box.acknowledged().values()))

    @rule(two=st.booleans())
    def change_consumers(self, two):
        self.names = ["a", "b"] if two else ["a"]
        self.box.set_consumers(self.names)
        self.acknowledged = max(self.acknowledged, min(self.box.acknowledged().values()))

    @rule(share=st.floats(0, 1))
    def quarantine(self, share):
        rows = self.box.read(self.box.first_seq - 1, 10**6)
        if rows:
            row = rows[round(share * (len(rows) - 1))]
            assert self.box.quarantine(row.seq, "refused").topic == "missing"
            self.gone.add(row.seq)

    @rule()
    def restart(self):
        before = self.box.acknowledged()
        self.box.close()
        self.box = self.opened()
        assert self.box.acknowledged() == before

    @rule()
    def crash(self):
        shutil.copytree(self.home / str(self.generation), self.home / str(self.generation + 1))
        self.box.close()
        self.generation += 1
        self.box = self.opened()
        self.box.set_consumers(self.names)

    @invariant()
    def every_seq_is_readable_reported_missing_or_acknowledged_by_all(self):
        if not hasattr(self, "box"):
            return
        assert (self.box.epoch, self.box.last_seq, self.box.alarms() == []) == (
            self.epoch,
            len(self.written),
            not self.gone,
        )
        assert self.box.first_seq <= self.acknowledged + 1
        rows = self.box.read(0, 10**6)
        assert numbers(rows) == list(range(self.box.first_seq, len(self.written) + 1))
        for row in rows:
            assert row.topic == ("missing" if row.seq in self.gone else "verdict")
            assert row.topic == "missing" or content(row)["trigger"] == self.written[row.seq - 1]

    def teardown(self):
        if hasattr(self, "box"):
            self.box.close()
            shutil.rmtree(self.home)


TestAnyLife = Life.TestCase
TestAnyLife.settings = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def test_the_checksum_tells_seq_topic_and_payload_apart():
    sums = {checksum(1, "verdict", b"x"), checksum(2, "verdict", b"x"), checksum(1, "missing", b"x")}
    assert len(sums | {checksum(1, "verdict", b"y")}) == 4
    assert Row(1, "verdict", b"x") == Row(1, "verdict", b"x")
