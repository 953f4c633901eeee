"""What the outbox gives to be sent: rows read ahead, and heatmaps one at a time behind their verdicts."""

from __future__ import annotations

import time
from collections import Counter

from agent.mqtt.link import Packet
from agent.outbox.database import Row
from agent.outbox.outbox import Outbox
from agent.publishing.messages import heatmap_topic

READ_AHEAD_ROWS = 64
READ_AGAIN_S = 1.0  # after the outbox could not read
HEATMAP_EXPIRY_S = 3600
LOSSES_FOR_A_HEATMAP = 2  # connections that may break while the same heatmap is in flight


class RowsAhead:
    """The rows of one epoch by seq. They stay in the outbox: this only saves queries."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._epoch = outbox.epoch
        self._rows: dict[int, Row] = {}
        self._read_at_s = 0.0

    def get(self, seq: int) -> Row | None:
        """Return a row that waits, or the last one that all have; None if the outbox cannot read it just now."""
        if seq < self._outbox.first_seq:
            return self._outbox.witness(seq)
        if seq not in self._rows and time.monotonic() >= self._read_at_s:
            if len(self._rows) >= 4 * READ_AHEAD_ROWS:  # what was sent, or is for consumers that are far apart
                self._rows.clear()
            rows = self._outbox.read(seq - 1, READ_AHEAD_ROWS)
            if self._outbox.epoch == self._epoch:
                self._rows.update((row.seq, row) for row in rows)
            if seq not in self._rows:
                self._read_at_s = time.monotonic() + READ_AGAIN_S
        return self._rows.get(seq)

    def replace(self, row: Row) -> None:
        """Give this row from now on."""
        self._rows[row.seq] = row


class Heatmaps:
    """The heatmap that is sent next, and the one in flight."""

    def __init__(self, outbox: Outbox, *, wanted: bool) -> None:
        self._outbox = outbox
        self._wanted = wanted
        self._losses: Counter[int] = Counter()
        self.in_flight: int | None = None  # seq
        self.confirmed = self.refused = 0

    def next(self, upto: int) -> tuple[int, Packet] | None:
        """Return the oldest one with seq <= upto that waits; None while one is in flight."""
        if not self._wanted or self.in_flight is not None:
            return None
        heatmap = self._outbox.next_heatmap(upto)
        if heatmap is None:
            return None
        topic = heatmap_topic(heatmap.seq)
        return heatmap.seq, Packet(topic, heatmap.data, heatmap.content_type, expiry_s=HEATMAP_EXPIRY_S)

    def settled(self, *, taken: bool) -> None:
        """The broker took the one in flight, or will never: either way it is done."""
        if self.in_flight is not None:
            self._drop(self.in_flight, taken=taken)
            self.in_flight = None

    def unfit(self, seq: int) -> None:
        """The broker cannot take this one."""
        self._drop(seq, taken=False)

    def lost(self, *, blame: bool) -> None:
        """The connection is gone; blame: the broker hung up in a way that a message may have caused."""
        if self.in_flight is not None and blame:
            self._losses[self.in_flight] += 1
            if self._losses[self.in_flight] >= LOSSES_FOR_A_HEATMAP:
                self._drop(self.in_flight, taken=False)
        self.in_flight = None

    def _drop(self, seq: int, *, taken: bool) -> None:
        self._outbox.remove_heatmap(seq)
        self._losses.pop(seq, None)
        self.confirmed += taken
        self.refused += not taken
