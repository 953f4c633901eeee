"""A folder of heatmaps that never grows beyond its limit and never holds up a verdict.

A thread of its own writes: a slow disk costs pictures, which are counted, and nothing else.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import OrderedDict
from pathlib import Path
from queue import Full, Queue

from taktsight_subscribe.errors import SettingsError
from taktsight_subscribe.messages import Key
from taktsight_subscribe.quiet import Quiet

log = logging.getLogger(__name__)

MAX_WAITING = 64  # pictures in memory, some KB each
UNSAFE = re.compile(r"[^A-Za-z0-9_-]")


def heatmap_file(key: Key) -> Path:
    """Return where a part's heatmap lies below the folder: station/epoch-seq.jpg, odd characters as %XX."""
    station = UNSAFE.sub(lambda found: "".join(f"%{byte:02X}" for byte in found.group().encode()), key.station)
    return Path(station[:200]) / f"{key.epoch}-{key.seq}.jpg"


class HeatmapFolder:
    """Keeps pictures in `folder`; the oldest go when there are more than max_mb. Raises SettingsError if it cannot."""

    def __init__(self, folder: str | Path, max_mb: float = 1024.0) -> None:
        if max_mb <= 0:
            raise SettingsError(f"heatmaps_mb: {max_mb:g} found, need more than 0")
        self.folder = Path(folder)
        self._max_bytes = max_mb * 1e6
        self._waiting: Queue[tuple[Key, bytes] | None] = Queue(MAX_WAITING)
        self._sizes: OrderedDict[Path, int] = OrderedDict()  # oldest first
        self._total_bytes = 0
        self._warn = Quiet(log)
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Look at what is there and begin to write; again after `stop`, if so wanted.

        Raises SettingsError if the folder cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            found = sorted((path.stat().st_mtime, path.stat().st_size, path) for path in self.folder.glob("*/*.jpg"))
        except OSError as error:
            raise SettingsError(f"heatmaps: {self.folder} cannot be used: {error}") from error
        self._sizes.clear()
        self._total_bytes = 0
        for _, size_bytes, path in found:
            self._note(path, size_bytes)
        self._waiting = Queue(MAX_WAITING)  # a thread that a slow disk holds up since the last `stop` keeps its own
        self._thread = threading.Thread(
            target=self._work, args=(self._waiting,), name="taktsight-heatmaps", daemon=True
        )
        self._thread.start()

    def put(self, key: Key, picture: bytes) -> None:
        """Have a picture written soon; never waits."""
        try:
            self._waiting.put_nowait((key, picture))
        except Full:
            self._warn("full", "a heatmap was dropped: the folder %s is too slow", self.folder)

    def path(self, key: Key) -> Path | None:
        """Return a part's heatmap, if it is there."""
        path = self.folder / heatmap_file(key)
        return path if path.is_file() else None

    def stop(self, timeout_s: float) -> None:
        """Write what waits, at most timeout_s long."""
        if self._thread is not None and self._thread.is_alive():
            try:
                self._waiting.put(None, timeout=timeout_s)
            except Full:
                return
            self._thread.join(timeout_s)

    def _work(self, waiting: Queue[tuple[Key, bytes] | None]) -> None:
        while (item := waiting.get()) is not None:
            try:
                self._write(*item)
            except OSError as error:
                self._warn("failed", "a heatmap was not written: %s", error)

    def _write(self, key: Key, picture: bytes) -> None:
        path = self.folder / heatmap_file(key)
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_suffix(".part")
        try:
            temporary.write_bytes(picture)
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        self._note(path, len(picture))

    def _note(self, path: Path, size_bytes: int) -> None:
        """Count a file, and remove the oldest ones until the limit holds."""
        self._total_bytes += size_bytes - self._sizes.pop(path, 0)
        self._sizes[path] = size_bytes
        while self._total_bytes > self._max_bytes and self._sizes:
            oldest, gone_bytes = self._sizes.popitem(last=False)
            self._total_bytes -= gone_bytes
            oldest.unlink(missing_ok=True)
