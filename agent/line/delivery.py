"""Settled verdicts on their way to the outlets, in the order in which they were settled.

When the outlets fall behind, they get several verdicts at once; then pictures are shed, a verdict never.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable
from dataclasses import replace

from agent.line.batch import next_batch
from agent.line.beat import Deliver, Settled
from agent.line.tally import Tally

log = logging.getLogger(__name__)

POLL_S = 0.05  # how often the thread comes round without verdicts
MOST_PICTURES = 32  # settled verdicts that may wait for the outlets with their pictures; behind them, verdicts alone
MOST_AT_ONCE = 64  # verdicts handed to the outlets in one call


class Delivery:
    """A queue and what empties it. `put` and `end` are for any thread, `run` is for one of its own."""

    def __init__(self, deliver: Deliver, on_round: Callable[[], object], tally: Tally) -> None:
        """deliver: the outlets. on_round: is called after each round that did not fail. tally: counts each verdict."""
        self._deliver = deliver
        self._on_round = on_round
        self._tally = tally
        self._waiting: queue.SimpleQueue[Settled | None] = queue.SimpleQueue()

    def put(self, settled: Settled) -> None:
        """Take a verdict in; without its pictures where as many as may wait do."""
        if self._waiting.qsize() >= MOST_PICTURES:
            self._tally.shed_pictures += 1
            settled = replace(settled, verdict=replace(settled.verdict, picture=None, anomaly_map=None), frame=None)
        self._waiting.put(settled)

    def end(self) -> None:
        """Let `run` return once it has handed over what was put before."""
        self._waiting.put(None)

    def run(self) -> None:
        """Hand over what is put, until the end; what an outlet cannot take is counted, logged, and gone."""
        while (batch := next_batch(self._waiting, POLL_S, MOST_AT_ONCE)) is not None:
            for settled in batch:
                self._tally.count(settled.verdict)
            try:
                if batch:
                    self._deliver(batch)
            except Exception:
                self._tally.delivery_faults += len(batch)
                parts = ", ".join(str(settled.verdict.trigger_id) for settled in batch)
                log.exception("the verdicts of these parts could not be delivered: %s", parts)
                continue
            try:
                self._on_round()
            except Exception:
                log.exception("those who watch over the line could not be told")
