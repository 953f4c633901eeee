"""A publisher over MQTT: what the outbox holds, at least once, in order, without ever holding up the line.

    line's thread              courier's thread                              paho's network thread
    outbox.store, wake() ->    reads the outbox, publishes ----------------> socket
                               events <------------------------------------- Up, Down, Answered, Heard

No verdict is remembered only here: `agent.mqtt.delivery` says which row goes out next, the row comes from the outbox,
and it leaves the outbox when every consumer has acknowledged it, or, where no consumer is named, when the broker has
confirmed it.
"""

from __future__ import annotations

import time
from typing import Any

from agent.errors import StorageError
from agent.mqtt.client import MqttSettings
from agent.mqtt.courier import Courier, Reply, Status, Stop, outbox_consumers
from agent.mqtt.link import Packet
from agent.outbox.outbox import Outbox
from agent.publishing.messages import Origin, encode
from agent.publishing.publisher import OnCommand, Undelivered

__all__ = ["MqttPublisher", "MqttSettings", "outbox_consumers"]

GOODBYE_S = 1.0  # kept back from the time to stop, for the last status; at most a quarter of it


class MqttPublisher:
    """A Publisher over MQTT 5 or 3.1.1. Topics below the root: see `agent/interface/asyncapi.yaml`.

    on_command: gets what comes on cmd/{name}; None: the station does not listen. Called on the courier's thread.
    outbox: waits for `outbox_consumers(settings)`; it may wait for others too, which are not this publisher's.

    Raises SettingsError if a password or certificate cannot be read, StorageError if the outbox does not wait for us.
    """

    def __init__(
        self, settings: MqttSettings, origin: Origin, outbox: Outbox, on_command: OnCommand | None = None
    ) -> None:
        self._names = outbox_consumers(settings)
        unknown = sorted(set(self._names) - set(outbox.acknowledged()))
        if unknown:
            raise StorageError(f"the outbox does not wait for {unknown}: set_consumers comes first")
        self._courier = Courier(settings, origin, outbox, on_command)
        self._outbox = outbox

    def start(self) -> None:
        """Begin to connect; returns at once."""
        self._courier.start()

    def wake(self) -> None:
        """Something new was stored in the outbox."""
        self._courier.events.put(None)

    def publish_status(self, message: dict[str, Any]) -> None:
        """Make this the retained status, now and after every reconnection."""
        self._courier.events.put(Status(dict(message)))

    def publish_reply(self, name: str, message: dict[str, Any], correlation: bytes | None) -> None:
        """Publish the reply to a command on cmd/{name}/reply."""
        self._courier.events.put(Reply(Packet(f"cmd/{name}/reply", encode(message), correlation=correlation)))

    def stop(self, timeout_s: float) -> Undelivered:
        """Deliver what waits, publish `stopped`, disconnect; returns within timeout_s what stays in the outbox."""
        if self._courier.is_alive():
            deadline_s = time.monotonic() + timeout_s
            self._courier.events.put(Stop(deadline_s - min(GOODBYE_S, timeout_s / 4), deadline_s))
            self._courier.join(timeout_s)
        acknowledged, last = self._outbox.acknowledged(), self._outbox.last_seq
        waiting = max(last - acknowledged.get(name, last) for name in self._names)
        return Undelivered(verdicts=waiting, heatmaps=self._outbox.heatmaps_waiting)
