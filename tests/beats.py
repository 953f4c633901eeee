"""A beat for tests of what happens to parts: where a loaded machine's clock comes late, no part is missed for that."""

from __future__ import annotations

import pytest

from agent.cameras.trigger import Announced
from agent.line.beat import Beat
from agent.line.pace import OnTheBeat


class PatientBeat(OnTheBeat):
    """Parts come a takt after the one before at the earliest, when they are asked for, and stand there until then."""

    def __init__(self, takt_ns: int) -> None:
        super().__init__(takt_ns)
        self.within_ns = None

    def take(self, now_ns: int) -> Announced | None:
        if self.next_ns is not None and now_ns < self.next_ns:
            return None
        self.next_ns = now_ns + self._takt_ns
        return Announced(now_ns)


def be_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give lines that are made from now on a patient beat."""

    def pace_of(beat: Beat) -> PatientBeat:
        assert beat.source is None, "a signal has no beat"
        assert not beat.by_camera, "a camera has no beat"
        return PatientBeat(round(beat.takt_ms * 1e6))

    monkeypatch.setattr("agent.line.loop.pace_of", pace_of)
