"""What the integrator's page shows is what the code makes: every sample, every field, every setting."""

import json
from dataclasses import fields
from datetime import UTC, datetime

import numpy as np
import pytest
from taktsight_subscribe.messages import ack_payload

from agent.clock import Stamp
from agent.commands.commands import COMMANDS, Change, Commands, MemoryOperations
from agent.commands.log import CommandLog
from agent.mqtt.client import MqttSettings
from agent.mqtt.delivery import Ack, Delivery, read_ack
from agent.mqtt.delivery_report import StatusBoard
from agent.outbox.outbox import Outbox, OutboxSettings
from agent.publishing.messages import Alarm, HeatmapPayload, Origin, encode, status_message, verdict_message
from agent.sparkplug.messages import SparkplugSettings
from agent.verdict import Outcome, Reason, Region, Verdict
from calibration.condition import Condition
from calibration.registration import Registration
from tests.schemas import INTERFACE, PAGE, closed, faults, sample, sample_names, schema

EPOCH, RUN = "5f0c61a2b9de", "e41b7c0d9a52"
DIGEST = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
ORIGIN = Origin("cell7", RUN, "bottle", DIGEST, "openvino f32, 2 threads", simulated=False, on_no_verdict="reject")
LAST = 1841


def rotation(degrees, dx_px, dy_px):
    """A registration (reference px from image px) of a part that lies turned and shifted."""
    turn = np.deg2rad(-degrees)
    back = np.array([[np.cos(turn), -np.sin(turn), 0.0], [np.sin(turn), np.cos(turn), 0.0], [0.0, 0.0, 1.0]])
    back[:2, 2] = -back[:2, :2] @ (dx_px, dy_px)
    return Registration(back, residual_px=0.21, similarity=0.94)


def verdict():
    return Verdict(
        trigger_id=311,
        outcome=Outcome.REJECT,
        reason=Reason.SCORE,
        part_id="SN 20931",
        score=12.5,
        threshold=4.2,
        regions=(Region(116, 80, 9, 9, 50, 12.5),),
        registration=rotation(12.8, 3.1, -0.4),
        condition=Condition(0.288, 0.094, 0.604, 0.0, 2.25),
        stage_ms={"register": 6.1, "infer": 35.1},
        latency_ms=63.5,
    )


@pytest.fixture(scope="module")
def outbox(tmp_path_factory):
    """A station's outbox in which 1841 verdicts were stored, of which the MES has 1839."""
    stamp = Stamp(datetime(2026, 11, 22, 12, 0, 0, 7000, tzinfo=UTC), 1555063.5, 0.0, True)
    link = sample("verdict")["heatmap"]
    picture = HeatmapPayload(b"picture", link["sha256"], link["width"], link["height"], link["fullScale"])
    settings = OutboxSettings(tmp_path_factory.mktemp("outbox"), heatmap_mb=1.0, reserve_mb=0.0)
    one = Outbox(settings, "cell7")
    one.set_consumers(["mes"])
    one.store([(verdict_message(verdict(), ORIGIN, stamp), None)] * (LAST - 1))
    one.store([(verdict_message(verdict(), ORIGIN, stamp, picture), picture)])
    one.read(0, LAST)
    assert one.acknowledge("mes", LAST - 2)
    yield one
    one.close()


def as_shown(payload, outbox):
    """A message as it travels, with the epoch of the page in place of this test's, and 6 digits after the point."""
    text = payload.decode().replace(outbox.epoch, EPOCH)
    return json.loads(text, parse_float=lambda digits: round(float(digits), 6))


def test_the_verdict_is_what_waits_in_the_outbox_byte_for_byte(outbox):
    assert as_shown(outbox.read(LAST - 1, 1)[0].payload, outbox) == sample("verdict")


def test_the_status_is_what_the_publisher_sends(outbox):
    alarm = Alarm("clock_stepped", "the wall clock was moved by -3600.0 s in this run")
    created = datetime(2026, 11, 22, 12, 0, 1, tzinfo=UTC)
    message = status_message(
        ORIGIN,
        "running",
        created_utc=created,
        counters={"triggers": 311},
        alarms=[alarm],
        machine_state="ContinuousExecution",
        health=sample("status")["health"],
    )
    board = StatusBoard(message, outbox, Delivery(outbox.acknowledged(), outbox.last_seq), ["mes"])
    board.counts.update(confirmed=311, heatmapsConfirmed=310)
    assert as_shown(board.payload(), outbox) == sample("status")


def test_the_notice_is_what_takes_the_place_of_a_damaged_verdict(tmp_path):
    with_room = Outbox(OutboxSettings(tmp_path, reserve_mb=0.0), "cell7")
    with_room.set_consumers(["mes"])
    with_room.store([(verdict_message(verdict(), ORIGIN, Stamp(datetime.now(UTC), 0.0)), None)] * (LAST + 1))
    with_room.read(LAST, 1)
    row = with_room.quarantine(LAST + 1, sample("missing")["why"])
    made = as_shown(row.payload, with_room)
    with_room.close()
    assert row.topic == "missing"
    assert {**made, "creationTime": sample("missing")["creationTime"]} == sample("missing")


def test_the_acknowledgement_is_what_the_library_sends_and_the_station_takes():
    sent = ack_payload(EPOCH, LAST, resend=False)
    assert json.loads(sent) == sample("ack")
    assert read_ack(sent) == Ack(EPOCH, LAST, False)


class AtTheLine(MemoryOperations):
    """Answers to a pause as a line that runs does."""

    def pause(self, reason):
        super().pause(reason)
        return Change("running", "paused", reason)


def test_the_command_gets_the_reply_that_is_shown(tmp_path):
    operations, log = AtTheLine(), CommandLog(tmp_path, "cell7")
    ten_to_ten = datetime(2026, 11, 22, 9, 59, 12, 450_000, tzinfo=UTC)
    commands = Commands(
        operations, log, station="cell7", run=RUN, allow=frozenset({"pause"}), utc_now=lambda: ten_to_ten
    )
    reply = commands.handle("pause", encode(sample("command")), retained=False)
    log.close()
    assert reply == sample("reply")
    assert operations.calls == [("pause", "change of shift")]


@pytest.mark.parametrize("name", sorted(path.name.split(".")[0] for path in INTERFACE.glob("*.schema.json")))
def test_every_message_has_a_sample_that_validates(name):
    assert name in sample_names()
    assert faults(sample(name), closed(schema(name))) == []


def words_of_tables():
    """Every word in backquotes in the first cell of a row of a table, without what stands in front of a point."""
    rows = (line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `"))
    return {word for cell in rows for word in cell.split("`")[1::2]}


def test_every_field_of_a_verdict_is_explained():
    assert set(schema("verdict")["properties"]) <= words_of_tables()


def test_every_state_alarm_and_command_is_explained():
    alarms = schema("status")["$defs"]["alarm"]["properties"]["code"]["anyOf"][0]["enum"]
    assert set(schema("status")["properties"]["state"]["enum"]) | set(alarms) <= words_of_tables()
    assert {f"cmd/{name}" for name in COMMANDS} <= words_of_tables()
    assert all(f"`{reason}`" in PAGE for reason in Reason)


@pytest.mark.parametrize(
    ("section", "settings"), [("mqtt", MqttSettings), ("outbox", OutboxSettings), ("sparkplug", SparkplugSettings)]
)
def test_every_key_of_the_station_is_in_the_table_and_no_other(section, settings):
    listed = {word.split(".")[1] for word in words_of_tables() if word.startswith(f"{section}.") and word[-1] != "]"}
    assert listed - {"conf"} == {field.name for field in fields(settings)}
