"""The figures over HTTP, on real sockets: what Prometheus reads, and that no client holds anything up."""

import http.client
import json
import logging
import re
import socket
import threading
import time
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

import agent.health.metrics
from agent.health.message import GAUGES
from agent.health.metrics import MOST_CLIENTS, MOST_REQUEST_BYTES, HealthServer
from agent.publishing.messages import Alarm
from agent.verdict import Outcome, Reason
from tests.health import DEVIATION, MEDIAN, SCHEMA, Clock, new_health, run, scored, silent
from tests.schemas import faults


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def health(clock):
    return new_health(clock)


@pytest.fixture
def server(health):
    one = HealthServer(health, 0)
    assert one.start()
    yield one
    one.stop()


def get(server, path, method="GET"):
    """Return (status, headers, body)."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read()
    finally:
        connection.close()


def raw(server, data, *, timeout_s=10.0):
    """Send bytes, return all that comes back until the other side closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=timeout_s) as client:
        client.sendall(data)
        answer = b""
        try:
            while chunk := client.recv(65536):
                answer += chunk
        except ConnectionResetError:
            pass
        return answer


def samples(server):
    """Return {name: {labels: value}} of all that Prometheus would store."""
    text = get(server, "/metrics")[2].decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = tuple(sorted(sample.labels.items()))
            assert labels not in found.setdefault(sample.name, {}), sample
            found[sample.name][labels] = sample.value
    return found


def labels(**given):
    return tuple(sorted(given.items()))


def test_verdicts_are_counters_and_those_that_never_came_stand_at_zero(server, health):
    health.note(scored())
    health.note(silent(Reason.LATE))
    found = samples(server)["taktsight_verdicts_total"]
    assert found[labels(outcome="pass", reason="score")] == 1
    assert found[labels(outcome="no_verdict", reason="late")] == 1
    assert found[labels(outcome="no_verdict", reason="blurred")] == 0
    assert len(found) == len(Reason) + len(Outcome) - 2  # pass and reject have one reason, no_verdict all others


def test_latencies_are_histograms_in_seconds(server, health):
    for latency_ms in (4.0, 18.0, 21.0, 44.0, 9000.0):
        health.note(scored(latency_ms=latency_ms, stage_ms={"engine": latency_ms / 2}))
    found = samples(server)
    assert found["taktsight_verdict_seconds_count"][()] == 5
    assert found["taktsight_verdict_seconds_sum"][()] == pytest.approx(9.087)
    buckets = found["taktsight_verdict_seconds_bucket"]
    at_most = {"0.005": 1, "0.02": 2, "0.04": 3, "0.05": 4, "5.0": 4, "+Inf": 5}
    assert {bound: buckets[labels(le=bound)] for bound in at_most} == at_most
    assert found["taktsight_stage_seconds_sum"][labels(stage="engine")] == pytest.approx(4.5435)
    assert found["taktsight_recent_verdict_seconds"][labels(statistic="max")] == 9.0
    assert found["taktsight_deadline_seconds"][()] == 0.045


def test_buckets_only_ever_grow_with_their_bound_and_with_time(server, health, clock):
    run(health, clock, 500)
    first = samples(server)["taktsight_verdict_seconds_bucket"]
    assert list(first.values()) == sorted(first.values())
    clock.now_s += 7200
    health.reset("gear", "cd" * 32)
    run(health, clock, 500)
    second = samples(server)["taktsight_verdict_seconds_bucket"]
    assert all(second[bound] >= count for bound, count in first.items())
    assert samples(server)["taktsight_verdicts_total"][labels(outcome="pass", reason="score")] == 1000


def test_state_recipe_alarms_places_and_drift_are_there(server, health, clock):
    run(health, clock, 200)
    for _ in range(100):
        health.note(scored(MEDIAN + 2.5 * DEVIATION))
    health.tell("paused", [Alarm("paused", "shift change")])
    found = samples(server)
    assert found["taktsight_station_info"] == {labels(station="cell7", recipe="flange", recipe_digest="ab" * 32): 1}
    assert {dict(key)["state"] for key, value in found["taktsight_state"].items() if value == 1} == {"paused"}
    assert found["taktsight_alarm"] == {labels(code="paused"): 1, labels(code="score_drift"): 1}
    assert found["taktsight_registration_angle_degrees"][labels(statistic="max")] == pytest.approx(5.0, abs=0.2)
    assert found["taktsight_frame_brightness_ratio"][labels(statistic="mean")] == pytest.approx(0.4, abs=0.01)
    assert found["taktsight_score_drift"][()] == 1
    assert found["taktsight_score_drift_deviations"][()] > 1
    assert found["taktsight_last_verdict_time_seconds"][()] == pytest.approx(clock.utc().timestamp())


def test_what_the_owner_measures_is_a_gauge_or_a_counter_by_its_name(server, health):
    health.gauges = {"outbox_waiting": 3, "stale_frames_total": 2, "of_its_own": 7}
    text = get(server, "/metrics")[2].decode()
    assert "# TYPE taktsight_outbox_waiting gauge" in text
    assert f"# HELP taktsight_outbox_waiting {GAUGES['outbox_waiting']}" in text
    assert "# TYPE taktsight_stale_frames_total counter" in text
    assert samples(server)["taktsight_stale_frames_total"][()] == 2
    assert samples(server)["taktsight_of_its_own"][()] == 7


def test_every_metric_is_ours_and_says_what_it_is(server, health, clock):
    run(health, clock, 50)
    for family in text_string_to_metric_families(get(server, "/metrics")[2].decode()):
        assert family.name.startswith("taktsight_")
        assert family.documentation, family.name


def test_the_page_names_every_metric_and_no_other(server, health, clock):
    run(health, clock, 200)
    health.gauges = dict.fromkeys(GAUGES, 1.0)
    health.tell("running", [Alarm("halted", "for a test")])
    names = {re.sub(r"_(bucket|count|sum)$", "", name) for name in samples(server)}
    page = (Path(agent.__file__).parents[1] / "docs" / "health.md").read_text(encoding="utf-8")
    assert set(re.findall(r"taktsight_\w+", page)) == names


def test_nothing_is_registered_globally(server):
    assert not [name for name in REGISTRY._names_to_collectors if name.startswith("taktsight")]


def test_health_json_is_the_snapshot(server, health, clock):
    run(health, clock, 50)
    status, headers, body = get(server, "/health.json")
    assert (status, headers["Content-Type"]) == (200, "application/json")
    assert faults(json.loads(body), SCHEMA) == []
    assert json.loads(body) == json.loads(json.dumps(health.snapshot()))


def test_it_listens_on_this_machine_only(server):
    own = socket.gethostbyname_ex(socket.gethostname())[2]
    for address in [one for one in own if not one.startswith("127.")]:
        with pytest.raises(OSError):
            socket.create_connection((address, server.port), timeout=1).close()
    assert agent.health.metrics.HOST == "127.0.0.1"


def test_other_paths_and_methods_are_told_so(server):
    assert get(server, "/")[0] == 404
    assert b"/metrics" in get(server, "/")[2]
    assert get(server, "/metrics", "POST")[0] == 405
    assert get(server, "/metrics?x=1")[0] == 200


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (b"\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"400"),
        (b"GET /metrics\r\n\r\n", b"400"),
        (b"GET /" + b"a" * 3 * MOST_REQUEST_BYTES, b"431"),
        (b"GET /metrics HTTP/1.1\r\n" + b"X: y\r\n" * 5000, b"431"),
    ],
    ids=["empty", "tls", "http 0.9", "long path", "many headers"],
)
def test_garbage_gets_an_answer_and_the_next_one_gets_the_figures(server, data, wanted):
    answer = raw(server, data)
    assert answer == b"" or wanted in answer.split(b"\r\n")[0]  # b"": the rest of the flood cut the answer off
    assert get(server, "/metrics")[0] == 200


def test_slow_clients_are_cut_off_and_hold_nobody_up(server, health, monkeypatch):
    monkeypatch.setattr(agent.health.metrics, "ANSWER_WITHIN_S", 0.5)
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(MOST_CLIENTS - 1)]
    for one in slow:
        one.sendall(b"GET /met")
    began_s = time.monotonic()
    assert get(server, "/metrics")[0] == 200
    health.note(scored())
    assert time.monotonic() - began_s < 0.4
    for one in slow:
        one.settimeout(5)
        assert one.recv(1) == b""
        one.close()


def test_more_clients_than_it_serves_are_sent_away_and_cost_no_threads(server, monkeypatch):
    monkeypatch.setattr(agent.health.metrics, "ANSWER_WITHIN_S", 1.0)
    before = threading.active_count()
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(MOST_CLIENTS)]
    time.sleep(0.1)
    assert get(server, "/metrics")[0] == 503
    assert threading.active_count() == before
    for one in slow:
        one.close()
    give_up_s = time.monotonic() + 5
    while get(server, "/metrics")[0] != 200:
        assert time.monotonic() < give_up_s


def test_a_port_in_use_is_said_and_the_station_goes_on(server, health, caplog):
    second = HealthServer(health, server.port)
    with caplog.at_level(logging.WARNING):
        assert second.start() is False
    assert f"127.0.0.1:{server.port} cannot be used" in caplog.text
    assert "health.port" in caplog.text
    second.stop()
    health.note(scored())
    assert get(server, "/metrics")[0] == 200


def test_it_stops_at_once_with_clients_connected_and_frees_the_port(health):
    server = HealthServer(health, 0)
    server.start()
    client = socket.create_connection(("127.0.0.1", server.port))
    time.sleep(0.05)
    began_s = time.monotonic()
    server.stop()
    server.stop()
    assert time.monotonic() - began_s < 1.0
    client.close()
    again = HealthServer(health, server.port)
    assert again.start()
    again.stop()
