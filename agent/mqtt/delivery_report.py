"""What a station says of its delivery: in its status, and in its log."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Any

from agent.mqtt.delivery import Delivery
from agent.outbox.outbox import Outbox
from agent.publishing.messages import Alarm, alarm_fields, encode

log = logging.getLogger(__name__)

REPORT_EVERY_S = 60.0
LOOK_EVERY_S = 1.0  # at alarms and acknowledgements
LEAST_PAUSE_S = 2.0  # between statuses that nobody asked for


class StatusBoard:
    """The station's status as it stands, and whether it must be published."""

    def __init__(self, message: dict[str, Any], outbox: Outbox, delivery: Delivery, consumers: Collection[str]) -> None:
        """message: of `status_message`; what the publisher knows is added when it is published."""
        self.is_due = True
        self.delivery = delivery
        self.counts: Counter[str] = Counter()
        self.refusal = ""  # the last of a verdict by the broker
        self.subscription_refusal: str | None = None
        self.credential_alarms: list[Alarm] = []
        self._message = message
        self._outbox = outbox
        self._consumers = tuple(consumers)
        self._shown: object = None
        self._look_at_s = self._quiet_until_s = 0.0

    def show(self, message: dict[str, Any]) -> None:
        """Take over what the station says of itself from now on."""
        self._message, self.is_due = message, True

    def show_stopped(self) -> None:
        """Let the status say `stopped`, as of now."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        if self._message["state"] != "stopped":
            self._message = {**self._message, "state": "stopped", "creationTime": now}
        self.is_due = True

    def look(self) -> None:
        """Make the status due if acknowledgements or alarms changed, and not too often."""
        now_s = time.monotonic()
        if now_s < self._look_at_s:
            return
        self._look_at_s = now_s + LOOK_EVERY_S
        if now_s >= self._quiet_until_s and self._fingerprint() != self._shown:
            self.is_due = True

    def payload(self) -> bytes:
        """Return the status to publish; it is not due any more."""
        self.is_due = False
        self._shown, self._quiet_until_s = self._fingerprint(), time.monotonic() + LEAST_PAUSE_S
        return encode({**self._message, **self._fields()})

    def _fields(self) -> dict[str, Any]:
        """Return what is known of outbox and delivery."""
        outbox, counts = self._outbox, self.counts
        last, acknowledged = outbox.last_seq, self.delivery.acknowledged
        return {
            "epoch": outbox.epoch,
            "firstSeq": outbox.first_seq,
            "lastSeq": last,
            "deliveryMode": "consumers" if self._consumers else "broker",
            "consumers": {
                name: {"acknowledged": acknowledged[name], "waiting": max(0, last - acknowledged[name])}
                for name in self._consumers
                if name in acknowledged
            },
            "undelivered": counts["quarantined"],
            "delivery": {
                "waiting": outbox.waiting,
                "confirmed": counts["confirmed"],
                "noSubscribers": counts["noSubscribers"],
                "refused": counts["refused"],
                "quarantined": counts["quarantined"],
                "resent": counts["resent"] + self.delivery.resent,
                "heatmapsConfirmed": counts["heatmapsConfirmed"],
                "heatmapsRefused": counts["heatmapsRefused"],
                "heatmapsShed": outbox.heatmaps_shed,
                "ignoredAcks": counts["ignoredAcks"],
            },
            "alarms": [*self._message.get("alarms", []), *alarm_fields(self._alarms())],
        }

    def _alarms(self) -> list[Alarm]:
        alarms = [*self._outbox.alarms(), *self.credential_alarms]
        if self.delivery.is_refused:
            detail = f"the broker refuses verdicts ({self.refusal}); they wait: check its access list and its limits"
            alarms.append(Alarm("broker_refuses", detail))
        if self.subscription_refusal is not None:
            detail = f"the broker refuses our subscriptions ({self.subscription_refusal}): check its access list"
            alarms.append(Alarm("broker_refuses", detail))
        return alarms

    def _fingerprint(self) -> object:
        """Return what makes the status due when it changes."""
        counts = {name: self.counts[name] for name in ("quarantined", "ignoredAcks", "heatmapsRefused")}
        return self._outbox.epoch, self.delivery.acknowledged, self._alarms(), counts


class ConnectionLog:
    """Logs the state of the connection, and its cause, when they change; the same ones at most once a minute."""

    def __init__(self, subject: str) -> None:
        self._subject = subject
        self._latest = ""
        self._quiet_until_s: dict[str, float] = {}

    def note(self, level: int, text: str) -> None:
        """Log text if it is news."""
        now_s = time.monotonic()
        if text != self._latest and now_s >= self._quiet_until_s.get(text, 0.0):
            self._quiet_until_s = {known: until for known, until in self._quiet_until_s.items() if until > now_s}
            self._quiet_until_s[text] = now_s + REPORT_EVERY_S
            log.log(level, "%s %s", self._subject, text)
        self._latest = text


class LossLog:
    """Logs what the broker does not take: the first of a kind at once, later ones summed once a minute."""

    def __init__(self) -> None:
        self._sums: Counter[str] = Counter()
        self._latest: dict[str, str] = {}
        self._quiet_until_s: dict[str, float] = {}

    def add(self, kind: str, latest: str, count: int = 1) -> None:
        """Note that something happened. kind: what, as "heatmaps refused by the broker"."""
        self._sums[kind] += count
        self._latest[kind] = latest

    def report(self) -> None:
        """Log what was noted and is due."""
        now_s = time.monotonic()
        for kind, count in list(self._sums.items()):
            if now_s >= self._quiet_until_s.get(kind, 0.0):
                self._quiet_until_s[kind] = now_s + REPORT_EVERY_S
                log.error("%d %s, last %s", count, kind, self._latest[kind])
                del self._sums[kind]
