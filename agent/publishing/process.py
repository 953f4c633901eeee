"""The publish process: started by the inspect process, never by hand; `agent.publishing.publication` says what it does.

    python -m agent.publishing.process STATION.yaml RING WAKE CONTROL SETTINGS        four inherited descriptors

It ends when the inspect process has, and not before: a signal that reaches both is for the other one.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import socket
import sys
from pathlib import Path

from agent.between.control import MOST_BYTES, Asking
from agent.between.record import Charge
from agent.between.ring import Ring
from agent.config import read_station
from agent.errors import CommandError
from agent.journal import log_to_journal
from agent.line.realtime import step_back
from agent.publishing.messages import Origin
from agent.publishing.publication import Hello, Publication
from calibration.console import log_to_stderr
from calibration.errors import TaktsightError

log = logging.getLogger(__name__)


def main(arguments: list[str]) -> int:
    """Publish until the inspect process ends; 0, or 1 after an error that the inspect process was told."""
    faulthandler.enable()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGABRT):  # SIGABRT: systemd's watchdog
        signal.signal(number, signal.SIG_IGN)
    log_to_stderr()
    path, (ring, wake, control, settings) = Path(arguments[0]), map(int, arguments[1:])
    end = socket.socket(fileno=control)
    inspection = Asking(end)
    try:
        with os.fdopen(settings, "rb") as file:
            station = read_station(path, file.read())
        step_back(station.realtime)
        log_to_journal(station=station.name)
        publication = Publication(station, Ring(ring), wake, inspection, as_hello(end.recv(MOST_BYTES)))
    except TaktsightError as error:
        inspection.tell("failed", error=type(error).__name__, text=str(error))
        return 1
    except Exception as error:
        log.exception("the publish process cannot start")
        inspection.tell("failed", error=CommandError.__name__, text=f"the publish process cannot start: {error}")
        return 1
    inspection.tell("ready")
    undelivered, lost = publication.run()
    inspection.tell("ended", verdicts=undelivered.verdicts, heatmaps=undelivered.heatmaps, lost=lost)
    return 0


def as_hello(data: bytes) -> Hello:
    """Return the inspect process's first message."""
    told = json.loads(data)
    charge = told["charge"]
    return Hello(**{**told, "charge": Charge(**{**charge, "origin": Origin(**charge["origin"])})})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
