"""Everything that taktsight refuses, split by what the caller does about it.

    TaktsightError            exit code 1
    ├── InputError                      3   images, folders, score files: mend the input
    │   └── BadFrame                    -   this one frame cannot be inspected: no verdict for its part
    ├── SettingsError                   4   station.yaml: mend the key that the message names
    ├── RecipeError                     5   recipe missing, damaged, tampered, too new: fetch or train another
    ├── CalibrationError                6   too few good parts for the wish, unusable reference: collect more
    ├── MissingPackage                  7   an optional package is not installed: the message names the extra
    └── NotRegistered                   -   this one part could not be aligned: no verdict for it

A message says what was found, what was wanted and what to do. `agent.errors` and `trainer.errors` add their own
leaves to this tree. Exit codes 2 (usage) and 130 (interrupted) are the shell's own.
"""


class TaktsightError(Exception):
    """Base of every error that taktsight raises on purpose; its text is written for the user."""

    exit_code = 1


class InputError(TaktsightError):
    """An image, a folder or a file given by the user cannot be used."""

    exit_code = 3


class BadFrame(InputError):
    """This one frame cannot be inspected: wrong size, wrong channels, light out of range."""


class SettingsError(TaktsightError):
    """A key of a settings file is unknown, missing or out of range."""

    exit_code = 4


class RecipeError(TaktsightError):
    """A recipe cannot be read, trusted or written."""

    exit_code = 5


class CalibrationError(TaktsightError):
    """There is not enough, or not good enough, material to calibrate from."""

    exit_code = 6


class MissingPackage(TaktsightError):
    """An optional package is not installed."""

    exit_code = 7


class NotRegistered(TaktsightError):
    """This part could not be aligned to the reference.

    cause: a short stable word for machines: `blank`, `wrong_part`, `out_of_view` or `poor_fit`.
    """

    def __init__(self, message: str, *, cause: str) -> None:
        super().__init__(message)
        self.cause = cause
