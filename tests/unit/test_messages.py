import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import cv2
import numpy as np
import pytest

from agent.messages import (
    MAX_REGIONS,
    Origin,
    heatmap_payload,
    new_epoch,
    status_message,
    verdict_message,
)
from agent.publisher import Backlog, Kind, MemoryPublisher, Parcel, Publisher, Undelivered
from agent.verdict import Outcome, Reason, Region, Verdict
from calibration.registration import Registration

ORIGIN = Origin(
    station="cell7",
    epoch="0123456789ab",
    recipe="bottle",
    recipe_digest="d" * 64,
    engine="openvino f32, 2 threads",
    simulated=False,
    on_no_verdict="reject",
)
NOON = datetime(2025, 3, 4, 12, 0, 0, 7000, tzinfo=UTC)


def message(verdict, origin=ORIGIN, **more):
    return verdict_message(verdict, origin, seq=1, created_utc=NOON, **more)


def passed(**fields):
    return Verdict(7, Outcome.PASS, Reason.SCORE, score=0.5, threshold=1.0, **fields)


def unanswered(reason=Reason.LATE):
    return Verdict(7, Outcome.NO_VERDICT, reason)


def test_a_verdict_carries_its_key_and_the_opc_names():
    sent = verdict_message(passed(part_id="S/N 5"), ORIGIN, seq=12, created_utc=NOON)
    assert (sent["station"], sent["epoch"], sent["seq"]) == ("cell7", "0123456789ab", 12)
    assert sent["resultId"] == "cell7/0123456789ab/12"
    assert (sent["partId"], sent["internalRecipeId"], sent["isSimulated"]) == ("S/N 5", "bottle", False)
    assert sent["creationTime"] == "2025-03-04T12:00:00.007Z"


def test_times_are_given_in_utc_whatever_zone_they_came_in():
    berlin = NOON.astimezone(timezone(timedelta(hours=1)))
    assert verdict_message(passed(), ORIGIN, seq=1, created_utc=berlin)["creationTime"] == "2025-03-04T12:00:00.007Z"


def test_a_time_without_zone_is_refused():
    with pytest.raises(ValueError, match="no time zone"):
        verdict_message(passed(), ORIGIN, seq=1, created_utc=NOON.replace(tzinfo=None))


@pytest.mark.parametrize(
    ("reason", "state"), [(Reason.LATE, 3), (Reason.STOPPING, 3), (Reason.FRAME_LOST, 4), (Reason.FAULT, 4)]
)
def test_the_result_state_says_aborted_or_failed_for_a_part_without_verdict(reason, state):
    assert message(unanswered(reason))["resultState"] == state
    assert message(passed())["resultState"] == 1


@pytest.mark.parametrize(("policy", "action"), [("reject", "divert"), ("pass", "accept"), ("stop", "divert")])
def test_a_part_without_verdict_follows_the_policy_of_the_station(policy, action):
    assert message(unanswered(), replace(ORIGIN, on_no_verdict=policy))["lineAction"] == action


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


def test_registration_is_reported_in_reference_pixels():
    moved = np.array([[1, 0, -3.0], [0, 1, 2.0], [0, 0, 1]])  # reference px from image px
    sent = message(passed(registration=Registration(moved, residual_px=0.2, similarity=0.9)))["registration"]
    assert sent == {"dxPx": 3.0, "dyPx": -2.0, "angleDeg": 0.0, "residualPx": 0.2, "similarity": 0.9}


def test_stage_times_are_sent_with_their_sum():
    times = message(passed(stage_ms={"register": 4.0, "infer": 30.5}))["processingTimes"]
    assert times == {"processingDuration": 34.5, "stageMs": {"register": 4.0, "infer": 30.5}}


def test_a_heatmap_is_linked_by_topic_and_digest():
    heatmap = heatmap_payload(np.zeros((64, 64), np.float32), 2.0)
    link = message(passed(), heatmap=heatmap)["heatmap"]
    assert link["topic"] == "heatmap/1"
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
    [{"station": ""}, {"epoch": "XYZ"}, {"recipe_digest": "12"}, {"on_no_verdict": "ignore"}, {"station": "a\nb"}],
)
def test_a_malformed_origin_is_refused_by_the_name_of_its_field(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        replace(ORIGIN, **field)


def test_epochs_are_twelve_hex_digits_and_differ():
    epochs = {new_epoch() for _ in range(1000)}
    assert len(epochs) == 1000
    assert all(replace(ORIGIN, epoch=epoch) for epoch in epochs)


def test_a_status_says_who_and_what_and_the_last_will_has_no_time():
    running = status_message(ORIGIN, "running", created_utc=NOON, counters={"parts": 3})
    assert (running["station"], running["state"], running["counters"]) == ("cell7", "running", {"parts": 3})
    assert running["creationTime"] == "2025-03-04T12:00:00.007Z"
    assert status_message(ORIGIN, "offline")["creationTime"] is None


def test_an_unknown_state_is_refused():
    with pytest.raises(ValueError, match="asleep"):
        status_message(ORIGIN, "asleep")


def test_the_publisher_in_memory_keeps_what_it_is_given():
    publisher: Publisher = MemoryPublisher()
    publisher.start()
    heatmap = heatmap_payload(np.zeros((8, 8), np.float32), 1.0)
    sent = message(passed(), heatmap=heatmap)
    publisher.publish_verdict(sent, heatmap)
    publisher.publish_status(status_message(ORIGIN, "running"))
    assert publisher.stop(0.0) == Undelivered(verdicts=0, heatmaps=0)
    assert publisher.verdicts == [sent]
    assert publisher.heatmaps == {1: heatmap}
    assert publisher.statuses[0]["state"] == "running"


def parcel(kind, number, size_bytes=10):
    return Parcel(kind, str(number), bytes(size_bytes), "")


def filled(places, verdicts, *, heatmap_bytes=10):
    backlog = Backlog(places)
    for number in range(verdicts):
        backlog.put(parcel(Kind.VERDICT, number), parcel(Kind.HEATMAP, number, heatmap_bytes))
    return backlog


def taken(backlog):
    parcels = iter(backlog.take, None)
    return [(item.kind, int(item.topic)) for item in parcels]


def test_waiting_verdicts_go_before_heatmaps_each_oldest_first():
    verdicts = [(Kind.VERDICT, number) for number in range(3)]
    heatmaps = [(Kind.HEATMAP, number) for number in range(3)]
    assert taken(filled(100, 3)) == verdicts + heatmaps


def test_a_full_backlog_sheds_the_oldest_heatmaps_and_no_verdict():
    backlog = filled(20, 15)
    assert taken(backlog) == [(Kind.VERDICT, n) for n in range(15)] + [(Kind.HEATMAP, n) for n in range(10, 15)]
    assert backlog.dropped == {Kind.HEATMAP: 10}


def test_the_oldest_verdict_is_dropped_and_counted_only_when_verdicts_alone_fill_the_backlog():
    backlog = filled(20, 23)
    assert taken(backlog) == [(Kind.VERDICT, number) for number in range(3, 23)]
    assert backlog.dropped == {Kind.HEATMAP: 23, Kind.VERDICT: 3}


def test_large_heatmaps_are_shed_by_their_bytes():
    backlog = filled(1000, 40, heatmap_bytes=2**20)
    assert backlog.waiting(Kind.VERDICT) == 40
    assert backlog.waiting(Kind.HEATMAP) == 32
