"""The figures of a running station: what is counted, over which time, and how it is told."""

import json
import math
import os
import threading

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from agent.health.health import DEFAULT_PORT, SLICE_S, SLICES, UNTIMED, memory_bytes, read_health_settings
from agent.health.message import HEALTH_SCHEMA
from agent.publishing.messages import Alarm, alarm_fields
from agent.verdict import Outcome, Reason
from calibration.errors import SettingsError
from calibration.settings import Section
from tests.health import DEVIATION, MEDIAN, SCHEMA, Clock, lit, new_health, placed, run, scored, silent
from tests.schemas import closed, faults, schema


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def health(clock):
    return new_health(clock)


def counts(part):
    return {(row["outcome"], row["reason"]): row["count"] for row in part["verdicts"]}


def test_verdicts_are_counted_by_outcome_and_reason(health):
    for verdict in (scored(), scored(), scored(0.9), silent(Reason.LATE, 45.2), silent(Reason.BLURRED)):
        health.note(verdict)
    found = {("pass", "score"): 2, ("reject", "score"): 1, ("no_verdict", "late"): 1, ("no_verdict", "blurred"): 1}
    assert counts(health.snapshot()["sinceStart"]) == found
    assert counts(health.snapshot()["recent"]) == found


def test_latency_and_stages_are_told_apart(health):
    for number in range(100):
        health.note(scored(latency_ms=20.0 + number, stage_ms={"registration": 8.0, "engine": 7.0 + number}))
    told = health.snapshot()["recent"]
    assert told["triggerToVerdictMs"]["p50"] == pytest.approx(69, rel=1e-3)
    assert told["triggerToVerdictMs"]["max"] == 119
    assert list(told["stageMs"]) == ["registration", "engine"]
    assert told["stageMs"]["engine"]["max"] == 106
    assert told["stageMs"]["registration"]["p999"] == 8.0


@pytest.mark.parametrize("reason", sorted(UNTIMED))
def test_what_is_answered_without_being_looked_at_does_not_make_the_inspection_fast(health, reason):
    health.note(scored(latency_ms=20.0))
    for _ in range(1000):
        health.note(silent(reason, 0.1))
    assert health.snapshot()["recent"]["triggerToVerdictMs"]["n"] == 1
    assert health.snapshot()["strip"]["slowestMs"] == [20.0]


@pytest.mark.parametrize("reason", [Reason.LATE, Reason.FRAME_LOST, Reason.NOT_REGISTERED])
def test_what_the_line_had_to_wait_for_counts_as_latency(health, reason):
    health.note(silent(reason, 45.3))
    assert health.snapshot()["recent"]["triggerToVerdictMs"]["max"] == 45.3


def test_of_late_forgets_after_ten_minutes_what_since_the_start_keeps(health, clock):
    health.note(scored(latency_ms=40.0))
    clock.now_s += SLICE_S * SLICES - 1
    health.note(scored(latency_ms=20.0))
    assert health.snapshot()["recent"]["triggerToVerdictMs"]["max"] == 40.0
    clock.now_s += 1
    told = health.snapshot()
    assert told["recent"]["triggerToVerdictMs"]["max"] == 20.0
    assert told["sinceStart"]["triggerToVerdictMs"]["max"] == 40.0
    clock.now_s += SLICE_S * SLICES
    assert health.snapshot()["recent"]["triggerToVerdictMs"] is None


def test_of_late_says_how_long_that_is(health, clock):
    clock.now_s += 7
    assert health.snapshot()["recent"]["seconds"] == 7
    clock.now_s += 3600
    seconds = health.snapshot()["recent"]["seconds"]
    assert (SLICES - 1) * SLICE_S <= seconds <= SLICES * SLICE_S


def test_the_strip_has_the_slowest_of_each_ten_seconds_and_gaps_where_no_part_came(health, clock):
    health.note(scored(latency_ms=20.0))
    health.note(scored(latency_ms=30.0))
    clock.now_s += 20
    health.note(silent(Reason.LATE, 45.2))
    clock.now_s += 10
    assert health.snapshot()["strip"] == {
        "everyS": 10.0,
        "slowestMs": [30.0, None, 45.2, None],
        "late": [0, 0, 1, 0],
    }
    clock.now_s += 86_400
    assert health.snapshot()["strip"]["slowestMs"] == [None] * 60


def test_places_are_told_with_their_spread(health):
    for dx_px in (1.0, 2.0, 6.0):
        health.note(scored(registration=placed(dx_px)))
    assert health.snapshot()["registration"]["parts"] == 3
    found = health.snapshot()["registration"]["measures"]["dx_px"]
    assert found == pytest.approx({"mean": 3.0, "sd": np.std([1, 2, 6]), "min": 1.0, "max": 6.0})


def test_angles_on_both_sides_of_half_a_turn_lie_together(health):
    for angle_deg in (179.0, -179.0, 178.0, -178.0):
        health.note(scored(registration=placed(angle_deg=angle_deg)))
    found = health.snapshot()["registration"]["measures"]["angle_deg"]
    assert abs(found["mean"]) == pytest.approx(180.0)
    assert found["sd"] == pytest.approx(math.sqrt(2.5))
    assert found["max"] - found["min"] == pytest.approx(4.0)


def test_light_and_focus_are_told_and_a_focus_that_was_not_measured_is_left_out(health):
    health.note(scored(condition=lit(0.4, None)))
    assert "sharpness" not in health.snapshot()["condition"]["measures"]
    health.note(scored(condition=lit(0.6, 1.5)))
    told = health.snapshot()["condition"]
    assert told["parts"] == 2
    assert told["measures"]["brightness"]["mean"] == pytest.approx(0.5)
    assert told["measures"]["sharpness"] == {"mean": 1.5, "sd": 0.0, "min": 1.5, "max": 1.5}


def test_a_creep_of_good_parts_raises_an_alarm_that_says_what_to_do(health):
    for _ in range(100):
        health.note(scored(MEDIAN + 2.5 * DEVIATION))
    (alarm,) = health.alarms()
    assert alarm.code == "score_drift"
    assert "2.5 deviations above" in alarm.detail
    assert "taktsight-calibration threshold" in alarm.detail
    assert len(alarm.detail) <= 500
    assert health.snapshot()["alarms"] == [{"code": alarm.code, "detail": alarm.detail}]
    assert health.snapshot()["drift"]["direction"] == "up"


def test_falling_scores_raise_it_too_because_defects_may_escape(health):
    for _ in range(100):
        health.note(scored(MEDIAN - 2.5 * DEVIATION))
    assert "defects may escape" in health.alarms()[0].detail


def test_rejects_and_parts_without_verdict_do_not_count_as_drift(health):
    for _ in range(1000):
        health.note(scored(MEDIAN + 10 * DEVIATION))
        health.note(silent(Reason.LATE))
    assert health.alarms() == []
    assert health.snapshot()["drift"]["parts"] == 0


def test_another_recipe_begins_anew_but_for_what_was_counted_since_the_start(health, clock):
    run(health, clock, 200)
    for _ in range(100):
        health.note(scored(MEDIAN + 2.5 * DEVIATION))
    health.reset("gear", "cd" * 32)
    told = health.snapshot()
    assert (told["internalRecipeId"], told["recipeDigest"]) == ("gear", "cd" * 32)
    assert counts(told["sinceStart"]) == {("pass", "score"): 300}
    assert told["recent"]["verdicts"] == []
    assert told["recent"]["seconds"] == 0
    assert told["registration"] == told["condition"] == {"parts": 0, "measures": {}}
    assert told["drift"]["watched"] is False
    assert health.alarms() == []


def test_the_line_says_it_in_one(health, clock):
    assert health.line() == "flange: 0 parts, 0 late, drift none"
    for number in range(1000):
        health.note(scored(latency_ms=34.0 if number == 999 else 21.0))
    assert health.line() == "flange: 1000 parts, p50 21 p99 21 p99.9 21 ms, 0 late, drift none"
    health.note(silent(Reason.LATE, 45.3))
    health.note(silent(Reason.BLURRED, 3.0))
    assert "1002 parts" in health.line()
    assert "1 late, 1 more without verdict, drift none" in health.line()
    health.reset("gear", "cd" * 32)
    assert health.line().endswith("drift not watched")
    health.reset("gear", "cd" * 32, MEDIAN, DEVIATION)
    for _ in range(100):
        health.note(scored(MEDIAN + 2.5 * DEVIATION))
    assert health.line().endswith("drift up 2.5")


def test_what_is_told_keeps_to_the_schema_at_every_moment(health, clock):
    against = closed(SCHEMA)
    assert faults(health.snapshot(), against) == []
    run(health, clock, 300, rejects=3)
    for reason in Reason:
        if reason is not Reason.SCORE:
            health.note(silent(reason))
    health.note(scored(registration=placed(residual_px=math.nan), stage_ms={"engine": math.nan}, latency_ms=math.inf))
    health.gauges = {"outbox_waiting": 3, "publish_memory_bytes": math.nan}
    health.tell("halted", [Alarm("halted", "the disk is full")])
    assert faults(health.snapshot(), against) == []
    assert faults(health.snapshot(), SCHEMA) == []
    assert health.snapshot()["gauges"] == {"outbox_waiting": 3.0, "publish_memory_bytes": None}


def test_the_schema_is_valid_and_leaves_room_for_additions():
    Draft202012Validator.check_schema(SCHEMA)
    assert (SCHEMA["$id"], SCHEMA["properties"]["schema"]) == (
        "urn:taktsight:schema:health:1",
        {"const": HEALTH_SCHEMA},
    )
    assert "additionalProperties" not in SCHEMA
    assert "there are only additions" in SCHEMA["description"]
    later = {**new_health(Clock()).snapshot(), "colour": "blue"}
    assert faults(later, SCHEMA) == []


@pytest.mark.parametrize("field", SCHEMA["required"])
def test_figures_without_one_of_their_fields_are_refused(health, field):
    told = health.snapshot()
    del told[field]
    assert faults(told, SCHEMA)


def test_the_alarm_fits_into_a_status(health):
    for _ in range(100):
        health.note(scored(MEDIAN + 2.5 * DEVIATION))
    assert faults(alarm_fields(health.alarms()), {"type": "array", "items": schema("status")["$defs"]["alarm"]}) == []


def test_an_alarm_that_the_station_tells_too_stands_there_once(health):
    for _ in range(100):
        health.note(scored(MEDIAN + 2.5 * DEVIATION))
    health.tell("running", [Alarm("storage_low", "12 MB left"), *health.alarms()])
    assert [alarm["code"] for alarm in health.snapshot()["alarms"]] == ["storage_low", "score_drift"]


@pytest.mark.parametrize("name", ["", "Outbox", "outbox-waiting", "9lives", "a" * 65])
def test_a_gauge_that_prometheus_would_refuse_is_refused_at_once(health, name):
    with pytest.raises(ValueError, match="want lower case letters"):
        health.gauges = {name: 1.0}


def test_it_is_read_while_it_is_written(health, clock):
    """Every picture is whole: its counts, its latencies and its drift are of one moment."""
    stop, broken, pictures = threading.Event(), [], []

    def read():
        while not stop.is_set():
            figures = health.figures()
            whole = figures.since_start
            summary = whole.latency.summary()
            if (0 if summary is None else summary.n) != whole.verdicts.total():
                broken.append(summary)
            if figures.drift.parts != whole.verdicts[Outcome.PASS, Reason.SCORE]:
                broken.append(figures.drift)
            pictures.append(json.dumps(health.snapshot(), allow_nan=False))

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    run(health, clock, 3000)
    stop.set()
    for reader in readers:
        reader.join()
    assert broken == []
    assert len(pictures) >= len(readers)
    assert health.snapshot()["sinceStart"]["verdicts"][0]["count"] == 3000


def test_a_long_run_stays_small(health, clock):
    """Ten days at one part a minute, and places of 20,000 parts: what is kept is bounded."""
    for _ in range(14_400):
        clock.now_s += 60.0
        health.note(scored(registration=placed(), condition=lit(0.4)))
    assert len(json.dumps(health.snapshot())) < 5000
    assert health.snapshot()["registration"]["parts"] == 1000


def test_memory_is_that_of_the_process():
    assert 1e6 < memory_bytes(os.getpid()) < 1e11
    assert math.isnan(memory_bytes(2**22 + 1))


def test_the_port_has_a_default_and_a_range():
    assert read_health_settings(Section({})).port == DEFAULT_PORT
    assert read_health_settings(Section({"port": 0})).port == 0
    with pytest.raises(SettingsError, match="port: 70000 found, need 0 to 65535"):
        read_health_settings(Section({"port": 70000}))
