"""What a station says in Sparkplug B, and what it understands of what it is told. Pure, no network.

Names and datatypes of the metrics are part of the interface to the plant: they stay as they are.

Source: Eclipse Sparkplug 3.0.0, sections 4 and 5. Times are milliseconds since 1970, UTC.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from agent.sparkplug.payload import DataType, MalformedPayload, Metric, Payload, Value
from calibration.errors import SettingsError

NAMESPACE = "spBv1.0"
REBIRTH = "Node Control/Rebirth"
BDSEQ = "bdSeq"
MOST_COMMAND_BYTES = 65_536  # a rebirth request has under 100
MOST_NAME_BYTES = 256

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class SparkplugSettings:
    """Where the station lives in the Sparkplug namespace: `sparkplug:` in station.yaml. Raises SettingsError."""

    group: str  # "plant1"
    edge_node: str  # unique in its group
    device: str  # "cell7"
    primary_host: str | None = None  # verdicts wait while this host application is offline; None: they never do

    def __post_init__(self) -> None:
        """Refuse names that MQTT topics cannot carry."""
        for key in ("group", "edge_node", "device", "primary_host"):
            name = getattr(self, key)
            if name is not None or key != "primary_host":
                _check_name(key, name)
        if self.group == "STATE":
            raise SettingsError("sparkplug.group: 'STATE' found, which is the topic of host applications: rename it")

    def topic(self, verb: str) -> str:
        """Return the topic of one of our messages: NBIRTH, NDEATH, NCMD, or DBIRTH, DDATA, DDEATH, DCMD."""
        node = f"{NAMESPACE}/{self.group}/{verb}/{self.edge_node}"
        return node if verb.startswith("N") else f"{node}/{self.device}"

    def host_topic(self) -> str:
        """Return the topic on which the primary host says whether it is online (since 3.0 inside the namespace)."""
        return f"{NAMESPACE}/STATE/{self.primary_host}"


def _check_name(key: str, name: object) -> None:
    if not isinstance(name, str) or not name or not name.isprintable() or set(name) & set("/+#"):
        raise SettingsError(f"sparkplug.{key}: {name!r} found, need a name of printable characters without / + #")
    if len(name.encode()) > MOST_NAME_BYTES:
        raise SettingsError(f"sparkplug.{key}: {len(name.encode())} bytes found, need {MOST_NAME_BYTES} or fewer")


@dataclass(frozen=True, slots=True)
class HostState:
    """What a host application says of itself."""

    online: bool
    timestamp_ms: int


# metric, datatype, key in the message; a metric's name and type are part of the interface for ever
_VERDICT_METRICS = (
    ("Verdict/Epoch", DataType.STRING, "epoch"),
    ("Verdict/Seq", DataType.INT64, "seq"),
    ("Verdict/Run", DataType.STRING, "run"),
    ("Verdict/Trigger", DataType.INT64, "trigger"),
    ("Verdict/Part Id", DataType.STRING, "partId"),
    ("Verdict/Outcome", DataType.STRING, "outcome"),
    ("Verdict/Reason", DataType.STRING, "reason"),
    ("Verdict/Detail", DataType.STRING, "detail"),
    ("Verdict/Score", DataType.DOUBLE, "score"),
    ("Verdict/Threshold", DataType.DOUBLE, "threshold"),
    ("Verdict/Latency ms", DataType.DOUBLE, "latencyMs"),
    ("Verdict/Simulated", DataType.BOOLEAN, "isSimulated"),
    ("Line Action", DataType.STRING, "lineAction"),
    ("Recipe/Name", DataType.STRING, "internalRecipeId"),
    ("Recipe/Digest", DataType.STRING, "recipeDigest"),
)
_MISSING_METRICS = (
    ("Missing/Epoch", DataType.STRING, "epoch"),
    ("Missing/First", DataType.INT64, "first"),
    ("Missing/Last", DataType.INT64, "last"),
    ("Missing/Why", DataType.STRING, "why"),
)
_STATION_METRICS = (
    ("Station/Name", DataType.STRING, "station"),
    ("Station/State", DataType.STRING, "state"),
    ("Station/Alarms", DataType.STRING, "alarms"),  # codes with a comma between; empty: none
)
_METRICS_OF = {"verdict": _VERDICT_METRICS, "missing": _MISSING_METRICS}


def birth_metrics(bdseq: int, now_ms: int) -> tuple[Metric, ...]:
    """Return the metrics of NBIRTH: the number of this connection, and the one command we obey."""
    return (bdseq_metric(bdseq, now_ms), Metric(REBIRTH, DataType.BOOLEAN, False, now_ms))


def bdseq_metric(bdseq: int, now_ms: int) -> Metric:
    """Return the metric that ties a death to its birth: NDEATH holds it alone."""
    return Metric(BDSEQ, DataType.INT64, bdseq, now_ms)


def device_metrics(
    latest: Mapping[str, Any] | None, status: Mapping[str, Any] | None, now_ms: int
) -> tuple[Metric, ...]:
    """Return the metrics of DBIRTH: all there will ever be, with the values of the newest verdict and status, or null.

    Oldest first, which the specification demands of values that are not historical.
    """
    metrics = (
        *_metrics(_VERDICT_METRICS, latest or {}, now_ms),
        *_metrics(_MISSING_METRICS, {}, now_ms),
        *status_metrics(status or {}, now_ms),
    )
    return tuple(sorted(metrics, key=lambda metric: metric.timestamp_ms or 0))


def status_metrics(status: Mapping[str, Any], now_ms: int) -> tuple[Metric, ...]:
    """Return what the host is told of the station itself, of a message of `messages.status_message`."""
    alarms = status.get("alarms")
    codes = [str(alarm.get("code")) for alarm in alarms or () if isinstance(alarm, Mapping)]
    return _metrics(_STATION_METRICS, {**status, "alarms": ", ".join(codes) if status else None}, now_ms)


def row_metrics(topic: str, message: Mapping[str, Any], *, historical: bool, now_ms: int) -> tuple[Metric, ...]:
    """Return the metrics of one DDATA: a row of the outbox, topic `verdict` or `missing`, with its time of creation.

    Every verdict carries all its metrics, changed or not: each is an event of its own, and stands alone in a historian.
    """
    metrics = _metrics(_METRICS_OF[topic], message, now_ms)
    return tuple(replace(metric, historical=True) for metric in metrics) if historical else metrics


def _metrics(table: Iterable[tuple[str, DataType, str]], message: Mapping[str, Any], now_ms: int) -> tuple[Metric, ...]:
    created_ms = _milliseconds(message.get("creationTime"), now_ms)
    return tuple(Metric(name, kind, _fitting(message.get(key), kind), created_ms) for name, kind, key in table)


def _fitting(value: object, kind: DataType) -> Value:
    """Return the value as its datatype wants it, or None where it is of another kind."""
    match kind, value:
        case (DataType.BOOLEAN, bool()) | (DataType.STRING, str()):
            return value  # type: ignore[return-value]  # the pattern has just said which
        case DataType.INT64, int() if not isinstance(value, bool) and -(1 << 63) <= value < 1 << 63:
            return value
        case DataType.DOUBLE, int() | float() if not isinstance(value, bool):
            return float(value)
    return None


def _milliseconds(text: object, otherwise_ms: int) -> int:
    """Return an ISO 8601 time of our own messages as milliseconds since 1970."""
    try:
        return (datetime.fromisoformat(str(text)) - _EPOCH) // timedelta(milliseconds=1)
    except (ValueError, TypeError):  # no time, or none with a zone
        return otherwise_ms


def asks_for_rebirth(payload: Payload) -> bool:
    """Return whether an NCMD asks for new births: its Boolean `Node Control/Rebirth` is true."""
    return any(metric.name == REBIRTH and metric.value is True for metric in payload.metrics)


def host_state(data: bytes) -> HostState:
    """Return what a host application says of itself: JSON `{"online": bool, "timestamp": ms}`.

    Raises MalformedPayload on anything else, the plain ONLINE of Sparkplug 2.2 included.
    """
    try:
        state = json.loads(data[:MOST_COMMAND_BYTES])
    except (ValueError, RecursionError) as error:
        raise MalformedPayload(f"STATE is no JSON: {error}") from error
    online, timestamp = (state.get("online"), state.get("timestamp")) if isinstance(state, dict) else (None, None)
    if not isinstance(online, bool) or isinstance(timestamp, bool) or not isinstance(timestamp, int):
        raise MalformedPayload("STATE found without a Boolean `online` or a whole `timestamp`, need both")
    return HostState(online, timestamp)
