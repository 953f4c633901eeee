"""What can go wrong at the consumer, split by what its user does about it.

SubscriberError
├── SettingsError      4   a topic, name or file that cannot work: correct it
├── MissingPackage     7   psycopg is not installed: install the extra
├── BrokerError       10   the broker refuses us (password, access list): nothing arrives
├── NoReply           12   a command was sent and nobody answered in time: whether it was done is unknown
└── StoreError        13   the database cannot be used now: nothing is acknowledged until it is back
    └── RowRefused     -   the database works, and refuses the contents of a row for good
"""


class SubscriberError(Exception):
    """Anything that this package raises on purpose."""

    exit_code = 1


class SettingsError(SubscriberError):
    """A setting that cannot work."""

    exit_code = 4


class MissingPackage(SubscriberError):
    """An optional package is needed and not installed."""

    exit_code = 7


class BrokerError(SubscriberError):
    """The MQTT broker does not let us in, or not where we need to be."""

    exit_code = 10


class NoReply(SubscriberError):
    """No answer to a command within its time."""

    exit_code = 12


class StoreError(SubscriberError):
    """The store cannot be used; what was asked of it has not happened, and may be asked again."""

    exit_code = 13


class RowRefused(StoreError):
    """The store works and refuses these contents: asking again would not help."""
