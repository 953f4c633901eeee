"""What can go wrong at the line, split by what the loop does about it. Leaves of `calibration.errors`.

TaktsightError
├── CameraError        8   the camera is gone or delivers nonsense: no verdict for its parts, reconnect
│   ├── FrameError     -   one frame is no picture, the camera goes on: no verdict for its part, at once
│   └── EndOfFrames    -   a finite source (a folder) has no more: stop cleanly
├── EngineError        9   the engine cannot load the recipe or does not reproduce its answers: stop
├── OutputError        8   the gate cannot be driven: fail safe
├── BrokerError       10   the broker refuses us for good (password, ACL): inspection goes on, verdicts wait
├── CommandError       -   a command cannot be carried out as things are: the reply says why
└── StorageError      13   the outbox or the log of commands cannot be used: do not start
    ├── InUse          -   another process holds the outbox: it may be about to end
    └── OutboxFull     -   verdicts cannot be stored any more: hold the line, keep what we have
"""

from calibration.errors import TaktsightError


class CameraError(TaktsightError):
    """The camera is gone, or delivers something that is not a picture of the agreed kind."""

    exit_code = 8


class FrameError(CameraError):
    """What came for one trigger is no picture; the next frame may be one."""

    def __init__(self, message: str, trigger_id: int) -> None:
        super().__init__(message)
        self.trigger_id = trigger_id


class EndOfFrames(CameraError):
    """A finite source of frames is exhausted."""


class EngineError(TaktsightError):
    """The engine cannot run the recipe on this device, or gives other answers than the trainer did."""

    exit_code = 9


class OutputError(TaktsightError):
    """What acts on the verdicts cannot be driven."""

    exit_code = 8


class BrokerError(TaktsightError):
    """The MQTT broker cannot be used as configured."""

    exit_code = 10


class CommandError(TaktsightError):
    """A command cannot be carried out as things are, and nothing was changed; or what became of it is not known."""


class StorageError(TaktsightError):
    """A file in which the station remembers (verdicts that wait, commands, captured frames) cannot be used."""

    exit_code = 13


class InUse(StorageError):
    """Another process uses the outbox."""


class OutboxFull(StorageError):
    """No room for another verdict, on the disk or within the limit of station.yaml."""
