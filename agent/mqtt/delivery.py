"""Which row of the outbox goes out next, and who has what: pure logic, without clock, network or disk.

Every consumer has a cursor: `acked` (it has all up to here) and `sent` (up to here it was told since it last began
anew). A row goes out once for all cursors that stand before it. A consumer that stays silent is sent its first
unacknowledged row again, and only that one, at growing intervals: it cannot hold up others, nor flood the broker. Once
it speaks, its part is sent again from acked + 1 (go-back-N) within its own window.

In a run on an outbox of before, rows that were stored since wait until a consumer has said where it stands: `Standing`.

Every connection begins with one row in flight, until the broker has taken it; a refusal, and an answer that nobody
listens, lead back to that. So the order holds when a broker changes its mind, and the row at the head is soon known
if it is the one that makes the broker hang up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto

OTHERS_WAIT_S = 2.0  # from the first consumer that speaks in a run, before those that have not are taken to be away
WINDOW = 64  # rows that a consumer may have out
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0  # before a silent consumer, or a refusing broker, is tried again
LOSSES_TO_SUSPECT = 3  # connections that broke with rows out and no new row taken; then one row at a time
LOSSES_TO_CONVICT = 2  # of these, with the same row alone in flight on a connection that had worked

BROKER = ""  # the one consumer where the broker's own confirmation is all there is
CONSUMER_NAME = re.compile(r"[A-Za-z0-9_-]{1,32}")

ACK_SCHEMA = "taktsight.ack/1"
MOST_ACK_BYTES = 1024

NO_SUBSCRIBERS = 0x10  # MQTT 5: accepted, but nobody listens
FIRST_FAILURE = 0x80  # MQTT 5: this reason code and all above are refusals
UNFIT = frozenset({0x90, 0x95, 0x99})  # topic name invalid, packet too large, payload format invalid: this message only


class Answer(Enum):
    """What the broker's answer to one row means."""

    UNKNOWN = auto()  # to none that is still in flight
    TAKEN = auto()
    UNHEARD = auto()  # nobody listens: it waits
    REFUSED = auto()  # the broker's state: it waits
    UNFIT = auto()  # this row will never be taken


@dataclass(frozen=True, slots=True)
class Ack:
    """A consumer has every row up to `upto` of this epoch; `resend`: and would like the rest now."""

    epoch: str
    upto: int
    resend: bool


def read_ack(payload: bytes) -> Ack:
    """Return the acknowledgement. Raises ValueError if it is none."""
    if len(payload) > MOST_ACK_BYTES:
        raise ValueError(f"{len(payload)} bytes, an acknowledgement has at most {MOST_ACK_BYTES}")
    try:
        message = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(message, dict) or message.get("schema") != ACK_SCHEMA:
        raise ValueError(f"not a {ACK_SCHEMA}")
    epoch, upto, resend = message.get("epoch"), message.get("upto"), message.get("resend")
    if not isinstance(epoch, str) or type(upto) is not int or upto < 0 or not isinstance(resend, bool):
        raise ValueError("epoch, upto or resend is missing or of another type")
    return Ack(epoch, upto, resend)


@dataclass(frozen=True, slots=True)
class Standing:
    """What consumers can have of an epoch that began in an earlier run: `agent.outbox.contact`."""

    certain: int  # highest seq that they can have been handed
    has_witness: bool = False  # a row that all have is there, to make them answer
    doubted: str = ""  # the consumer that began this epoch by its word: it cannot contradict another time


@dataclass(frozen=True, slots=True)
class Contradiction:
    """A consumer has more of this epoch than the outbox can have handed out: the outbox is an old copy."""

    consumer: str
    upto: int


@dataclass(slots=True)
class _Cursor:
    """How far one consumer is."""

    acked: int
    sent: int
    is_silent: bool = False  # sent one row at a time until it speaks
    wait_s: float = FIRST_WAIT_S  # for a sign of life, before acked + 1 goes out again
    resend_at_s: float = 0.0  # means something while sent > acked
    heeded_s: float = -FIRST_WAIT_S  # when its wish for a resend was last granted
    turn: int = 0  # when it was served last

    def go_back(self) -> None:
        self.sent = self.acked

    def spoke(self, now_s: float) -> None:
        self.is_silent, self.wait_s = False, FIRST_WAIT_S
        self.resend_at_s = now_s + self.wait_s


@dataclass(frozen=True, slots=True)
class _InFlight:
    seq: int
    since_s: float


class Delivery:
    """The state of the delivery of one epoch. Times are of a monotonic clock; tags are the caller's, one per packet."""

    def __init__(self, acknowledged: Mapping[str, int], last: int, standing: Standing | None = None) -> None:
        """acknowledged: by consumer, {BROKER: n} where there is none. last: highest seq that is stored.

        standing: None where nothing is in doubt: an epoch that began in this run.
        """
        self._cursors = {name: _Cursor(acked, acked) for name, acked in acknowledged.items()}
        self._last = last
        self._window = 0  # 0 while there is no connection
        self._in_flight: dict[int, _InFlight] = {}
        self._is_narrow = True  # one row in flight
        self._answered = False  # this connection has worked: the broker confirmed something on it
        self._held_since_s = self._held_until_s = float("-inf")
        self._pause_s = FIRST_WAIT_S  # of the next hold
        self._confirmed: set[int] = set()  # beyond BROKER's `acked`
        self._highest = self._taken = max(acknowledged.values(), default=0)  # seq published, seq taken by the broker
        self._standing = standing
        self._offered = last if standing is None else standing.certain  # highest seq that a consumer can have
        self.is_in_touch = standing is None or BROKER in acknowledged
        self.contradiction: Contradiction | None = None
        self._heard: set[str] = set()  # consumers that spoke in this run
        self._heard_all_at_s = float("inf")  # when those that have not spoken are taken to be away
        self._probe_at_s, self._probe_wait_s = float("-inf"), FIRST_WAIT_S
        self._losses = 0
        self._accused, self._accusations = 0, 0
        self._turn = 0
        self.is_refused = False  # by the broker's state; until it takes a row
        self.resent = 0  # rows published more than once

    @property
    def acknowledged(self) -> dict[str, int]:
        """By consumer: the seq up to which it has everything."""
        return {name: cursor.acked for name, cursor in self._cursors.items()}

    @property
    def waiting(self) -> int:
        """How many rows some consumer does not have."""
        return max((self._last - cursor.acked for cursor in self._cursors.values()), default=0)

    @property
    def is_alone(self) -> bool:
        """True while a row is suspected to make the broker hang up: nothing else should be in flight."""
        return self._losses >= LOSSES_TO_SUSPECT

    @property
    def in_flight(self) -> int:
        """Rows that the broker has not answered."""
        return len(self._in_flight)

    def unanswered_since_s(self) -> float | None:
        """Return since when the oldest row in flight waits for the broker's answer."""
        return min((flight.since_s for flight in self._in_flight.values()), default=None)

    def stored(self, last: int) -> None:
        """Rows up to `last` exist."""
        self._last = last

    def connected(self, window: int) -> None:
        """A new connection is up; the broker takes this many rows in flight."""
        self._window = min(WINDOW, window)
        self._is_narrow, self._answered = True, False
        self._probe_at_s, self._probe_wait_s = float("-inf"), FIRST_WAIT_S

    def answered(self) -> None:
        """The broker confirmed something else on this connection: it works."""
        self._answered = True

    def lost(self, *, blame: bool) -> int | None:
        """The connection is gone; return the seq of a row that must be given up because it is to blame, or None.

        blame: the broker hung up in a way that a message may have caused.
        """
        seqs = {flight.seq for flight in self._in_flight.values()}
        was_alone, worked = self.is_alone, self._answered
        self._window = 0
        self._in_flight.clear()
        self._confirmed.clear()
        for cursor in self._cursors.values():
            cursor.go_back()
        if not blame or not seqs:
            return None
        self._losses += 1
        if not (was_alone and worked and len(seqs) == 1):
            return None
        accused = min(seqs)
        self._accusations = self._accusations + 1 if accused == self._accused else 1
        self._accused = accused
        return accused if self._accusations >= LOSSES_TO_CONVICT else None

    def next(self, now_s: float) -> int | None:
        """Return the seq to publish now; None: nothing may go out."""
        if now_s < self._held_until_s or len(self._in_flight) >= self._room():
            return None
        asking, limit = [], self._limit(now_s)
        for cursor in self._cursors.values():
            if cursor.sent > cursor.acked and now_s >= cursor.resend_at_s and not self._is_by_broker():
                cursor.go_back()
                cursor.is_silent, cursor.wait_s = True, min(2 * cursor.wait_s, LONGEST_WAIT_S)
            if cursor.sent < limit and cursor.sent - cursor.acked < (1 if cursor.is_silent else WINDOW):
                asking.append(cursor)
        if asking:
            return min(asking, key=lambda cursor: cursor.turn).sent + 1
        return self._standing.certain if self._standing is not None and self._probes(now_s) else None

    def is_witness(self, seq: int) -> bool:
        """True for a row that all consumers have: it is sent for the sake of their answer."""
        return all(seq <= cursor.acked for cursor in self._cursors.values())

    def give_up_witness(self) -> None:
        """There is no such row, or the broker does not take it: the first new row has to do."""
        if self._standing is not None:
            self._standing = replace(self._standing, has_witness=False)

    def published(self, tag: int, seq: int, now_s: float) -> None:
        """The row went out in the packet with this tag."""
        self._in_flight[tag] = _InFlight(seq, now_s)
        if self.is_witness(seq):
            self._probe_at_s = now_s + self._probe_wait_s
            self._probe_wait_s = min(2 * self._probe_wait_s, LONGEST_WAIT_S)
            return
        self.resent += seq <= self._highest
        self._highest = max(self._highest, seq)
        self._offered = max(self._offered, seq)
        self._turn += 1
        for cursor in self._cursors.values():
            if cursor.sent == seq - 1:
                if cursor.sent == cursor.acked:
                    cursor.resend_at_s = now_s + cursor.wait_s
                cursor.sent, cursor.turn = seq, self._turn

    def replaced(self, seq: int) -> None:
        """A notice took the place of this row: it goes out (again)."""
        self._in_flight = {tag: flight for tag, flight in self._in_flight.items() if flight.seq != seq}
        self._accusations = 0
        for cursor in self._cursors.values():
            if cursor.sent >= seq:
                cursor.sent = max(cursor.acked, seq - 1)

    def confirmed(self, tag: int, code: int, now_s: float) -> tuple[Answer, int]:
        """Return what the broker's reason code for a packet means, and the packet's seq (0: none in flight)."""
        flight = self._in_flight.pop(tag, None)
        if flight is None:
            return Answer.UNKNOWN, 0
        self._answered = True
        if code in UNFIT:
            return Answer.UNFIT, flight.seq
        is_probe = flight.since_s > self._held_since_s  # sent since the last refusal: it speaks for the state of now
        if code >= FIRST_FAILURE or code == NO_SUBSCRIBERS:
            if is_probe:
                self._hold(now_s)
            self.is_refused = code >= FIRST_FAILURE
            return Answer.REFUSED if code >= FIRST_FAILURE else Answer.UNHEARD, flight.seq
        if is_probe:
            self._is_narrow, self.is_refused, self._pause_s = False, False, FIRST_WAIT_S
        self._note_progress(flight.seq)
        if self._is_by_broker() and flight.seq > self._cursors[BROKER].acked:
            self._confirmed.add(flight.seq)
            self._advance_prefix()
        return Answer.TAKEN, flight.seq

    def refuse(self, now_s: float) -> None:
        """The next row cannot go out, and cannot be given up either: wait."""
        self.is_refused = True
        self._hold(now_s)

    def acknowledge(self, consumer: str, upto: int, *, resend: bool, now_s: float) -> bool:
        """Take in a consumer's acknowledgement; False if it cannot be true."""
        cursor = self._cursors.get(consumer)
        if cursor is None or consumer == BROKER or not self._believes(consumer, upto, now_s):
            return False
        if upto > cursor.acked:
            cursor.acked, cursor.sent = upto, max(cursor.sent, upto)
            cursor.spoke(now_s)
            self._note_progress(upto)
        if resend and now_s >= cursor.heeded_s + FIRST_WAIT_S:
            cursor.spoke(now_s)
            cursor.heeded_s = now_s
            cursor.go_back()
        elif resend:  # it repeats itself: soon enough
            cursor.resend_at_s = min(cursor.resend_at_s, cursor.heeded_s + FIRST_WAIT_S)
        if not self.is_refused:
            self._held_until_s = now_s  # somebody listens after all
        return True

    def _believes(self, consumer: str, upto: int, now_s: float) -> bool:
        """Judge what a consumer says; its first word in a run can show that the outbox is an old copy."""
        if self.contradiction is not None and self.contradiction.consumer == consumer:
            return False
        is_first = consumer not in self._heard
        self._heard.add(consumer)
        if upto > self._offered:
            if is_first and self._standing is not None and self._standing.doubted != consumer:
                self.contradiction = self.contradiction or Contradiction(consumer, upto)
            return False
        if self._heard_all_at_s == float("inf"):
            self._heard_all_at_s = now_s + OTHERS_WAIT_S
        return True

    def _limit(self, now_s: float) -> int:
        """Return the highest seq that may go out."""
        if self._standing is None:
            return self._last
        if self.contradiction is not None:
            return min(self._last, self._standing.certain)
        if not self.is_in_touch:
            self.is_in_touch = self._heard >= set(self._cursors) or now_s >= self._heard_all_at_s
        if self.is_in_touch:
            return self._last
        return min(self._last, self._standing.certain + (not self._standing.has_witness))

    def _probes(self, now_s: float) -> bool:
        """Return whether the row that all consumers have should go out, to make them answer."""
        if self.is_in_touch or self._standing is None or not self._standing.has_witness or now_s < self._probe_at_s:
            return False
        return all(cursor.acked == self._standing.certain for cursor in self._cursors.values())

    def _hold(self, now_s: float) -> None:
        """Publish nothing for a while, each time longer; then one row."""
        self._held_since_s, self._held_until_s = now_s, now_s + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_WAIT_S)
        self._is_narrow = True
        for cursor in self._cursors.values():
            cursor.go_back()

    def _room(self) -> int:
        if self.is_alone and not self._answered:
            return 0
        return min(self._window, 1) if self._is_narrow or self.is_alone else self._window

    def _note_progress(self, seq: int) -> None:
        if seq > self._taken:
            self._taken, self._losses, self._accusations = seq, 0, 0

    def _is_by_broker(self) -> bool:
        return BROKER in self._cursors

    def _advance_prefix(self) -> None:
        cursor = self._cursors[BROKER]
        while cursor.acked + 1 in self._confirmed:
            cursor.acked += 1
            self._confirmed.discard(cursor.acked)
        cursor.sent = max(cursor.sent, cursor.acked)
