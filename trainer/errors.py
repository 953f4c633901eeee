"""What stops a training, split by what the user does about it. Leaves of `calibration.errors`.

TaktsightError
├── TrainingError     11   training cannot start or went astray: other data or other options
└── ParityError       12   the exported graph answers otherwise than the network: nothing is written
"""

from calibration.errors import TaktsightError


class TrainingError(TaktsightError):
    """Training cannot start with this data and these options, or it diverged."""

    exit_code = 11


class ParityError(TaktsightError):
    """The exported graph does not reproduce the trained network; no recipe is written."""

    exit_code = 12
