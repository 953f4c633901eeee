"""What tells a row of the outbox that is as it was written from one that is not."""

from __future__ import annotations

import hashlib
from typing import Any


def checksum(seq: int, topic: str, payload: bytes) -> bytes:
    """Return 8 bytes that a row with any other seq, topic or payload does not have."""
    digest = hashlib.blake2b(f"{seq}\n{topic}\n".encode(), digest_size=8)
    digest.update(payload)
    return digest.digest()


def intact(seq: Any, topic: Any, payload: Any, stored: Any) -> bool:
    """Return whether a row is what was once written; its columns may be of any type in a damaged file."""
    whole = isinstance(seq, int) and isinstance(topic, str) and isinstance(payload, bytes)
    return whole and stored == checksum(seq, topic, payload)
