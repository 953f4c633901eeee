"""An outbox that is an old copy of itself: noticed by what a consumer has, and begun anew without losing a part."""

import contextlib
import json
import shutil

import pytest

from agent.errors import OutboxFull
from agent.mqtt.delivery import BROKER, OTHERS_WAIT_S, Contradiction, Delivery, Standing
from agent.outbox.contact import Contact
from agent.outbox.outbox import Outbox, OutboxSettings
from agent.publishing.messages import HeatmapPayload

STATION = "cell7"
OK = 0


def opened(folder, *consumers):
    box = Outbox(OutboxSettings(folder, reserve_mb=0.0), STATION)
    box.set_consumers(consumers or ("mes",))
    return contextlib.closing(box)


def parts(*triggers):
    return [({"station": STATION, "trigger": trigger, "heatmap": None}, None) for trigger in triggers]


def triggers(rows):
    return [json.loads(row.payload)["trigger"] for row in rows]


def handed_over(box, upto):
    """As the courier does: note it, then give it, then hear."""
    box.note_contact()
    box.read(0, upto)
    assert box.acknowledge("mes", upto)


@pytest.fixture
def copy(tmp_path):
    """The folder of an outbox put back as it was at seq 3, while the MES has 5; the epoch, too."""
    folder = tmp_path / "outbox"
    with opened(folder) as box:
        box.store(parts(1, 2, 3))
        handed_over(box, 3)
    shutil.copytree(folder, tmp_path / "copy")
    with opened(folder) as box:
        epoch = box.epoch
        box.store(parts(4, 5))
        handed_over(box, 5)
    shutil.rmtree(folder)
    return (tmp_path / "copy").rename(folder), epoch


def test_the_last_row_that_all_have_is_kept_to_be_sent_again_and_no_longer_waits(tmp_path):
    with opened(tmp_path / "outbox") as box:
        box.store(parts(1, 2, 3))
        handed_over(box, 2)
        assert triggers([box.witness(2)]) == [2]
        assert (box.first_seq, box.waiting, triggers(box.read(0, 10))) == (3, 1, [3])
        handed_over(box, 3)
    with opened(tmp_path / "outbox") as box:
        assert triggers([box.witness(3)]) == [3]
        assert (box.witness(2), box.witness(4), box.waiting) == (None, None, 0)


def test_what_can_have_been_handed_out_is_what_was_stored_until_the_run_before_ended(tmp_path):
    with opened(tmp_path / "outbox") as box:
        assert (box.contact, box.is_new_epoch) == (Contact(0, in_touch=True), True)
        box.store(parts(1, 2))
    for triggers_of_run in (3, 4):  # two runs in which no consumer was heard
        with opened(tmp_path / "outbox") as box:
            assert (box.contact, box.is_new_epoch) == (Contact(2, in_touch=False), False)
            box.store(parts(triggers_of_run))
    with opened(tmp_path / "outbox") as box:
        box.note_contact()
        assert box.contact == Contact(2, in_touch=True)
    with opened(tmp_path / "outbox") as box:
        assert box.contact == Contact(4, in_touch=False)


def test_an_outbox_of_before_this_was_written_down_can_have_handed_out_all_that_it_has(tmp_path):
    with opened(tmp_path / "outbox") as box:
        box.store(parts(1, 2))
        box._database._writer.execute("DELETE FROM about WHERE name = 'contact'")
    with opened(tmp_path / "outbox") as box:
        assert box.contact == Contact(2, in_touch=False)


def test_an_old_copy_gives_what_was_stored_since_new_keys_and_forgets_what_the_consumer_has(copy):
    folder, epoch = copy
    with opened(folder) as box:
        assert box.epoch == epoch
        again = box.store(parts(6, 7))
        assert [message["seq"] for message in again] == [4, 5]  # as 4 and 5 were
        assert box.renew("mes", 5)
        assert box.epoch != epoch
        rows = box.read(0, 10)
        assert [(row.seq, json.loads(row.payload)["trigger"]) for row in rows] == [(1, 6), (2, 7)]
        assert json.loads(rows[1].payload)["resultId"] == f"{STATION}/{box.epoch}/2"
        assert box.acknowledged() == {"mes": 0}
        assert [alarm.code for alarm in box.alarms()] == ["outbox_old_copy"]
        assert f"mes has seq 5 of epoch {epoch}, which it handed out up to 3" in box.alarms()[0].detail
        assert box.store(parts(8))[0]["seq"] == 3
        new = box.epoch
    with opened(folder) as box:
        assert (box.epoch, triggers(box.read(0, 10)), box.alarms()) == (new, [6, 7, 8], [])
        assert box.contact == Contact(3, in_touch=False, doubted="mes")


def test_a_crash_between_the_mark_and_the_new_epoch_leaves_the_old_one_whole(copy, monkeypatch):
    folder, epoch = copy

    def crash(*_):
        raise OutboxFull("crashed")

    with opened(folder) as box:
        box.store(parts(6))
        monkeypatch.setattr("agent.outbox.database.renumber", crash)
        assert not box.renew("mes", 5)
        assert box.epoch == epoch
    monkeypatch.undo()
    with opened(folder) as box:
        assert (box.epoch, triggers(box.read(0, 10))) == (epoch, [6])
        assert box.renew("mes", 5)
        assert triggers(box.read(0, 10)) == [6]


def test_the_new_epoch_waits_until_the_others_have_what_is_left_of_the_old_one(tmp_path):
    folder = tmp_path / "outbox"
    with opened(folder, "mes", "archive") as box:
        box.store(parts(1, 2))
    with opened(folder, "mes", "archive") as box:
        box.store(parts(3))
        assert not box.renew("mes", 9)
        assert "once archive has what is left" in box.alarms()[0].detail
        box.read(0, 2)
        assert box.acknowledge("archive", 2)
        assert box.renew("mes", 9)
        assert (box.acknowledged(), triggers(box.read(0, 10))) == ({"archive": 0, "mes": 0}, [3])


def test_heatmaps_of_rows_with_new_keys_are_no_longer_linked(copy):
    folder, _ = copy
    picture = HeatmapPayload(b"x" * 100, "0" * 64, width=8, height=8, full_scale=1.0)
    with opened(folder) as box:
        message = {"station": STATION, "trigger": 6, "heatmap": {"topic": None, "sha256": picture.sha256}}
        assert box.store([(message, picture)])[0]["heatmap"] is not None
        assert box.renew("mes", 5)
        assert (json.loads(box.read(0, 1)[0].payload)["heatmap"], box.heatmaps_waiting) == (None, 0)


def test_a_damaged_row_is_still_one_under_its_new_key(copy):
    folder, _ = copy
    with opened(folder) as box:
        box.store(parts(6, 7))
        box._database._writer.execute("UPDATE waiting SET payload = x'00' WHERE seq = 4")
        assert box.renew("mes", 5)
        assert [row.topic for row in box.read(0, 10)] == ["missing", "verdict"]


def test_a_consumer_that_began_an_epoch_is_doubted_until_it_says_something_that_can_be_true(copy):
    folder, _ = copy
    with opened(folder) as box:
        box.store(parts(6))
        box.renew("mes", 5)
    with opened(folder) as box:
        assert box.contact.doubted == "mes"
        box.note_contact(heard="archive")
        assert box.contact.doubted == "mes"
        box.note_contact(heard="mes")
    with opened(folder) as box:
        assert box.contact.doubted == ""


def sent(delivery, now_s=0.0):
    """Send all that may go out and let the broker take it; return it."""
    seqs = []
    while (seq := delivery.next(now_s)) is not None and len(seqs) < 1000:
        delivery.published(len(seqs), seq, now_s)
        delivery.confirmed(len(seqs), OK, now_s)
        seqs.append(seq)
    return seqs


def reopened(last, standing=None, **acknowledged):
    delivery = Delivery(acknowledged or {"mes": 3}, last, standing or Standing(3, has_witness=True))
    delivery.connected(64)
    return delivery


def test_new_rows_wait_until_the_consumer_has_said_where_it_stands_and_it_is_asked_by_a_row_that_it_has():
    delivery = reopened(5)
    assert sent(delivery) == [3]
    assert sent(delivery, 0.5) == []
    assert sent(delivery, 1.0) == [3]  # asked again, later each time
    assert sent(delivery, 2.5) == []
    assert delivery.resent == 0
    assert delivery.acknowledge("mes", 3, resend=False, now_s=2.6)
    assert sent(delivery, 2.6) == [4, 5]
    assert delivery.contradiction is None


def test_what_was_stored_in_runs_before_goes_out_to_a_consumer_that_has_said_nothing():
    delivery = reopened(5, mes=1)
    assert sent(delivery) == [2, 3]
    assert delivery.acknowledge("mes", 3, resend=False, now_s=0.1)
    assert sent(delivery, 0.1) == [4, 5]


def test_a_first_word_beyond_what_was_handed_out_contradicts_and_nothing_new_goes_out():
    delivery = reopened(9)
    assert sent(delivery) == [3]
    assert not delivery.acknowledge("mes", 4, resend=True, now_s=0.1)
    assert delivery.contradiction == Contradiction("mes", 4)
    assert not delivery.acknowledge("mes", 3, resend=True, now_s=0.2)
    assert [seq for second in range(100) for seq in sent(delivery, second)] == [3] * 6


def test_only_the_first_word_of_a_run_contradicts():
    delivery = reopened(9)
    assert delivery.acknowledge("mes", 3, resend=False, now_s=0.0)
    assert not delivery.acknowledge("mes", 10**9, resend=False, now_s=0.0)
    assert delivery.contradiction is None
    assert sent(delivery) == [4, 5, 6, 7, 8, 9]


def test_a_consumer_that_began_this_epoch_by_its_word_cannot_do_so_again():
    delivery = reopened(5, Standing(3, has_witness=True, doubted="mes"))
    assert not delivery.acknowledge("mes", 10**9, resend=False, now_s=0.0)
    assert delivery.contradiction is None


def test_nobody_can_contradict_an_epoch_that_began_in_this_run():
    delivery = Delivery({"mes": 0}, 5)
    delivery.connected(64)
    assert sent(delivery) == [1, 2, 3, 4, 5]
    assert not delivery.acknowledge("mes", 10**9, resend=False, now_s=0.0)
    assert delivery.contradiction is None


def test_one_that_is_away_is_not_waited_for_once_another_has_spoken():
    delivery = reopened(5, mes=3, archive=3)
    sent(delivery)
    assert delivery.acknowledge("mes", 3, resend=False, now_s=1.0)
    assert set(sent(delivery, 0.9 + OTHERS_WAIT_S)) <= {3}
    assert sent(delivery, 1.0 + OTHERS_WAIT_S) == [4, 5]
    assert not delivery.acknowledge("archive", 40, resend=True, now_s=9.0)  # it comes, and has more
    assert delivery.contradiction == Contradiction("archive", 40)
    delivery.stored(9)
    assert sent(delivery, 9.0) == []


def test_the_first_new_row_has_to_do_where_no_other_is_left_to_ask_with():
    delivery = reopened(9, Standing(3))
    assert sent(delivery) == [4]
    assert delivery.acknowledge("mes", 4, resend=False, now_s=0.1)
    assert sent(delivery, 0.1) == [5, 6, 7, 8, 9]


def test_where_the_brokers_word_is_all_there_is_nothing_waits():
    delivery = reopened(5, **{BROKER: 3})
    assert sent(delivery) == [4, 5]
