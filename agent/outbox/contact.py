"""Whether an outbox is an old copy of itself, and how it then begins anew.

A copy of `outbox.db` that is put back (a restored disk, a virtual machine set back) ends before what the consumers
have: it would give seqs a second time, and they would drop those parts as repeats. It cannot know. The consumers do:

1. In every run, no seq beyond those that may have been handed out before (`Contact.certain`) goes out until a consumer
   has said where it stands. One that says nothing is sent a row that it has, which it must acknowledge again.
2. An acknowledgement beyond what this file can have handed out, as the first word of a consumer in a run, means that
   the file is an old copy. Rows up to `certain` go out as they are: they are what was once stored. Once the other
   consumers have those, all later ones, which nobody took, get new keys, in a new epoch: `renew`.
3. One word per consumer and run counts, and none in an epoch that began in this run. A consumer that began an epoch
   this way cannot do so again before it has acknowledged something of that epoch that can be true.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

from agent.outbox.rows import checksum, intact
from agent.publishing.messages import encode, numbered

ROWS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Contact:
    """What consumers can have of an epoch, as far as its file can know; kept in it."""

    certain: int  # highest seq that may have been handed out before this run
    in_touch: bool  # those beyond it may have been since: consumers have said where they stand
    doubted: str = ""  # the consumer whose word began this epoch, until it has said something believable of it

    def reopened(self, last_seq: int) -> Contact:
        """Return how it stands at the begin of another run."""
        return Contact(last_seq if self.in_touch else self.certain, in_touch=False, doubted=self.doubted)


def old_copy(epoch: str, certain: int, word: tuple[str, int], lacking: Sequence[str]) -> str:
    """Return for people what is amiss.

    word: a consumer, and the seq that it has. lacking: for whom the new epoch has to wait.
    """
    consumer, upto = word
    awaited = f" once {', '.join(lacking)} has what is left of this one" if lacking else ""
    return (
        f"this outbox is an old copy: {consumer} has seq {upto} of epoch {epoch}, which it handed out up to {certain}; "
        f"what was stored since goes out in a new epoch{awaited}: do not put outbox.db back from a copy"
    )


def renumber(writer: sqlite3.Connection, epoch: str, certain: int, last_seq: int) -> None:
    """Make the rows certain + 1 .. last_seq the first of an epoch; those before are removed. In a transaction.

    A row that is not what was written stays so, and comes as `missing`. Heatmaps are no longer linked.
    """
    writer.execute("DELETE FROM waiting WHERE seq <= ?", (certain,))
    query = "SELECT seq, topic, payload, checksum FROM waiting WHERE seq BETWEEN ? AND ? ORDER BY seq"
    for first in range(certain + 1, last_seq + 1, ROWS_AT_ONCE):
        for row in writer.execute(query, (first, first + ROWS_AT_ONCE - 1)).fetchall():
            was, topic, payload, stored = row
            if intact(*row):
                payload = _with_key(payload, topic, epoch, was - certain)
                stored = checksum(was - certain, topic, payload)
            change = "UPDATE waiting SET seq = ?, payload = ?, checksum = ? WHERE seq = ?"
            writer.execute(change, (was - certain, payload, stored, was))


def _with_key(payload: bytes, topic: str, epoch: str, seq: int) -> bytes:
    message = json.loads(payload)
    if topic == "verdict":
        return encode(numbered({**message, "heatmap": None}, epoch=epoch, seq=seq))
    return encode({**message, "epoch": epoch, "seq": seq, "first": seq, "last": seq})
