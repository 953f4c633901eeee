"""What a program on the other side uses: a loop over parts that are stored already, each of them once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from math import inf
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

from taktsight_subscribe.broker import Broker, BrokerOptions, check_consumer, check_topic
from taktsight_subscribe.handover import HandOver
from taktsight_subscribe.heatmaps import HeatmapFolder
from taktsight_subscribe.ledger import Ledger
from taktsight_subscribe.messages import Key, Verdict
from taktsight_subscribe.receiver import Receiver, Subscription
from taktsight_subscribe.store import Store

POLL_S = 0.25  # how soon a signal is noticed
CLOSE_TIMEOUT_S = 5.0
HEATMAPS_MB = 1024.0


class Subscriber:
    """Receives every part of every station below `topic` and keeps it in `store`.

        with Subscriber("acme/plant1/+/+/+", consumer="mes", store=SqliteStore("verdicts.sqlite")) as subscriber:
            for verdict in subscriber:
                book(verdict)

    A part is stored, then acknowledged, then handed to the loop: each once, in order of arrival, which is the order of
    seq but for parts that had to be sent again. The store remembers how far the loop has come: a part counts as done
    when the loop asks for the next one or leaves the `with` block without an exception. After a crash, what was not
    done comes again, and so may what was done in the last 0.2 s.

    topic: the station's root, as "acme/plant1/hall2/line3/cell7"; + stands for any word of a level.
    consumer: our name in the station's `mqtt.consumers`; one running program per name.
    heatmaps: folder for pictures, at most heatmaps_mb; None: none.
    broker: the fields of Broker: host, port, protocol, username, password_file, ca_file, ...

    Raises SettingsError on what cannot work.
    """

    def __init__(
        self,
        topic: str,
        *,
        consumer: str,
        store: Store,
        heatmaps: str | Path | None = None,
        heatmaps_mb: float = HEATMAPS_MB,
        **broker: Unpack[BrokerOptions],
    ) -> None:
        check_topic(topic, wildcards=True)
        check_consumer(consumer)
        self._subscription = Subscription(topic, consumer, Broker(**broker))
        self._store = store
        self._folder = None if heatmaps is None else HeatmapFolder(heatmaps, heatmaps_mb)
        self._receiver: Receiver | None = None
        self._hand_over: HandOver | None = None
        self._stop_asked = False

    def __enter__(self) -> Self:
        """Open the store and begin to receive. Raises StoreError if the store cannot be used."""
        self._store.open()
        self._hand_over = HandOver(self._store.handed_over(self._subscription.consumer))
        ledger = Ledger(self._store.epochs())
        self._receiver = Receiver(self._subscription, self._store, ledger, self._hand_over, self._folder)
        if self._folder is not None:
            self._folder.start()
        self._receiver.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Store and acknowledge what has arrived, then let go."""
        if self._receiver is None or self._hand_over is None:
            return
        if kind is None:
            self._hand_over.confirm()
        self._receiver.stop()
        self._receiver.join(CLOSE_TIMEOUT_S)
        if self._folder is not None:
            self._folder.stop(CLOSE_TIMEOUT_S)
        if not self._receiver.is_alive():
            self._store.close()
        self._receiver = None

    def __iter__(self) -> Iterator[Verdict]:
        """Yield parts for ever, until `stop` is called. Raises BrokerError if the broker does not let us in."""
        while (verdict := self.next()) is not None:
            yield verdict

    def next(self, timeout_s: float = inf) -> Verdict | None:
        """Return the next part, or None if none came within timeout_s or `stop` was called; the one before is done.

        Raises BrokerError if the broker does not let us in.
        """
        if self._hand_over is None or self._receiver is None:
            raise RuntimeError("use the subscriber in a `with` block")
        deadline_s = time.monotonic() + timeout_s
        while not self._stop_asked:
            left_s = deadline_s - time.monotonic()
            verdict = self._hand_over.take(max(0.0, min(POLL_S, left_s)))
            if verdict is not None:
                return verdict
            if self._receiver.failure is not None:
                raise self._receiver.failure
            if left_s <= 0 or not self._receiver.is_alive():
                break
        return None

    def run(self, timeout_s: float = inf) -> None:
        """Store only, until `stop` is called or timeout_s passed: a later loop still gets every part.

        Raises BrokerError if the broker does not let us in, StoreError if the store cannot be used at the start.
        """
        if self._receiver is None:
            with self:
                self._wait(timeout_s)
        else:
            self._wait(timeout_s)

    def stop(self) -> None:
        """End the loop or `run`; safe from other threads and signal handlers."""
        self._stop_asked = True

    def heatmap(self, key: Key) -> Path | None:
        """Return the picture of a part (`verdict.key`), None if there is none yet: pictures come behind verdicts."""
        return None if self._folder is None else self._folder.path(key)

    def _wait(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        receiver = self._receiver
        while receiver is not None and not self._stop_asked and time.monotonic() < deadline_s:
            receiver.join(POLL_S)
            if receiver.failure is not None:
                raise receiver.failure
