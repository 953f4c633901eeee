"""The station's figures over HTTP, on this machine only: /metrics for Prometheus, /health.json for `top`.

One thread serves all. Whoever connects has ANSWER_WITHIN_S for the whole exchange, and MOST_CLIENTS are served at a
time; slow clients, garbage and a port in use cost the line nothing. Metrics are named as Prometheus asks for: base
units, `_total` for what is counted. They are collected from `Health` at each request; nothing is registered globally.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from agent.health.health import Health
from agent.health.histogram import Histogram
from agent.health.message import GAUGES, Figures
from agent.publishing.messages import STATES
from agent.verdict import Outcome, Reason

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
MOST_CLIENTS = 8
MOST_REQUEST_BYTES = 8192
ANSWER_WITHIN_S = 5.0
BOUNDS_MS = (1, 2, 5, 10, 15, 20, 25, 30, 35, 40, 50, 60, 75, 100, 150, 200, 300, 500, 1000, 2000, 5000)
PLACES = {  # measure -> name of its metric, meaning
    "dx_px": ("dx_pixels", "How far parts lay right of the reference, newest 1000 registered parts."),
    "dy_px": ("dy_pixels", "How far parts lay below the reference, newest 1000 registered parts."),
    "angle_deg": ("angle_degrees", "Turn of the parts, newest 1000 registered parts."),
    "residual_px": ("residual_pixels", "Distance of the parts' contours from the reference's after registration."),
    "similarity": ("similarity_ratio", "Share of the contour found, newest 1000 registered parts."),
}
CONDITIONS = {
    "brightness": ("brightness_ratio", "Mean of the frame, share of full scale, newest 1000 frames."),
    "dark_level": ("dark_level_ratio", "A tenth of the frame is darker than this, share of full scale."),
    "bright_level": ("bright_level_ratio", "A tenth of the frame is brighter than this, share of full scale."),
    "saturated_share": ("saturated_ratio", "Share of the frame at full scale, newest 1000 frames."),
    "sharpness": ("sharpness_ratio", "Fine over coarse gradient energy, 1 is without focus, newest 1000 frames."),
}
_SIGNS = {"none": 0.0, "up": 1.0, "down": -1.0}
PROMETHEUS_TEXT = "text/plain; version=0.0.4; charset=utf-8"


class HealthServer:
    """Serves one station's figures from a thread of its own."""

    def __init__(self, health: Health, port: int) -> None:
        """port: on 127.0.0.1; 0 takes a free one, and `port` says which."""
        self.port = port
        self._health = health
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(HealthCollector(health))
        self._clients = 0
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped = asyncio.Event()
        self._serving = threading.Event()

    def start(self) -> bool:
        """Listen; where that is not possible, say so in the log and return False: the station goes on without."""
        try:
            listener = socket.create_server((HOST, self.port), backlog=MOST_CLIENTS)
        except OSError as error:
            log.warning(
                "health.port: %s:%d cannot be used (%s): no metrics, no taktsight-agent top; set it to a port that is "
                "free, or to 0", HOST, self.port, error.strerror
            )  # fmt: skip
            return False
        self.port = listener.getsockname()[1]
        self._thread = threading.Thread(target=self._work, args=[listener], name="health", daemon=True)
        self._thread.start()
        self._serving.wait()
        return True

    def stop(self) -> None:
        """Cut all connections and end the thread."""
        if self._thread is not None and self._loop is not None:
            self._loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join()
            self._thread = None

    def _work(self, listener: socket.socket) -> None:
        asyncio.run(self._serve(listener))

    async def _serve(self, listener: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        server = await asyncio.start_server(self._meet, sock=listener, limit=MOST_REQUEST_BYTES)
        self._serving.set()
        await self._stopped.wait()
        server.close()

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one client, whatever it does, within ANSWER_WITHIN_S."""
        self._clients += 1
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                crowded = self._clients > MOST_CLIENTS
                writer.write(_CROWDED if crowded else await self._answer(reader))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except OSError:  # TimeoutError, too: gone, or too slow
            pass
        finally:
            self._clients -= 1
            writer.transport.abort()

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return b""
        except asyncio.LimitOverrunError:
            return _response("431 Request Header Fields Too Large", b"ask for less\n")
        words = head.split(b"\r\n", 1)[0].split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/"):
            return _response("400 Bad Request", b"not HTTP\n")
        if words[0] != b"GET":
            return _response("405 Method Not Allowed", b"only GET\n")
        return self._page(words[1].partition(b"?")[0])

    def _page(self, path: bytes) -> bytes:
        if path == b"/metrics":
            return _response("200 OK", generate_latest(self._registry), PROMETHEUS_TEXT)
        if path == b"/health.json":
            told = json.dumps(self._health.snapshot(), allow_nan=False).encode()
            return _response("200 OK", told, "application/json")
        return _response("404 Not Found", b"/metrics for Prometheus, /health.json for taktsight-agent top\n")


class HealthCollector(Collector):
    """Turns the figures of one station into metrics, at each request anew."""

    def __init__(self, health: Health) -> None:
        self._health = health

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics."""
        figures = self._health.figures()
        yield from _who(figures)
        yield from _verdicts(figures)
        yield from _latencies(figures)
        yield from _measures(figures)
        yield from _drift(figures)
        yield from _gauges(figures.gauges)


def _who(figures: Figures) -> Iterator[Metric]:
    names = {"station": figures.station, "recipe": figures.recipe, "recipe_digest": figures.recipe_digest}
    yield InfoMetricFamily("taktsight_station", "Who speaks.", names)
    states = {state: float(state == figures.state) for state in STATES if state != "offline"}
    yield _labelled("taktsight_state", "1 for the present state.", "state", states)
    alarms = {alarm.code: 1.0 for alarm in figures.alarms}
    yield _labelled("taktsight_alarm", "1 for each alarm that is up.", "code", alarms)
    yield _gauge(
        "taktsight_start_time_seconds", "When the station started, Unix time.", figures.started_utc.timestamp()
    )
    if figures.last_verdict_utc is not None:
        last_s = figures.last_verdict_utc.timestamp()
        yield _gauge("taktsight_last_verdict_time_seconds", "When the newest verdict came, Unix time.", last_s)


def _verdicts(figures: Figures) -> Iterator[Metric]:
    """Yield all pairs that can be, 0 where there was none: an increase from nothing is no increase for Prometheus."""
    verdicts = CounterMetricFamily(
        "taktsight_verdicts", "Verdicts by outcome and reason.", labels=["outcome", "reason"]
    )
    for outcome in Outcome:
        for reason in Reason:
            if (outcome is Outcome.NO_VERDICT) != (reason is Reason.SCORE):
                verdicts.add_metric([outcome, reason], figures.since_start.verdicts[outcome, reason])
    yield verdicts


def _latencies(figures: Figures) -> Iterator[Metric]:
    yield _gauge("taktsight_takt_seconds", "From trigger to trigger.", figures.takt_ms / 1e3)
    yield _gauge("taktsight_deadline_seconds", "From trigger to verdict, at most.", figures.deadline_ms / 1e3)
    whole = HistogramMetricFamily("taktsight_verdict_seconds", "Trigger to verdict, of parts that were looked at.")
    whole.add_metric([], *_buckets(figures.since_start.latency))
    yield whole
    stages = HistogramMetricFamily("taktsight_stage_seconds", "What each stage took.", labels=["stage"])
    for stage, histogram in figures.since_start.stages.items():
        stages.add_metric([stage], *_buckets(histogram))
    yield stages
    recent = GaugeMetricFamily(
        "taktsight_recent_verdict_seconds", "Trigger to verdict, last ten minutes.", labels=["statistic"]
    )
    summary = figures.recent.latency.summary()
    if summary is not None:
        found = {"p50": summary.p50, "p99": summary.p99, "p99.9": summary.p999, "max": summary.max}
        for statistic, duration_ms in found.items():
            recent.add_metric([statistic], duration_ms / 1e3)
    yield recent


def _measures(figures: Figures) -> Iterator[Metric]:
    for measure, spread in figures.places.items():
        name, meaning = PLACES[measure]
        yield _labelled(f"taktsight_registration_{name}", meaning, "statistic", asdict(spread))
    for measure, spread in figures.conditions.items():
        name, meaning = CONDITIONS[measure]
        yield _labelled(f"taktsight_frame_{name}", meaning, "statistic", asdict(spread))


def _drift(figures: Figures) -> Iterator[Metric]:
    drift = figures.drift
    yield _gauge("taktsight_score_drift_watched", "1 where the recipe says how good parts scored.", drift.watched)
    if drift.level is not None:
        meaning = "Average score of parts that passed, deviations above the calibration's median."
        yield _gauge("taktsight_score_drift_deviations", meaning, drift.level)
    yield _gauge("taktsight_score_drift", "1 drifted up, -1 drifted down, 0 not.", _SIGNS[drift.direction])


def _gauges(gauges: Mapping[str, float]) -> Iterator[Metric]:
    for name, value in sorted(gauges.items()):
        meaning = GAUGES.get(name, "Of the station.")
        if name.endswith("_total"):
            yield CounterMetricFamily(f"taktsight_{name.removesuffix('_total')}", meaning, value=value)
        else:
            yield _gauge(f"taktsight_{name}", meaning, value)


def _gauge(name: str, meaning: str, value: float) -> Metric:
    return GaugeMetricFamily(name, meaning, value=float(value))


def _labelled(name: str, meaning: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, meaning, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _buckets(histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
    """Return (upper bound in seconds, parts up to it) of each bucket, and the sum in seconds."""
    below, n, sum_ms = histogram.cumulative(BOUNDS_MS)
    bounds = [str(bound_ms / 1e3) for bound_ms in BOUNDS_MS]
    return [*zip(bounds, map(float, below), strict=True), ("+Inf", float(n))], sum_ms / 1e3


def _response(status: str, body: bytes, content_type: str = "text/plain; charset=utf-8") -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\nCache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n\r\n"
    )
    return head.encode() + body


_CROWDED = _response("503 Service Unavailable", b"too many clients: try again\n")
