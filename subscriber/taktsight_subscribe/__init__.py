"""Receive the verdicts of taktsight stations: each part once, stored before it is acknowledged."""

from taktsight_subscribe.commands import Reply, send_command
from taktsight_subscribe.errors import (
    BrokerError,
    MissingPackage,
    NoReply,
    SettingsError,
    StoreError,
    SubscriberError,
)
from taktsight_subscribe.messages import Key, Verdict
from taktsight_subscribe.postgres_store import PostgresStore
from taktsight_subscribe.sqlite_store import SqliteStore
from taktsight_subscribe.store import Gap, Store
from taktsight_subscribe.subscriber import Subscriber

__all__ = [
    "BrokerError",
    "Gap",
    "Key",
    "MissingPackage",
    "NoReply",
    "PostgresStore",
    "Reply",
    "SettingsError",
    "SqliteStore",
    "Store",
    "StoreError",
    "Subscriber",
    "SubscriberError",
    "Verdict",
    "send_command",
]
