"""The one thread between broker and store. Order per message: arrived -> committed -> acknowledged -> handed over.

    broker --> Connection.arrived --> Ledger.plan --> Store.commit --> PUBACK, ack/{consumer}
                                                          |
                                        the user's loop <-- HandOver

A message that is not committed is not acknowledged, so whatever fails in between, the station or the broker still has
it. What was committed waits in the store for the user's loop, so a crash of that loop loses nothing either.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import product
from math import inf

from paho.mqtt.client import topic_matches_sub

from taktsight_subscribe.acks import ACK_EVERY_S, Acks
from taktsight_subscribe.broker import Broker
from taktsight_subscribe.connection import POLL_S, Connection, Message
from taktsight_subscribe.errors import RowRefused, StoreError
from taktsight_subscribe.handover import HandOver
from taktsight_subscribe.heatmaps import HeatmapFolder
from taktsight_subscribe.ledger import Arrived, Ledger, Plan
from taktsight_subscribe.messages import Verdict, ack_payload
from taktsight_subscribe.patience import Patience
from taktsight_subscribe.pictures import Pictures
from taktsight_subscribe.quiet import Quiet
from taktsight_subscribe.store import Store

log = logging.getLogger(__name__)
HANDED_OVER_EVERY_S = 0.2
STORE_RETRY_MIN_S, STORE_RETRY_MAX_S = 0.5, 15.0
GOODBYE_S = 1.0
SILENCE_S = 5.0  # after which a topic without any station is worth a word: statuses are retained and come at once
KINDS = ("verdict", "missing", "status")
MOST_LEVELS = 8  # of a root, of whose words each may have been a + in a subscription


@dataclass(frozen=True, slots=True)
class Subscription:
    """Whom to hear, as whom, and where."""

    topic: str  # root of a station; + stands for any word of a level
    consumer: str
    broker: Broker

    def topics(self, *, heatmaps: bool) -> dict[str, int]:
        """Return what to subscribe to, and the QoS of each.

        The status is retained and comes every few seconds: what is missed while we are away is of no use, and at QoS 1
        it would fill the broker's queue until verdicts are dropped.
        """
        below = {"verdict": 1, "missing": 1, "status": 0} | ({"heatmap/+": 1} if heatmaps else {})
        return {f"{self.topic}/{name}": qos for name, qos in below.items()}

    def split(self, topic: str) -> tuple[str, str]:
        """Return the station's root and what hangs below it."""
        levels = topic.split("/")
        depth = self.topic.count("/") + 1
        return "/".join(levels[:depth]), "/".join(levels[depth:])

    def covers(self, root: str) -> bool:
        """Return whether this station is one of those that we hear."""
        return topic_matches_sub(self.topic, root)


def filters_of(topic: str) -> list[str]:
    """Return every subscription of this program by which a message on this topic may have come; none: by none."""
    root, _, name = topic.rpartition("/")
    if name.isdecimal() and root.endswith("/heatmap"):
        root, name = root.removesuffix("/heatmap"), "heatmap/+"
    levels = root.split("/")
    if (name not in KINDS and name != "heatmap/+") or len(levels) > MOST_LEVELS:
        return []
    return ["/".join((*words, name)) for words in product(*((level, "+") for level in levels))]


class Receiver(threading.Thread):
    """Stores what arrives until told to stop. `failure` says why it ended by itself, if it did."""

    def __init__(
        self,
        subscription: Subscription,
        store: Store,
        ledger: Ledger,
        hand_over: HandOver,
        folder: HeatmapFolder | None,
    ) -> None:
        super().__init__(name="taktsight-receiver", daemon=True)
        self.failure: BaseException | None = None
        self._stop_asked = False
        self._subscription = subscription
        self._store = store
        self._ledger = ledger
        self._hand_over = hand_over
        self._pictures = None if folder is None else Pictures(folder, store)
        client_id = subscription.broker.client_id or f"taktsight-{subscription.consumer}"
        self._topics = subscription.topics(heatmaps=folder is not None)
        self._connection = Connection(subscription.broker, client_id, self._topics)
        self._acks = Acks()
        self._left_over: set[str] = set()  # topics that came by a subscription of before, on this connection
        self._greeted_on = 0  # Connection.times_ready when we last asked every station to go on
        self._greeted: set[tuple[str, str]] = set()  # epochs that were asked on this connection
        self._unlisted: set[str] = set()  # roots whose station does not wait for us
        self._silent_after_s = inf  # when to speak of a topic without any station
        self._handed_over = hand_over.confirmed  # as the store remembers it
        self._handed_over_next_s = 0.0
        self._may_have_more = True  # verdicts in the store that the loop has not had
        self._store_is_up = True
        self._store_delay_s = 0.0
        self._store_next_s = 0.0
        self._warn = Quiet(log)
        self._patience = Patience()

    def stop(self) -> None:
        """Ask for the end; safe in a signal handler."""
        self._stop_asked = True

    def run(self) -> None:
        """Receive until asked to stop."""
        self._patience.start()
        try:
            while not self._stop_asked:
                self._connection.run(ACK_EVERY_S if self._acks.are_waiting else POLL_S)
                with self._patience:
                    self._turn(at_once=False)
            with self._patience:
                self._turn(at_once=True)
            self._connection.close(GOODBYE_S)
        except Exception as error:  # noqa: BLE001  the one broad except: the user's thread raises it again
            self.failure = error
        finally:
            self._patience.stop()
            self._hand_over.end()

    def _turn(self, *, at_once: bool) -> None:
        """Do all that is to do now, and nothing that needs the store while that is away."""
        if not self._store_is_ready():
            return
        try:
            if self._connection.times_ready != self._greeted_on:
                self._greet()
            self._settle()
            self._give_up_losses()
            self._send_acks(at_once=at_once)
            self._feed(at_once=at_once)
        except StoreError as error:
            self._store_is_up = False
            self._store_delay_s = min(max(2 * self._store_delay_s, STORE_RETRY_MIN_S), STORE_RETRY_MAX_S)
            self._store_next_s = time.monotonic() + self._store_delay_s
            self._warn("store", "%s: nothing is acknowledged until the store is back", error)

    def _store_is_ready(self) -> bool:
        """Return whether the store can be used; where it failed, open it again and believe what it says."""
        if self._store_is_up:
            return True
        if time.monotonic() < self._store_next_s:
            return False
        try:
            self._store.close()
            self._store.open()
            ledger = Ledger(self._store.epochs())
        except StoreError as error:
            self._store_delay_s = min(2 * self._store_delay_s, STORE_RETRY_MAX_S)
            self._store_next_s = time.monotonic() + self._store_delay_s
            self._warn("store", "%s: nothing is acknowledged until the store is back", error)
            return False
        ledger.statuses = self._ledger.statuses
        self._ledger = ledger
        self._acks = Acks()
        self._greeted_on = 0
        self._store_is_up = self._may_have_more = True
        log.info("the store is back")
        return True

    def _greet(self) -> None:
        """Tell every station that we know how far we are, and to go on from there."""
        self._greeted_on = self._connection.times_ready
        self._greeted.clear()
        self._left_over.clear()
        self._silent_after_s = time.monotonic() + SILENCE_S
        for root, book in self._ledger.current().items():
            if self._subscription.covers(root):
                self._ask(book.key)

    def _ask(self, key: tuple[str, str]) -> None:
        self._greeted.add(key)
        self._acks.note(key, resend=True)

    def _settle(self) -> None:
        """Store all that has arrived in one transaction, then acknowledge it to the broker."""
        messages = list(self._connection.arrived)
        if not messages:
            return
        arrivals, pictures = self._sort(messages)
        try:
            self._commit(self._ledger.plan(arrivals))
        except RowRefused:
            self._commit_one_by_one(arrivals)
        for root, seq, picture in pictures:
            if self._pictures is not None:
                self._pictures.take(root, seq, picture, self._ledger)
        self._store_delay_s = 0.0
        self._connection.settle(messages)
        for _ in messages:
            self._connection.arrived.popleft()

    def _sort(self, messages: list[Message]) -> tuple[list[Arrived], list[tuple[str, int, bytes]]]:
        """Return what belongs into the book, and the heatmaps as (root, seq, picture)."""
        arrivals: list[Arrived] = []
        pictures: list[tuple[str, int, bytes]] = []
        for message in messages:
            root, below = self._subscription.split(message.topic)
            if not any(topic_matches_sub(wanted, message.topic) for wanted in self._topics):
                self._unsubscribe(message.topic)
            elif below in KINDS and (message.payload or below != "status"):  # an empty status: the broker forgot it
                arrivals.append(Arrived(root, below, message.payload, message.received_utc))
            elif below.startswith("heatmap/") and below[8:].isdecimal() and len(below) < 25:
                pictures.append((root, int(below[8:]), message.payload))
        return arrivals, pictures

    def _unsubscribe(self, topic: str) -> None:
        """End what an earlier program of our name has subscribed to: the broker keeps it with the session."""
        filters = [] if topic in self._left_over else filters_of(topic)
        if filters:
            self._left_over.add(topic)
            self._connection.unsubscribe(filters)
            text = "%s is none of our topics any more: unsubscribed, and nothing of it is stored"
            self._warn("left over", text, topic)

    def _commit(self, plan: Plan) -> None:
        """Store a plan and let it count. Raises StoreError: then it does not."""
        before = {key: book.coverage.upto for key, book in self._ledger.books.items() if key in plan.books}
        batch = plan.batch(self._ledger.books)
        if batch:
            self._store.commit(batch)
        self._ledger.adopt(plan)
        for key, book in plan.books.items():
            if key in plan.repeated or before.get(key) != book.coverage.upto:
                self._acks.note(key)
        self._may_have_more = self._may_have_more or bool(plan.verdicts)
        self._note_verdicts(plan)
        self._note_statuses(plan)

    def _commit_one_by_one(self, arrivals: list[Arrived]) -> None:
        """Find the message that the database cannot take and put it aside; the others are stored."""
        for arrived in arrivals:
            try:
                self._commit(self._ledger.plan([arrived]))
            except RowRefused as error:
                self._commit(self._ledger.plan([replace(arrived, refused=str(error))]))

    def _note_verdicts(self, plan: Plan) -> None:
        if self._pictures is not None:
            for verdict in plan.verdicts:
                self._pictures.expect(plan.books[verdict.station, verdict.epoch].root, verdict)
        for book in plan.new_epochs:
            log.info("station %s: epoch %s begins (%s)", book.station, book.epoch, book.root)
        for gap in plan.new_gaps:
            self._warn(
                f"gap {gap.station}", "%s: parts %d to %d are missing: %s", gap.station, gap.first, gap.last, gap.reason
            )
        for row in plan.rejected:
            kind = "elsewhere" if row in plan.elsewhere else "rejected"
            self._warn(kind, "message on %s refused, kept in table rejected: %s", row.topic, row.reason)
        for verdict in plan.repeated.values():
            stored = self._store.find(verdict.key)
            if stored is not None and _essence(stored) != _essence(verdict):
                text = "%s: epoch %s seq %d came twice with different contents: is the disk of this station a copy?"
                self._warn("conflict", text, *verdict.key)

    def _note_statuses(self, plan: Plan) -> None:
        """Warn of stations that do not wait for us; acknowledge again where a station has not heard."""
        for root, status in plan.statuses.items():
            key = (status.station, status.epoch or "")
            if key not in self._greeted:
                self._ask(key)
            if status.first_seq is None:
                continue
            heard = None if status.acknowledged is None else status.acknowledged.get(self._subscription.consumer)
            if heard is not None:
                self._unlisted.discard(root)
                if heard < self._ledger.books[key].coverage.upto:
                    self._acks.note(key)
            elif root not in self._unlisted:
                self._unlisted.add(root)
                log.warning(
                    "station %s (%s) does not wait for us: what the broker loses is lost. Add it to mqtt.consumers: %s",
                    *(status.station, root, self._subscription.consumer),
                )

    def _give_up_losses(self) -> None:
        """Ask again for what is missing, and record what no asking will bring back."""
        if not self._connection.is_ready:
            return
        if time.monotonic() > self._silent_after_s:
            self._silent_after_s = inf
            if not self._ledger.statuses:
                text = "no station found at %s: check the topic (one word or + per level) and the broker's access list"
                log.warning(text, self._subscription.topic)
        lost = self._acks.watch_holes(self._ledger, time.monotonic())
        for key, ranges in lost.items():
            self._commit(self._ledger.plan_losses(key, ranges, datetime.now(UTC)))

    def _send_acks(self, *, at_once: bool) -> None:
        if not self._connection.is_ready:
            return
        for ack in self._acks.due(self._ledger, time.monotonic(), at_once=at_once):
            if self._subscription.covers(ack.topic):
                payload = ack_payload(ack.epoch, ack.upto, resend=ack.resend)
                self._connection.publish(f"{ack.topic}/ack/{self._subscription.consumer}", payload)

    def _feed(self, *, at_once: bool) -> None:
        """Let the user's loop have what is new, and remember how far it is."""
        room = self._hand_over.room()
        if self._may_have_more and room > 0:
            placed = self._store.after(self._hand_over.filled, room)
            self._may_have_more = len(placed) == room
            if placed:
                self._hand_over.put(placed)
        confirmed = self._hand_over.confirmed
        now_s = time.monotonic()
        if confirmed != self._handed_over and (at_once or now_s >= self._handed_over_next_s):
            self._store.set_handed_over(self._subscription.consumer, confirmed)
            self._handed_over = confirmed
            self._handed_over_next_s = now_s + HANDED_OVER_EVERY_S


def _essence(verdict: Verdict) -> tuple[object, ...]:
    """Return what tells two verdicts apart, whatever a database does to the text."""
    return verdict.run, verdict.trigger, verdict.outcome, verdict.score, verdict.part_id
