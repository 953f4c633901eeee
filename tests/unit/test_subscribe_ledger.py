import itertools
import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from taktsight_subscribe.acks import LOST_AFTER_S, RESEND_MIN_S, Acks
from taktsight_subscribe.coverage import Coverage
from taktsight_subscribe.ledger import EPOCH_ENDED, NO_LONGER_KEPT, Arrived, Ledger
from taktsight_subscribe.messages import MAX_SEQ, Unreadable, read_missing, read_status, read_verdict
from taktsight_subscribe.store import Progress, StoredEpoch

from tests.scripted_station import missing_fields, status_fields, verdict_fields

NOW = datetime(2026, 11, 20, 10, tzinfo=UTC)
ROOT, EPOCH = "acme/cell7", "0123456789ab"
KEY = ("cell7", EPOCH)
few = st.integers(1, 40)
spans = st.tuples(few, few).map(lambda pair: (min(pair), max(pair)))


def arrived(message, *, kind=None, root=ROOT, refused=""):
    kind = kind or message["schema"].split(".")[1].split("/")[0]
    return Arrived(root, kind, json.dumps(message).encode(), NOW, refused)


def verdict(seq, **changes):
    return arrived(verdict_fields("cell7", EPOCH, seq, **changes))


def status(first, last, *, epoch=EPOCH, **changes):
    return arrived(status_fields("cell7", epoch, first, last, **changes))


def missing(first, last, why="the row was damaged"):
    return arrived(missing_fields("cell7", EPOCH, first, last, why))


def take(ledger, *arrivals):
    plan = ledger.plan(arrivals)
    ledger.adopt(plan)
    return plan


def upto(ledger):
    return ledger.books[KEY].coverage.upto


@given(st.lists(spans), spans)
def test_coverage_agrees_with_a_plain_set_of_numbers(added, asked):
    coverage, numbers = Coverage(), set()
    for first, last in added:
        coverage.add(first, last)
        numbers |= set(range(first, last + 1))
    assert coverage.upto == next(n for n in range(50) if n + 1 not in numbers)
    assert coverage.highest == max(numbers, default=0)
    assert {n for n in range(1, 45) if n in coverage} == numbers
    absent = [n for first, last in coverage.missing(*asked) for n in range(first, last + 1)]
    assert absent == [n for n in range(asked[0], asked[1] + 1) if n not in numbers]


@given(st.lists(st.one_of(few, spans), max_size=60), st.randoms(use_true_random=False))
def test_the_prefix_is_right_whatever_comes_in_whatever_order_and_batches(events, dice):
    ledger, stored, gone = Ledger(), set(), set()
    while events:
        size = dice.randint(1, 5)
        batch, events = events[:size], events[size:]
        plan = take(ledger, *(verdict(it) if isinstance(it, int) else missing(*it) for it in batch))
        new = [one.seq for one in plan.verdicts]
        assert len(new) == len(set(new))
        assert not stored & set(new)
        stored |= set(new)
        gone |= {n for gap in plan.new_gaps for n in range(gap.first, gap.last + 1)}
        assert upto(ledger) == next(n for n in range(100) if n + 1 not in stored | gone)
        in_gaps = {n for gap in ledger.books[KEY].gaps for n in range(gap.first, gap.last + 1)}
        assert not in_gaps & stored
        assert in_gaps | stored == stored | gone


def test_a_plan_that_was_not_stored_counts_for_nothing():
    ledger = Ledger()
    take(ledger, verdict(1))
    ledger.plan([verdict(2), missing(3, 9)])
    assert upto(ledger) == 1
    assert take(ledger, verdict(2)).verdicts[0].seq == 2


def test_a_new_consumer_starts_where_the_station_still_has_something():
    ledger = Ledger()
    plan = take(ledger, status(501, 700))
    assert (upto(ledger), plan.new_gaps) == (500, [])
    assert ledger.books[KEY].begins == 501


def test_verdicts_that_come_before_the_first_status_wait_for_it():
    ledger = Ledger()
    take(ledger, verdict(501), verdict(502))
    assert upto(ledger) == 0
    take(ledger, status(501, 502))
    assert upto(ledger) == 502


def test_the_next_epoch_of_a_known_station_is_ours_from_its_first_part():
    ledger = Ledger()
    take(ledger, verdict(1))
    take(ledger, status(4, 9, epoch="f" * 12))
    assert ledger.holes(("cell7", "f" * 12)) == [(1, 9)]
    assert ledger.no_longer_kept(("cell7", "f" * 12)) == [(1, 3)]


def test_a_hole_that_the_station_no_longer_keeps_becomes_a_gap_and_the_prefix_goes_on():
    ledger = Ledger()
    take(ledger, verdict(1), verdict(5), status(4, 5))
    assert ledger.no_longer_kept(KEY) == [(2, 3)]
    plan = ledger.plan_losses(KEY, [(2, 3)], NOW)
    ledger.adopt(plan)
    assert [(gap.first, gap.last, gap.reason) for gap in plan.new_gaps] == [(2, 3, NO_LONGER_KEPT)]
    assert upto(ledger) == 3
    assert ledger.holes(KEY) == [(4, 4)]


def test_holes_of_an_epoch_that_is_over_are_lost():
    ledger = Ledger()
    take(ledger, verdict(1), verdict(3), status(1, 0, epoch="f" * 12))
    assert ledger.no_longer_kept(KEY) == [(2, 2)]
    assert ledger.plan_losses(KEY, [(2, 2)], NOW).new_gaps[0].reason == EPOCH_ENDED


def test_a_verdict_that_was_given_up_and_comes_after_all_is_stored_and_its_gap_closed():
    ledger = Ledger()
    take(ledger, missing(1, 5))
    plan = take(ledger, verdict(3))
    assert [one.seq for one in plan.verdicts] == [3]
    assert [(gap.first, gap.last) for gap in plan.closed_gaps] == [(1, 5)]
    assert [(gap.first, gap.last) for gap in plan.new_gaps] == [(1, 2), (4, 5)]
    assert take(ledger, verdict(3)).verdicts == []


def test_a_verdict_that_the_database_refuses_is_kept_aside_and_does_not_block_the_line():
    ledger = Ledger()
    message = verdict_fields("cell7", EPOCH, 1)
    plan = take(ledger, arrived(message, refused="too deep"), verdict(2))
    assert [one.seq for one in plan.verdicts] == [2]
    assert (plan.rejected[0].reason, plan.new_gaps[0].reason, upto(ledger)) == ("too deep", "too deep", 2)


def at(root, message):
    return replace(message, root=root)


@pytest.mark.parametrize("message", [verdict(2, outcome="pass"), missing(2, 9), status(9, 8)])
def test_a_station_cannot_speak_in_the_name_of_another_one(message):
    ledger = Ledger()
    take(ledger, status(1, 0), verdict(1))
    plan = take(ledger, at("acme/cell8", message), verdict(2, outcome="reject"))
    assert [one.reason.split(":")[0] for one in plan.elsewhere] == ["station cell7 is known at acme/cell7"]
    assert plan.rejected == plan.elsewhere
    assert plan.rejected[0].topic == f"acme/cell8/{message.kind}"
    assert [(one.seq, one.outcome) for one in plan.verdicts] == [(2, "reject")]
    assert (plan.repeated, plan.new_gaps, list(ledger.statuses)) == ({}, [], [ROOT])
    assert (ledger.books[KEY].root, upto(ledger)) == (ROOT, 2)


def test_a_station_cannot_begin_an_epoch_of_another_one():
    ledger = Ledger()
    take(ledger, verdict(1))
    forged = arrived(verdict_fields("cell7", "f" * 12, 1), root="acme/cell8")
    assert len(take(ledger, forged).elsewhere) == 1
    assert list(ledger.books) == [KEY]
    own = arrived(verdict_fields("cell8", "f" * 12, 1), root="acme/cell8")
    assert take(ledger, own, forged, verdict(2)).elsewhere != []
    assert list(ledger.books) == [KEY, ("cell8", "f" * 12)]


def test_a_station_that_a_store_knows_at_two_topics_is_heard_at_both():
    other = StoredEpoch(Progress("cell7", "f" * 12, "acme/line4/cell7", 1, 5))
    ledger = Ledger([StoredEpoch(Progress(*KEY, ROOT, 1, 0)), other])
    elsewhere = arrived(verdict_fields("cell7", "f" * 12, 6), root="acme/line4/cell7")
    begun = arrived(verdict_fields("cell7", "e" * 12, 1), root="acme/line4/cell7")
    assert len(take(ledger, verdict(1), elsewhere, begun).verdicts) == 3
    assert len(take(ledger, at("acme/line4/cell7", verdict(2))).elsewhere) == 1


def test_what_the_broker_kept_of_before_the_first_status_is_stored_even_where_the_status_comes_first():
    ledger = Ledger()
    take(ledger, status(501, 500, deliveryMode="broker", consumers={}))
    plan = take(ledger, verdict(499), verdict(500), verdict(501), verdict(501))
    assert [one.seq for one in plan.verdicts] == [499, 500, 501]
    plan = take(ledger, arrived(verdict_fields("cell7", EPOCH, 498), refused="too odd"))
    assert ([one.reason for one in plan.rejected], plan.verdicts, plan.new_gaps) == (["too odd"], [], [])


def test_a_notice_of_a_billion_missing_parts_costs_no_more_than_one_of_one():
    ledger = Ledger()
    plan = take(ledger, missing(1, MAX_SEQ))
    assert (upto(ledger), len(plan.new_gaps)) == (MAX_SEQ, 1)


@pytest.mark.parametrize(
    ("payload", "why"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"schema": NaN}', "not JSON"),
        (b"[1]", "not a JSON object"),
        (b"{}", "schema 'None' found"),
        (json.dumps(verdict_fields("c", EPOCH, 1, schema="taktsight.verdict/2")).encode(), "update"),
        (json.dumps(verdict_fields("c", EPOCH, 0)).encode(), "seq"),
        (json.dumps(verdict_fields("c", EPOCH, True)).encode(), "seq"),
        (json.dumps(verdict_fields("c", EPOCH, 1.0)).encode(), "seq"),
        (json.dumps(verdict_fields("c", "short", 1)).encode(), "epoch"),
        (json.dumps(verdict_fields("\x1b[2J", EPOCH, 1)).encode(), "station"),
        (json.dumps(verdict_fields("c", EPOCH, 1, outcome=None)).encode(), "outcome"),
        (b'"' + b"x" * (1 << 20) + b'"', "bytes"),
    ],
)
def test_what_is_no_verdict_is_rejected_with_the_reason(payload, why):
    ledger = Ledger()
    plan = take(ledger, Arrived(ROOT, "verdict", payload, NOW), verdict(1))
    assert why in plan.rejected[0].reason
    assert (plan.rejected[0].topic, plan.rejected[0].size_bytes) == ("acme/cell7/verdict", len(payload))
    assert upto(ledger) == 1


def test_odd_fields_become_empty_columns_and_unknown_ones_are_kept():
    odd = verdict_fields("cell7", EPOCH, 1, run=7, score=10**400, threshold="x", partId="a\0b\ud800", trigger=-1)
    read = read_verdict(json.dumps({**odd, "creationTime": "yesterday"}).encode(), NOW)
    assert (read.run, read.score, read.threshold, read.trigger, read.created_utc) == (None,) * 5
    assert read.part_id == "a\ufffdb\ufffd"
    assert read.message["later"] == {"unknown": [1, None, "ä"]}


def test_a_status_without_consumers_or_without_an_outbox_is_read_for_what_it_says():
    by_broker = read_status(json.dumps(status_fields("c", EPOCH, 1, 2, deliveryMode="broker", consumers={})).encode())
    assert by_broker.acknowledged is None
    will = read_status(json.dumps({"schema": "taktsight.status/1", "station": "c", "state": "offline"}).encode())
    assert (will.epoch, will.first_seq, will.state) == (None, None, "offline")
    with pytest.raises(Unreadable, match="behind"):
        read_missing(json.dumps(missing_fields("c", EPOCH, 3, 2, "")).encode())


def test_an_acknowledgement_goes_out_at_once_then_rarely_and_in_the_end_always():
    ledger, acks = Ledger(), Acks()
    sent = []
    for n in range(1, 41):  # one part per millisecond
        take(ledger, verdict(n))
        acks.note(KEY)
        sent += [ack.upto for ack in acks.due(ledger, n / 1000)]
    assert sent == [1, 17, 33]
    assert [ack.upto for ack in acks.due(ledger, 0.1)] == [40]
    assert list(acks.due(ledger, 0.2)) == []


def test_a_hole_is_asked_for_again_ever_more_rarely_until_it_is_filled_or_lost():
    ledger, acks = Ledger(), Acks()
    take(ledger, verdict(1), verdict(3), status(2, 3))
    asked = []
    for tenth in range(1000):
        assert acks.watch_holes(ledger, tenth / 10) == {}
        asked += [tenth / 10 for ack in acks.due(ledger, tenth / 10) if ack.resend]
    waits = [later - earlier for earlier, later in itertools.pairwise(asked)]
    assert asked[0] >= 0.5
    assert waits[0] >= RESEND_MIN_S
    assert all(later >= earlier for earlier, later in itertools.pairwise(waits))
    assert len(asked) < 10
    take(ledger, status(4, 3))
    assert acks.watch_holes(ledger, 100.0 + LOST_AFTER_S) == {KEY: [(2, 2)]}
    take(ledger, verdict(2))
    assert acks.watch_holes(ledger, 200.0) == {}


def test_parts_at_the_end_that_only_the_status_knows_of_are_asked_for_too():
    ledger, acks = Ledger(), Acks()
    take(ledger, verdict(1), status(2, 4))
    acks.watch_holes(ledger, 0.0)
    assert list(acks.due(ledger, 1.0)) == []
    acks.watch_holes(ledger, 6.0)
    assert [(ack.upto, ack.resend) for ack in acks.due(ledger, 6.0)] == [(1, True)]
