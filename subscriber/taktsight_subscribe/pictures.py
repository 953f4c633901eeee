"""Which verdict a heatmap belongs to: its topic has no more than the seq, so the digest in the verdict decides."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from taktsight_subscribe.messages import Key, Verdict
from taktsight_subscribe.quiet import Quiet

if TYPE_CHECKING:
    from taktsight_subscribe.heatmaps import HeatmapFolder
    from taktsight_subscribe.ledger import Ledger
    from taktsight_subscribe.store import Store

log = logging.getLogger(__name__)

MAX_RECENT = 4096


@dataclass(frozen=True, slots=True)
class _Expected:
    key: Key
    sha256: str | None


class Pictures:
    """Checks heatmaps against their verdicts and passes the right ones on."""

    def __init__(self, folder: HeatmapFolder, store: Store) -> None:
        self._folder = folder
        self._store = store
        self._recent: OrderedDict[tuple[str, int], _Expected] = OrderedDict()  # by (root, seq)
        self._warn = Quiet(log)

    def expect(self, root: str, verdict: Verdict) -> None:
        """Take note of a stored verdict: its picture comes behind it."""
        self._recent[root, verdict.seq] = _Expected(verdict.key, verdict.heatmap_sha256)
        if len(self._recent) > MAX_RECENT:
            self._recent.popitem(last=False)

    def take(self, root: str, seq: int, picture: bytes, ledger: Ledger) -> None:
        """Pass a picture on, or drop it where no stored verdict names it. May raise StoreError."""
        expected = self._recent.get((root, seq)) or self._look_up(root, seq, ledger)
        if expected is None:
            self._warn("unknown", "a heatmap was dropped: %s/heatmap/%d came without its verdict", root, seq)
        elif expected.sha256 != hashlib.sha256(picture).hexdigest():
            self._warn("other", "a heatmap was dropped: %s/heatmap/%d is not the one that its verdict names", root, seq)
        else:
            self._folder.put(expected.key, picture)

    def _look_up(self, root: str, seq: int, ledger: Ledger) -> _Expected | None:
        book = ledger.current().get(root)
        verdict = None if book is None else self._store.find(Key(book.station, book.epoch, seq))
        return None if verdict is None else _Expected(verdict.key, verdict.heatmap_sha256)
