"""The room that an outbox has on its disk: what may be stored, what gives way, and what a person should see to."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agent.errors import OutboxFull
from agent.outbox.database import PAGE_BYTES, Database
from agent.outbox.folder import DAMAGED, OutboxSettings
from agent.outbox.spool import RESERVES, Reserve, Room, Spool
from agent.publishing.messages import Alarm, HeatmapPayload, numbered

log = logging.getLogger(__name__)

HEATMAPS = "heatmaps"
ALARM_SHARE = 0.5  # of max_mb in use: a person should know long before the station halts


class Space:
    """Heatmaps, reserve and limits of one outbox."""

    def __init__(self, settings: OutboxSettings) -> None:
        self._settings = settings
        self._folder = settings.folder
        reserve = int(settings.reserve_mb * 1e6)
        self.log_pages = min(256, max(16, reserve // len(RESERVES) // 4 // PAGE_BYTES))  # before a checkpoint
        self.spool = Spool(self._folder / HEATMAPS, settings.heatmap_mb * 1e6)
        self.reserve = Reserve(self._folder, reserve)
        self._room = Room(self._folder, self.spool, self.reserve)
        self.refusal = ""  # why the last batch was not stored
        self.complaint = ""  # what the disk refuses the deliverer
        self.renewal = ""  # why another epoch began in this run
        self._share_per_row = 0.0  # of max_mb, when a batch was last stored

    def insist(self, work: Callable[[], object], *, storing: bool) -> None:
        """Do the work, and let give way what can: `agent.outbox.spool.Room`. Raises OutboxFull."""
        self._room.insist(work, storing=storing)

    def check(self, database: Database, size: int, save: Callable[[], None]) -> None:
        """Refuse what max_mb, or the space that acknowledging needs, does not leave room for.

        save: writes down what is acknowledged, and removes it. Raises OutboxFull.
        """
        most = self._settings.max_mb * 1e6
        used = database.used_bytes() + size
        self._share_per_row = used / most / (database.last_seq - database.removed + 1)
        if used > most:
            save()
            if database.used_bytes() + size > most:
                raise OutboxFull(
                    f"{self._folder}: {database.last_seq - database.floor} verdicts wait and fill "
                    f"{self._settings.max_mb:g} MB, all it may hold: bring the consumers back, then resume"
                )
        if RESERVES[0] in self.reserve.missing and database.free_bytes() < 2 * size + 16 * PAGE_BYTES:
            raise OutboxFull(f"{self._folder}: disk full, the reserve is used up: make room, then resume")

    def begin(self, epoch: str, last_seq: int) -> None:
        """Keep the heatmaps of this epoch up to last_seq, no others. Raises OutboxFull."""
        try:
            self.spool.begin(epoch, last_seq)
        except OSError as error:
            raise OutboxFull(str(error.strerror)) from error

    def note(self, path: Path) -> None:
        """Make an empty file. Raises OutboxFull."""
        try:
            path.touch()
        except OSError as error:
            raise OutboxFull(str(error.strerror)) from error

    def spooled(
        self, message: dict[str, Any], heatmap: HeatmapPayload | None, *, epoch: str, seq: int
    ) -> dict[str, Any]:
        """Return the message with its key; its heatmap is kept, or no longer linked."""
        kept = heatmap is not None and self.spool.put(seq, heatmap, refuse=bool(self.reserve.missing))
        if not kept:
            message = {**message, "heatmap": None}
        return numbered(message, epoch=epoch, seq=seq)

    def complain(self, complaint: str) -> None:
        """Log what the disk refuses the deliverer, once as long as it lasts."""
        if complaint and not self.complaint:
            log.error("%s: %s", self._folder, complaint)
        self.complaint = complaint

    def tell_of_copy(self, text: str) -> None:
        """Let people know that the outbox is an old copy of itself."""
        if text != self.renewal:
            log.error("%s: %s", self._folder, text)
        self.renewal = text

    def alarms(self, waiting: int, quarantined: int) -> list[Alarm]:
        """Return what a person should see to, as of now."""
        damaged = len(list(self._folder.glob(f"{DAMAGED}*")))
        low = "the disk has no room for the reserve: make room" if self.reserve.missing else ""
        if (filled := self._share_per_row * waiting) > ALARM_SHARE:
            low = f"{waiting} verdicts wait and fill {filled:.0%} of outbox.max_mb: bring the consumers back"
        found = {
            "storage_full": self.refusal,
            "storage_low": low,
            "verdicts_quarantined": f"{quarantined} messages in quarantine: export them" if quarantined else "",
            "database_damaged": f"{damaged} databases set aside: check the disk, export them" if damaged else "",
            "outbox_old_copy": self.renewal,
        }
        return [Alarm(code, detail) for code, detail in found.items() if detail]
