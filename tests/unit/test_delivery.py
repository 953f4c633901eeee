import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.mqtt.delivery import BROKER, FIRST_WAIT_S, LONGEST_WAIT_S, WINDOW, Ack, Answer, Delivery, read_ack

OK, NOBODY, DENIED, TOO_LARGE = 0x00, 0x10, 0x87, 0x95
ANSWERS = {"answer": OK, "nobody": NOBODY, "denied": DENIED, "unfit": TOO_LARGE}


class Broker:
    """Drives a Delivery as a courier does; the answers wait in `unanswered` until the test gives them."""

    def __init__(self, delivery, window=WINDOW):
        self.delivery, self.window = delivery, window
        self.now_s, self.tags = 0.0, 0
        self.unanswered = {}  # seq by tag
        self.seen = []
        delivery.connected(window)

    def send(self, most=10_000):
        sent = []
        while len(sent) < most and (seq := self.delivery.next(self.now_s)) is not None:
            self.tags += 1
            self.delivery.published(self.tags, seq, self.now_s)
            self.unanswered[self.tags] = seq
            sent.append(seq)
        self.seen += sent
        return sent

    def answer(self, code=OK, tag=None):
        tag = next(iter(self.unanswered)) if tag is None else tag
        del self.unanswered[tag]
        return self.delivery.confirmed(tag, code, self.now_s)[0]

    def answer_all(self, code=OK):
        while self.unanswered:
            self.answer(code)

    def exchange(self):
        """Send and confirm until nothing more goes out."""
        sent = []
        while more := self.send():
            sent += more
            self.answer_all()
        return sent

    def wait(self, seconds):
        self.now_s += seconds

    def lose(self, *, blame=False):
        self.unanswered.clear()
        return self.delivery.lost(blame=blame)

    def connect(self):
        self.delivery.connected(self.window)

    def ack(self, name, upto, *, resend=False):
        return self.delivery.acknowledge(name, upto, resend=resend, now_s=self.now_s)


def to(*names, last=0, **acknowledged):
    return Delivery({name: acknowledged.get(name, 0) for name in names}, last)


def test_a_connection_begins_with_one_row_and_opens_the_window_once_it_was_taken():
    broker = Broker(to("mes", last=200))
    assert broker.send() == [1]
    broker.answer_all()
    assert broker.send() == list(range(2, WINDOW + 1))


def test_a_window_is_no_wider_than_the_broker_announces():
    broker = Broker(to("mes", last=200), window=20)
    broker.send()
    broker.answer_all()
    assert broker.send() == list(range(2, 22))


def test_a_consumer_that_acknowledges_gets_everything_once():
    broker = Broker(to("mes", last=500))
    while broker.exchange():
        broker.ack("mes", broker.seen[-1])
    assert broker.seen == list(range(1, 501))
    assert broker.delivery.waiting == broker.delivery.resent == 0


def test_an_acknowledgement_that_cannot_be_true_is_not_believed():
    broker = Broker(to("mes", last=0))
    broker.delivery.stored(10)
    broker.send()
    assert not broker.ack("mes", 2)  # only row 1 was ever sent
    assert not broker.ack("stranger", 1)
    assert not broker.ack(BROKER, 1)
    assert broker.delivery.acknowledged == {"mes": 0}


def test_an_older_acknowledgement_changes_nothing():
    broker = Broker(to("mes", last=10))
    broker.exchange()
    assert broker.ack("mes", 7)
    assert broker.ack("mes", 3)
    assert broker.delivery.acknowledged == {"mes": 7}


def test_a_silent_consumer_is_sent_one_row_at_intervals_that_double_up_to_a_minute():
    broker = Broker(to("mes", last=100))
    broker.exchange()
    times = []
    for _ in range(2400):
        broker.wait(0.25)
        if sent := broker.exchange():
            assert sent == [1]
            times.append(broker.now_s)
    assert [later - earlier for earlier, later in zip([0.0, *times], times, strict=False)] == [
        1.0, 2.0, 4.0, 8.0, 16.0, 32.0, *[60.0] * (len(times) - 6)
    ]  # fmt: skip
    assert len(times) < 20


def test_a_consumer_that_is_back_gets_all_from_its_own_mark_at_once():
    broker = Broker(to("mes", last=100))
    broker.exchange()
    broker.wait(3000.0)
    broker.exchange()
    broker.ack("mes", 5, resend=True)
    assert broker.exchange() == list(range(6, 6 + WINDOW))


def test_wishes_for_a_resend_are_granted_once_a_second():
    broker = Broker(to("mes", last=100))
    broker.exchange()
    for _ in range(100):
        broker.ack("mes", 0, resend=True)
        broker.exchange()
        broker.wait(0.01)
    assert len(broker.seen) <= 3 * WINDOW


def test_a_live_consumer_is_not_held_up_by_an_absent_one():
    broker = Broker(to("mes", "archive", last=0))
    for last in range(1, 1001):
        broker.delivery.stored(last)
        sent = broker.exchange()
        assert last in sent
        broker.ack("mes", last)
        broker.wait(0.05)
    assert len(broker.seen) < 1000 + 10  # the absent one costs a row now and then
    broker.ack("archive", 0, resend=True)
    broker.seen.clear()
    while sent := broker.exchange():
        broker.ack("archive", max(sent))
    assert broker.seen == list(range(1, 1001))


def test_two_consumers_at_the_same_row_share_it():
    broker = Broker(to("mes", "archive", last=50))
    broker.exchange()
    broker.ack("mes", 50)
    broker.ack("archive", 50)
    assert broker.seen == list(range(1, 51))


def test_what_was_in_flight_goes_out_again_in_order_after_a_lost_connection():
    broker = Broker(to(BROKER, last=10))
    broker.send()
    broker.answer_all()
    broker.send()
    broker.answer(tag=4)
    broker.lose()
    assert broker.send() == []
    broker.connect()
    assert broker.exchange() == list(range(2, 11))
    assert broker.delivery.resent == 9


def test_confirmations_out_of_order_count_from_the_contiguous_prefix():
    broker = Broker(to(BROKER, last=10))
    broker.send()
    broker.answer_all()
    broker.send()
    for tag in (5, 4, 2):
        broker.answer(tag=tag)
    assert broker.delivery.acknowledged == {BROKER: 2}
    broker.answer(tag=3)
    assert broker.delivery.acknowledged == {BROKER: 5}


@pytest.mark.parametrize(("code", "answer"), [(NOBODY, Answer.UNHEARD), (DENIED, Answer.REFUSED)])
def test_what_the_broker_does_not_pass_on_waits_longer_each_time_and_goes_out_in_order(code, answer):
    broker = Broker(to(BROKER, last=30))
    broker.send()
    broker.answer_all()
    broker.send()
    assert broker.answer(code) is answer
    assert broker.delivery.is_refused is (code == DENIED)
    broker.answer_all(code)
    sent = []
    for _ in range(1000):
        broker.wait(0.1)
        if more := broker.send():
            sent.append(broker.now_s)
            assert more == [2]
            broker.answer_all(code)
    assert [round(later - earlier) for earlier, later in zip([0.0, *sent], sent, strict=False)] == [1, 2, 4, 8, 16, 32]
    broker.wait(LONGEST_WAIT_S)
    assert broker.exchange() == list(range(2, 31))
    assert broker.delivery.acknowledged == {BROKER: 30}
    assert not broker.delivery.is_refused


def test_an_acknowledgement_ends_the_wait_for_a_subscriber():
    broker = Broker(to("mes", last=30))
    broker.send()
    broker.answer_all(NOBODY)
    assert broker.send() == []
    broker.ack("mes", 0, resend=True)
    assert broker.exchange() == list(range(1, 31))


def test_a_row_that_the_broker_will_never_take_is_replaced_by_its_notice():
    broker = Broker(to(BROKER, last=5))
    broker.send()
    assert broker.answer(TOO_LARGE) is Answer.UNFIT
    broker.delivery.replaced(1)
    assert broker.exchange() == [1, 2, 3, 4, 5]
    assert broker.delivery.acknowledged == {BROKER: 5}


def poisoned(broker, poison, *, answered=True):
    """Connect again and again until a row is given up; the broker hangs up on `poison`. Returns (losses, row)."""
    for losses in range(1, 30):
        broker.connect()
        if answered:
            broker.delivery.answered()
        while sent := broker.send():
            for tag, seq in list(broker.unanswered.items()):
                if seq == poison:
                    break
                broker.answer(tag=tag)
            if poison in sent:
                break
        guilty = broker.lose(blame=True)
        if guilty is not None:
            return losses, guilty
    return None


@pytest.mark.parametrize("names", [(BROKER,), ("mes",)])
@pytest.mark.parametrize("poison", [1, 2, 40])
def test_a_row_that_makes_the_broker_hang_up_is_found_after_five_connections(names, poison):
    broker = Broker(to(*names, last=100))
    losses, guilty = poisoned(broker, poison)
    assert guilty == poison
    assert 5 <= losses <= 6  # the first one may have taken rows before
    broker.delivery.replaced(poison)
    broker.connect()
    broker.delivery.answered()
    assert poison in broker.exchange()
    assert not broker.delivery.is_alone


def test_a_broker_that_never_answers_anything_costs_no_row():
    assert poisoned(Broker(to(BROKER, last=100)), 1, answered=False) is None


def test_connections_lost_without_blame_cost_no_row():
    broker = Broker(to(BROKER, last=100))
    for _ in range(50):
        broker.connect()
        broker.delivery.answered()
        broker.send()
        assert broker.lose(blame=False) is None
    assert not broker.delivery.is_alone


def test_a_connection_that_brings_something_new_clears_the_suspicion():
    broker = Broker(to(BROKER, last=100))
    for _ in range(50):
        broker.connect()
        broker.send(1)
        broker.answer_all()
        broker.send(1)
        assert broker.lose(blame=True) is None
        assert not broker.delivery.is_alone


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"no", b"[]", b"{}", b"\xff", b"[" * 1000, b" " * 1025,
        b'{"schema":"taktsight.ack/1","epoch":"abc","upto":-1,"resend":true}',
        b'{"schema":"taktsight.ack/1","epoch":"abc","upto":true,"resend":true}',
        b'{"schema":"taktsight.ack/1","epoch":"abc","upto":1.0,"resend":true}',
        b'{"schema":"taktsight.ack/1","epoch":"abc","upto":1,"resend":0}',
        b'{"schema":"taktsight.ack/1","epoch":7,"upto":1,"resend":true}',
        b'{"schema":"taktsight.ack/2","epoch":"abc","upto":1,"resend":true}',
        b'{"schema":"taktsight.ack/1","epoch":"abc","upto":' + b"9" * 900 + b'e9,"resend":true}',
    ],
)  # fmt: skip
def test_what_is_no_acknowledgement_is_refused(payload):
    with pytest.raises(ValueError):
        read_ack(payload)


def test_an_acknowledgement_is_read():
    message = {"schema": "taktsight.ack/1", "epoch": "0123456789ab", "upto": 7, "resend": False, "more": "ignored"}
    assert read_ack(json.dumps(message).encode()) == Ack("0123456789ab", 7, False)


@st.composite
def scripts(draw):
    often = ["store", "send", "send", "answer", "answer", "answer", "ack", "ack", "resend", "lose", "wait", "sleep"]
    events = st.sampled_from([*often, "unfit", "nobody", "denied"])
    return draw(st.lists(events, max_size=120)), draw(st.integers(0, 2**31)), draw(st.booleans())


class World:
    """A plant of consumers that store what arrives; it checks what must hold at every step."""

    def __init__(self, seed, by_broker):
        self.random = random.Random(seed)
        self.names = [BROKER] if by_broker else ["live", "late", "absent"]
        self.delivery = Delivery(dict.fromkeys(self.names, 0), 0)
        self.broker = Broker(self.delivery, window=self.random.choice([1, 5, 20, 64]))
        self.has = {name: set() for name in self.names}  # what each consumer stored
        self.last = 0

    def prefix(self, name):
        upto = 0
        while upto + 1 in self.has[name]:
            upto += 1
        return upto

    def step(self, event):
        before = self.delivery.acknowledged
        match event:
            case "store":
                self.last += self.random.randint(1, 40)
                self.delivery.stored(self.last)
            case "send":
                for seq in self.broker.send(self.random.randint(1, 100)):
                    assert 1 <= seq <= self.last
                    wanted = [name for name in self.names if before[name] < seq <= before[name] + WINDOW]
                    assert wanted or self.names == [BROKER]
            case "ack" | "resend" if self.names != [BROKER]:
                for name in ("live", "late"):
                    assert self.broker.ack(name, self.prefix(name), resend=event == "resend")
            case "lose":
                self.broker.lose()
                assert self.broker.send() == []
                self.broker.connect()
            case "wait" | "sleep":
                self.broker.wait(0.3 if event == "wait" else LONGEST_WAIT_S)
            case _ if event in ANSWERS and self.broker.unanswered:
                self.answer(event)
        self.check(before)

    def answer(self, event):
        tag = self.random.choice(list(self.broker.unanswered))
        seq = self.broker.unanswered[tag]
        self.broker.answer(ANSWERS[event], tag)
        if event == "unfit":
            self.delivery.replaced(seq)
        if event == "answer":
            arrives = [name for name in self.names if name in (BROKER, "live")]
            arrives += ["late"] if "late" in self.names and self.random.random() < 0.5 else []
            for name in arrives:
                self.has[name].add(seq)

    def check(self, before):
        for name, upto in self.delivery.acknowledged.items():
            assert before[name] <= upto <= self.prefix(name), "deleted before it arrived"
        assert len(self.broker.unanswered) <= self.broker.window
        assert self.delivery.acknowledged.get("absent", 0) == 0

    def finish(self):
        """From now on the broker takes all, and live and late consumers store and acknowledge all."""
        for _ in range(3000):
            for seq in self.broker.send():
                for name in self.names:
                    if name != "absent":
                        self.has[name].add(seq)
            self.broker.answer_all()
            for name in set(self.names) - {BROKER, "absent"}:
                self.broker.ack(name, self.prefix(name))
            acknowledged = self.delivery.acknowledged
            if all(upto == self.last for name, upto in acknowledged.items() if name != "absent"):
                return
            self.broker.wait(FIRST_WAIT_S)
        raise AssertionError(f"never delivered: {acknowledged} of {self.last}")


@settings(max_examples=300, deadline=None)
@given(scripts())
def test_whatever_happens_every_row_reaches_every_consumer_that_keeps_acknowledging(script):
    events, seed, by_broker = script
    world = World(seed, by_broker)
    for event in events:
        world.step(event)
    world.finish()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31))
def test_a_consumer_alone_never_has_more_than_the_window_out(seed):
    rng = random.Random(seed)
    broker = Broker(to("mes", last=1000))
    acked = 0
    for _ in range(60):
        broker.send(rng.randint(1, 100))
        while broker.unanswered and rng.random() < 0.9:
            broker.answer()
        assert max(broker.seen) <= acked + WINDOW
        acked = rng.randint(acked, max(broker.seen))
        broker.ack("mes", acked, resend=rng.random() < 0.1)
        broker.wait(rng.choice([0.01, 2.0]))
        if rng.random() < 0.1:
            broker.lose()
            broker.connect()
