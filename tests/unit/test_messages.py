import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import cv2
import numpy as np
import pytest

from agent.clock import Stamp
from agent.publishing.messages import (
    MAX_DETAIL_CHARACTERS,
    MAX_REGIONS,
    Alarm,
    Origin,
    encode,
    heatmap_payload,
    missing_message,
    new_id,
    numbered,
    status_message,
    verdict_message,
)
from agent.verdict import Outcome, Reason, Region, Verdict
from calibration.condition import Condition
from calibration.registration import Registration

ORIGIN = Origin(
    station="cell7",
    run="0123456789ab",
    recipe="bottle",
    recipe_digest="d" * 64,
    engine="openvino f32, 2 threads",
    simulated=False,
    on_no_verdict="reject",
)
NOON = datetime(2026, 11, 22, 12, 0, 0, 7000, tzinfo=UTC)
STAMP = Stamp(NOON, 1500.25, -3_600_000.0, True)
EPOCH = "5f0c61a2b9de"


def message(verdict, origin=ORIGIN, stamp=STAMP, **more):
    return verdict_message(verdict, origin, stamp, **more)


def passed(**fields):
    return Verdict(7, Outcome.PASS, Reason.SCORE, score=0.5, threshold=1.0, **fields)


def unanswered(reason=Reason.LATE):
    return Verdict(7, Outcome.NO_VERDICT, reason)


def test_a_verdict_has_no_key_until_the_outbox_numbers_it():
    waiting = message(passed(), heatmap=heatmap_payload(np.zeros((8, 8), np.float32), 1.0))
    assert (waiting["epoch"], waiting["seq"], waiting["resultId"]) == (None, None, None)
    assert waiting["heatmap"]["topic"] is None
    sent = numbered(waiting, epoch=EPOCH, seq=12)
    assert (sent["station"], sent["epoch"], sent["seq"]) == ("cell7", EPOCH, 12)
    assert sent["resultId"] == f"cell7/{EPOCH}/12"
    assert sent["heatmap"]["topic"] == "heatmap/12"
    assert waiting["seq"] is None


def test_numbering_changes_the_key_and_nothing_else():
    waiting = message(passed())
    changed = {field for field, value in numbered(waiting, epoch=EPOCH, seq=1).items() if value != waiting[field]}
    assert changed == {"epoch", "seq", "resultId"}


def test_a_verdict_carries_the_opc_names_and_its_place_in_the_run():
    sent = message(passed(part_id="S/N 5"))
    assert (sent["partId"], sent["internalRecipeId"], sent["isSimulated"]) == ("S/N 5", "bottle", False)
    assert (sent["run"], sent["trigger"]) == ("0123456789ab", 7)


def test_a_verdict_says_what_both_clocks_said():
    sent = message(passed())
    assert sent["creationTime"] == "2026-11-22T12:00:00.007Z"
    assert (sent["monotonicMs"], sent["clockStepMs"], sent["clockSynchronized"]) == (1500.25, -3_600_000.0, True)


def test_times_are_given_in_utc_whatever_zone_they_came_in():
    berlin = NOON.astimezone(timezone(timedelta(hours=1)))
    assert message(passed(), stamp=Stamp(berlin, 0.0))["creationTime"] == "2026-11-22T12:00:00.007Z"


def test_a_time_without_zone_is_refused():
    with pytest.raises(ValueError, match="no time zone"):
        message(passed(), stamp=Stamp(NOON.replace(tzinfo=None), 0.0))


@pytest.mark.parametrize(
    ("reason", "state"),
    [
        (Reason.LATE, 3),
        (Reason.STOPPING, 3),
        (Reason.PAUSED, 3),
        (Reason.HALTED, 3),
        (Reason.OVERRUN, 3),
        (Reason.FRAME_LOST, 4),
        (Reason.TOO_DARK, 4),
        (Reason.FAULT, 4),
    ],
)
def test_the_result_state_says_aborted_or_failed_for_a_part_without_verdict(reason, state):
    assert message(unanswered(reason))["resultState"] == state
    assert message(passed())["resultState"] == 1


@pytest.mark.parametrize(("policy", "action"), [("reject", "divert"), ("pass", "accept"), ("stop", "divert")])
def test_a_part_without_verdict_follows_the_policy_of_the_station(policy, action):
    assert message(unanswered(), replace(ORIGIN, on_no_verdict=policy))["lineAction"] == action


@pytest.mark.parametrize(
    ("reason", "action"), [(Reason.HALTED, "divert"), (Reason.PAUSED, "accept"), (Reason.CRASHED, "accept")]
)
def test_a_halted_station_accepts_no_part_under_any_policy(reason, action):
    assert message(unanswered(reason), replace(ORIGIN, on_no_verdict="pass"))["lineAction"] == action


@pytest.mark.parametrize("policy", ["reject", "pass", "stop"])
def test_a_reject_is_diverted_and_a_pass_accepted_under_every_policy(policy):
    origin = replace(ORIGIN, on_no_verdict=policy)
    rejected = Verdict(7, Outcome.REJECT, Reason.SCORE, score=2.0, threshold=1.0)
    assert message(rejected, origin)["lineAction"] == "divert"
    assert message(passed(), origin)["lineAction"] == "accept"


def test_a_score_of_nan_is_refused_because_it_decides_nothing():
    with pytest.raises(ValueError, match="NaN"):
        message(replace(passed(), score=float("nan")))


def test_infinities_and_numpy_numbers_become_plain_json_numbers():
    rejected = Verdict(
        7, Outcome.REJECT, Reason.SCORE, score=float("inf"), threshold=np.float32(1.5), latency_ms=np.float64(9.25)
    )
    sent = json.loads(json.dumps(message(rejected), allow_nan=False))
    assert sent["score"] > 1e300
    assert (sent["threshold"], sent["latencyMs"]) == (1.5, 9.25)


def test_only_the_strongest_regions_are_sent_and_all_are_counted():
    regions = tuple(Region(0, 0, 1, 1, 1, peak=float(peak)) for peak in range(100))
    sent = message(passed(regions=regions))
    assert [region["peak"] for region in sent["regions"]] == list(range(99, 99 - MAX_REGIONS, -1))
    assert sent["regionCount"] == 100


def test_a_place_is_sent_in_mm_and_with_its_zone_where_these_are_known():
    place = Region(10.0, 20.0, 4.0, 8.0, 30.0, peak=3.0, zone="thread")
    plain, told = (message(passed(regions=(place,), mm_per_px=scale))["regions"][0] for scale in (None, 0.25))
    assert plain == {"xPx": 10, "yPx": 20, "widthPx": 4, "heightPx": 8, "areaPx": 30, "peak": 3.0, "zone": "thread"}
    assert told == plain | {"xMm": 2.5, "yMm": 5.0, "widthMm": 1.0, "heightMm": 2.0, "areaMm2": 1.875}
    assert "zone" not in message(passed(regions=(replace(place, zone=None),)))["regions"][0]


def test_a_reject_is_sent_with_its_zones_and_those_that_rejected_it():
    zones = {"elsewhere": 0.25, "thread": 2.0, "label": float("nan"), "rim": 3.0}
    sent = message(replace(passed(zones=zones), outcome=Outcome.REJECT, score=3.0))
    assert sent["zones"] == {"elsewhere": 0.25, "thread": 2.0, "label": None, "rim": 3.0}
    assert sent["rejectedBy"] == ["rim", "thread"]
    assert message(passed())["zones"] == {}
    assert message(passed(zones=zones))["rejectedBy"] == []


def test_registration_is_reported_in_reference_pixels():
    moved = np.array([[1, 0, -3.0], [0, 1, 2.0], [0, 0, 1]])  # reference px from image px
    sent = message(passed(registration=Registration(moved, residual_px=0.2, similarity=0.9)))["registration"]
    assert sent == {"dxPx": 3.0, "dyPx": -2.0, "angleDeg": 0.0, "residualPx": 0.2, "similarity": 0.9}


def test_stage_times_are_sent_with_their_sum():
    times = message(passed(stage_ms={"register": 4.0, "infer": 30.5}))["processingTimes"]
    assert times == {"processingDuration": 34.5, "stageMs": {"register": 4.0, "infer": 30.5}}


def test_light_and_focus_stand_in_the_message_where_a_frame_was_looked_at():
    condition = Condition(0.3, 0.1, 0.6, 0.02, None)
    assert message(passed(condition=condition))["condition"] == {
        "brightness": 0.3,
        "darkLevel": 0.1,
        "brightLevel": 0.6,
        "saturatedShare": 0.02,
        "sharpness": None,
    }
    assert message(unanswered())["condition"] is None


def test_a_heatmap_is_linked_by_topic_and_digest():
    heatmap = heatmap_payload(np.zeros((64, 64), np.float32), 2.0)
    link = numbered(message(passed(), heatmap=heatmap), epoch=EPOCH, seq=3)["heatmap"]
    assert link["topic"] == "heatmap/3"
    assert link["sha256"] == hashlib.sha256(heatmap.data).hexdigest()
    assert (link["width"], link["height"], link["fullScale"]) == (64, 64, 4.0)


def test_a_heatmap_shows_the_map_within_what_jpeg_costs():
    ramp = np.tile(np.linspace(0, 4, 256, dtype=np.float32), (256, 1))
    picture = cv2.imdecode(np.frombuffer(heatmap_payload(ramp, 2.0).data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert picture.shape == (256, 256)
    assert np.abs(picture[0] * (4 / 255) - ramp[0]).max() < 5 * 4 / 255


@pytest.mark.parametrize("shape", [(1024, 1024), (700, 300), (300, 257)])
def test_a_peak_of_one_pixel_survives_the_heatmap_wherever_it_lies(shape):
    generator = np.random.default_rng(5)
    for _ in range(20):
        anomaly_map = np.zeros(shape, np.float32)
        anomaly_map[generator.integers(shape[0]), generator.integers(shape[1])] = 9.0
        heatmap = heatmap_payload(anomaly_map, 1.0)
        picture = cv2.imdecode(np.frombuffer(heatmap.data, np.uint8), cv2.IMREAD_UNCHANGED)
        assert max(picture.shape) == 256
        assert picture.max() > 200


def test_a_nan_in_the_map_is_shown_as_the_highest_level_not_as_clear():
    anomaly_map = np.zeros((32, 32), np.float32)
    anomaly_map[8:16, 8:16] = np.nan
    picture = cv2.imdecode(np.frombuffer(heatmap_payload(anomaly_map, 1.0).data, np.uint8), cv2.IMREAD_UNCHANGED)
    assert picture[12, 12] > 250


@pytest.mark.parametrize(
    "field",
    [{"station": ""}, {"run": "XYZ"}, {"recipe_digest": "12"}, {"on_no_verdict": "ignore"}, {"station": "a\nb"}],
)
def test_a_malformed_origin_is_refused_by_the_name_of_its_field(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        replace(ORIGIN, **field)


def test_ids_are_twelve_hex_digits_and_differ():
    ids = {new_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(replace(ORIGIN, run=one) for one in ids)


def test_a_notice_of_missing_verdicts_stands_at_the_first_of_them():
    notice = missing_message("cell7", epoch=EPOCH, first=5, last=9, why="x" * 900, created_utc=NOON)
    assert (notice["seq"], notice["first"], notice["last"]) == (5, 5, 9)
    assert notice["creationTime"] == "2026-11-22T12:00:00.007Z"
    assert len(notice["why"]) == MAX_DETAIL_CHARACTERS


def test_what_travels_is_compact_utf_8_and_half_a_character_does_not_stop_a_verdict():
    assert encode({"partId": "Größe 5", "seq": 1}) == '{"partId":"Größe 5","seq":1}'.encode()
    assert encode({"partId": "\ud800!"}) == b'{"partId":"?!"}'
    with pytest.raises(ValueError, match="JSON"):
        encode({"score": float("nan")})


def test_a_status_says_who_and_what_and_the_last_will_has_no_time():
    running = status_message(ORIGIN, "running", created_utc=NOON, counters={"parts": 3})
    assert (running["station"], running["state"], running["counters"]) == ("cell7", "running", {"parts": 3})
    assert running["creationTime"] == "2026-11-22T12:00:00.007Z"
    assert status_message(ORIGIN, "offline")["creationTime"] is None


def test_a_status_lists_alarms_with_a_code_and_a_sentence():
    halted = status_message(ORIGIN, "halted", alarms=[Alarm("halted", "disk full: free some space, then resume")])
    assert halted["alarms"] == [{"code": "halted", "detail": "disk full: free some space, then resume"}]


def test_an_unknown_state_is_refused():
    with pytest.raises(ValueError, match="asleep"):
        status_message(ORIGIN, "asleep")
