"""The one thread that delivers: it alone owns connection and delivery, and whoever wants something posts an event."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from agent.errors import StorageError
from agent.mqtt.certificates import CredentialWatch
from agent.mqtt.client import RECONNECT_MAX_S, RECONNECT_MIN_S, MqttSettings
from agent.mqtt.delivery import BROKER, FIRST_FAILURE, Answer, Delivery, Standing, read_ack
from agent.mqtt.delivery_report import ConnectionLog, LossLog, StatusBoard
from agent.mqtt.link import Answered, Down, Heard, Link, LinkEvent, Packet, Subscribed, Up
from agent.outbox.outbox import Outbox
from agent.outbox.outgoing import Heatmaps, RowsAhead
from agent.publishing.messages import Origin, encode, status_message
from agent.publishing.publisher import Incoming, OnCommand

log = logging.getLogger(__name__)

UNANSWERED_S = 30.0  # after which a connection on which the broker confirms nothing is given up
MOST_REPLIES = 64  # that wait for a connection
STOP_WITHOUT_BROKER_S = 1.0
POLL_S, STOPPING_POLL_S = 0.25, 0.02


@dataclass(frozen=True, slots=True)
class Status:
    """The status from now on."""

    message: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Reply:
    """The reply to a command."""

    packet: Packet


@dataclass(frozen=True, slots=True)
class Stop:
    """Come to an end."""

    drain_until_s: float  # time.monotonic()
    deadline_s: float


Event = tuple[Link, LinkEvent] | Status | Reply | Stop | None  # None: something new waits in the outbox


def outbox_consumers(settings: MqttSettings) -> tuple[str, ...]:
    """Return the names for which an MqttPublisher needs the outbox to keep verdicts: see Outbox.set_consumers."""
    return settings.consumers or (BROKER,)


class Courier(threading.Thread):
    """The one thread that delivers. All its fields are its own, but for `events`."""

    def __init__(self, settings: MqttSettings, origin: Origin, outbox: Outbox, on_command: OnCommand | None) -> None:
        super().__init__(name="taktsight-delivery", daemon=True)
        self.events: SimpleQueue[Event] = SimpleQueue()
        self._settings = settings
        self._outbox = outbox
        self._on_command = on_command
        self._credentials = CredentialWatch(settings)
        self._will = Packet("status", encode(status_message(origin, "offline")), retain=True)
        self._link: Link | None = None
        self._limit = 0  # packets in flight that the broker takes; 0 while there is no connection
        self._most_bytes: int | None = None
        self._connect_at_s, self._delay_s = 0.0, float(RECONNECT_MIN_S)
        self._replies: deque[Reply] = deque(maxlen=MOST_REPLIES)
        self._extras: dict[int, Reply | None] = {}  # in flight beside the rows, by tag
        self._heatmap_tag: int | None = None
        self._stop_asked: Stop | None = None
        self._stopping_since_s = 0.0
        self._begin_epoch()
        self._heatmaps = Heatmaps(outbox, wanted=settings.heatmaps)
        self._board = StatusBoard(status_message(origin, "starting"), outbox, self._delivery, settings.consumers)
        self._connection_log = ConnectionLog(f"MQTT broker {settings.host}:{settings.port}")
        self._loss_log = LossLog()

    def _begin_epoch(self) -> None:
        self._epoch = self._outbox.epoch
        known = self._outbox.acknowledged()
        own = {name: known[name] for name in outbox_consumers(self._settings) if name in known}
        self._rows = RowsAhead(self._outbox)
        self._delivery = Delivery(own, self._outbox.last_seq, self._standing())
        self._saved = self._delivery.acknowledged

    def _standing(self) -> Standing | None:
        """Return what consumers can have of an epoch that goes on, None where it began in this run."""
        contact = self._outbox.contact
        if self._outbox.is_new_epoch:
            return None
        has_witness = contact.certain > 0 and self._rows.get(contact.certain) is not None
        return Standing(contact.certain, has_witness, contact.doubted)

    def run(self) -> None:
        """Deliver until asked to stop, then say goodbye."""
        try:
            while self._has_work():
                self._handle_events()
                self._follow_outbox()
                self._keep_connected()
                self._send()
                self._report()
            self._say_goodbye()
        finally:
            if self._link is not None:  # no goodbye was said: the broker shall say `offline`
                self._link.break_off()

    def _has_work(self) -> bool:
        if self._stop_asked is None:
            return True
        waiting = self._delivery.waiting or self._extras or self._replies or self._heatmaps.next(self._arrived())
        until_s = self._stop_asked.drain_until_s
        if not self._limit:  # all of it is on the disk: a broker that is away is not worth the wait
            until_s = min(until_s, self._stopping_since_s + STOP_WITHOUT_BROKER_S)
        return bool(waiting) and time.monotonic() < until_s

    def _follow_epoch(self) -> None:
        """Begin anew with a new database; what was in flight is of the old one."""
        resent = self._delivery.resent
        self._begin_epoch()
        self._board.delivery = self._delivery
        self._board.counts["resent"] += resent
        if self._limit:
            self._delivery.connected(self._limit)

    def _follow_outbox(self) -> None:
        """Tell the delivery what was stored, and the outbox what was acknowledged."""
        contradiction = self._delivery.contradiction
        if contradiction is not None:
            self._outbox.renew(contradiction.consumer, contradiction.upto)
        if self._outbox.epoch != self._epoch:
            log.error("the outbox began epoch %s in place of %s", self._outbox.epoch, self._epoch)
            self._follow_epoch()
        self._delivery.stored(self._outbox.last_seq)
        for name, upto in self._delivery.acknowledged.items():
            if upto > self._saved[name] and self._outbox.acknowledge(name, upto):
                self._saved[name] = upto

    def _arrived(self) -> int:
        """Return up to which seq some consumer has everything."""
        return max(self._delivery.acknowledged.values(), default=0)

    def _handle_events(self) -> None:
        """Wait a moment for an event, then handle all there are."""
        try:
            event = self.events.get(timeout=POLL_S if self._stop_asked is None else STOPPING_POLL_S)
            while True:
                self._handle(event)
                event = self.events.get_nowait()
        except Empty:
            pass

    def _handle(self, event: Event) -> None:
        match event:
            case (link, link_event):
                if link is self._link:  # an older one has nothing to say
                    self._handle_link(link, link_event)
            case Status():
                self._board.show(event.message)
            case Reply():
                self._replies.append(event)
            case Stop():
                self._stop_asked, self._stopping_since_s = event, time.monotonic()

    def _handle_link(self, link: Link, event: LinkEvent) -> None:
        match event:
            case Up():
                self._welcome(link, event)
            case Down():
                self._part(event)
            case Answered():
                self._settle(event)
            case Subscribed():
                self._board.subscription_refusal = event.refusal
            case Heard():
                self._hear(event)

    def _welcome(self, link: Link, up: Up) -> None:
        """Begin with a new connection: listen first, so that no acknowledgement is missed."""
        self._limit, self._most_bytes, self._delay_s = up.window, up.most_bytes, RECONNECT_MIN_S
        self._delivery.connected(up.window)
        topics = [f"ack/{name}" for name in self._settings.consumers]
        topics += [] if self._on_command is None else ["cmd/+"]
        if topics:
            link.subscribe(topics)
        self._board.is_due = True
        self._connection_log.note(logging.INFO, "connected")

    def _part(self, down: Down) -> None:
        """Forget a connection and all that was in flight on it; try again in a while."""
        level = {"refused": logging.ERROR, "renewed": logging.INFO}.get(down.state, logging.WARNING)
        self._connection_log.note(level, f"{down.state}: {down.why}; verdicts wait in the outbox")
        self._link, self._limit = None, 0
        self._connect_at_s = time.monotonic() + self._delay_s
        self._delay_s = min(2 * self._delay_s, RECONNECT_MAX_S)
        self._replies.extendleft(reply for reply in reversed(self._extras.values()) if reply is not None)
        self._extras.clear()
        self._heatmaps.lost(blame=down.blame)
        guilty = self._delivery.lost(blame=down.blame)
        if guilty is not None:
            self._quarantine(guilty, f"the broker hangs up when it is sent: {down.why}")

    def _settle(self, answer: Answered) -> None:
        """Draw the consequences of what the broker said about one packet."""
        if answer.tag in self._extras:
            del self._extras[answer.tag]
            self._delivery.answered()
            if answer.tag == self._heatmap_tag:
                self._heatmaps.settled(taken=answer.code < FIRST_FAILURE)
            if answer.code >= FIRST_FAILURE:
                self._loss_log.add("messages other than verdicts refused by the broker", answer.meaning)
            return
        counts = self._board.counts
        meaning, seq = self._delivery.confirmed(answer.tag, answer.code, time.monotonic())
        counts["confirmed"] += meaning in (Answer.TAKEN, Answer.UNHEARD)
        counts["noSubscribers"] += meaning is Answer.UNHEARD
        if meaning in (Answer.REFUSED, Answer.UNFIT):
            counts["refused"] += 1
            self._board.refusal = answer.meaning
        if meaning is Answer.REFUSED:
            self._loss_log.add("verdicts refused by the broker and kept", f"{answer.meaning}: check its access list")
        if meaning is Answer.UNFIT:
            self._quarantine(seq, f"the broker refuses it for good: {answer.meaning}")

    def _quarantine(self, seq: int, why: str) -> None:
        """Give up a row: a notice takes its place. A notice itself is never given up, it waits."""
        if self._delivery.is_witness(seq):
            self._delivery.give_up_witness()
            return
        row = self._rows.get(seq)
        try:
            if row is None or row.topic != "verdict":
                raise StorageError("it is the notice of a missing verdict, or cannot be read")
            self._rows.replace(self._outbox.quarantine(seq, why))
        except StorageError as error:
            self._loss_log.add("messages that no broker takes, kept", f"seq {seq}: {why}; {error}")
            self._board.refusal = why
            self._delivery.refuse(time.monotonic())
            return
        self._delivery.replaced(seq)
        self._board.counts["quarantined"] += 1
        self._loss_log.add("verdicts put into quarantine", f"seq {seq}: {why}")

    def _hear(self, message: Heard) -> None:
        kind, _, name = message.topic.partition("/")
        if kind == "cmd" and self._on_command is not None:
            self._on_command(Incoming(name, message.payload, message.retained, message.correlation))
        elif kind == "ack" and not self._acknowledge(name, message):
            self._board.counts["ignoredAcks"] += 1

    def _acknowledge(self, consumer: str, message: Heard) -> bool:
        """Take in an acknowledgement; False if it is not one to believe."""
        try:
            ack = read_ack(message.payload)
        except ValueError:
            return False
        if message.retained or ack.epoch != self._epoch:
            return False
        is_true = self._delivery.acknowledge(consumer, ack.upto, resend=ack.resend, now_s=time.monotonic())
        if is_true and consumer == self._outbox.contact.doubted:
            self._outbox.note_contact(heard=consumer)
        return is_true

    def _keep_connected(self) -> None:
        """Connect when it is time, anew when the credentials changed or the broker does not answer any more."""
        now_s = time.monotonic()
        unanswered_since_s = self._delivery.unanswered_since_s()
        if self._link is not None and now_s - (unanswered_since_s or now_s) > UNANSWERED_S:
            self._link.break_off()
            self._part(Down("lost", f"the broker confirmed nothing for {UNANSWERED_S:g} s"))
        if self._credentials.changed(now_s) and self._link is not None:
            self._link.close()
            self._part(Down("renewed", "certificates or password changed, connecting anew"))
            self._connect_at_s = now_s
        self._board.credential_alarms = self._credentials.alarms
        if self._link is None and now_s >= self._connect_at_s:
            self._link = Link(self._settings, self._credentials.current, self._will, self._post)
            self._link.open()

    def _post(self, link: Link, event: LinkEvent) -> None:
        self.events.put((link, event))

    def _send(self) -> None:
        """Publish status and replies, then rows, then a heatmap, as far as the broker takes more."""
        going = True
        while going and self._has_room():
            if self._board.is_due:
                going = self._publish(Packet("status", self._board.payload(), retain=True)) is not None
            elif self._replies:
                going = self._publish(self._replies[0].packet, self._replies[0]) is not None
                if going:
                    self._replies.popleft()
            elif (seq := self._delivery.next(time.monotonic())) is not None:
                going = self._send_row(seq)
            else:
                going = not self._delivery.is_alone and self._send_heatmap()

    def _has_room(self) -> bool:
        return len(self._extras) + self._delivery.in_flight < self._limit

    def _send_row(self, seq: int) -> bool:
        """Publish one row; False if nothing can be sent just now."""
        row = self._rows.get(seq)
        if row is None or self._link is None:
            return False
        packet = Packet(row.topic, row.payload)
        if (why := self._too_large(packet)) is not None:
            self._quarantine(seq, why)
            return True
        if seq > self._outbox.contact.certain and not self._outbox.contact.in_touch:
            self._outbox.note_contact()  # first on the disk: consumers can have it from now on
        tag = self._link.publish(packet)
        if tag is not None:
            self._delivery.published(tag, seq, time.monotonic())
        return tag is not None

    def _send_heatmap(self) -> bool:
        """Publish the oldest heatmap whose verdict has arrived somewhere; False if there is none to send now."""
        found = self._heatmaps.next(self._arrived())
        if found is None:
            return False
        seq, packet = found
        if (why := self._too_large(packet)) is not None:
            self._heatmaps.unfit(seq)
            self._loss_log.add("heatmaps given up", why)
            return True
        self._heatmap_tag = self._publish(packet)
        if self._heatmap_tag is not None:
            self._heatmaps.in_flight = seq
        return self._heatmap_tag is not None

    def _too_large(self, packet: Packet) -> str | None:
        if self._link is None or self._most_bytes is None:
            return None
        size = self._link.packet_bytes(packet)
        return f"{size} bytes, the broker takes {self._most_bytes}" if size > self._most_bytes else None

    def _publish(self, packet: Packet, reply: Reply | None = None) -> int | None:
        """Send something other than a row; returns its tag, None if the connection is gone."""
        tag = None if self._link is None else self._link.publish(packet)
        if tag is not None:
            self._extras[tag] = reply
        return tag

    def _report(self) -> None:
        self._board.counts["heatmapsConfirmed"] = self._heatmaps.confirmed
        self._board.counts["heatmapsRefused"] = self._heatmaps.refused
        self._board.look()
        self._loss_log.report()

    def _say_goodbye(self) -> None:
        """Publish `stopped` if the broker is there, then disconnect; waits no longer than was asked for."""
        link, deadline_s = self._link, 0.0 if self._stop_asked is None else self._stop_asked.deadline_s
        if link is None or time.monotonic() >= deadline_s:  # nobody waits for us any more: leave the last will
            return
        if self._limit:
            self._follow_outbox()
            self._report()
            self._board.show_stopped()
            tag = self._publish(Packet("status", self._board.payload(), retain=True))
            while self._limit and tag in self._extras and time.monotonic() < deadline_s:
                self._handle_events()
        link.close()
        self._link = None
