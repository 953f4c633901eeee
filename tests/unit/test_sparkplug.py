import math
import struct

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from agent.sparkplug.messages import (
    REBIRTH,
    HostState,
    SparkplugSettings,
    asks_for_rebirth,
    bdseq_metric,
    birth_metrics,
    device_metrics,
    host_state,
    row_metrics,
    status_metrics,
)
from agent.sparkplug.payload import DataType, MalformedPayload, Metric, Payload, decode, encode
from calibration.errors import SettingsError

FIELDS = {  # of sparkplug_b.proto, but for the messages inside Metric, which no edge node of ours sends or reads
    "Payload": ["1 uint64 timestamp", "2 Metric metrics", "3 uint64 seq", "4 string uuid", "5 bytes body"],
    "Metric": [
        *("1 string name", "2 uint64 alias", "3 uint64 timestamp", "4 uint32 datatype", "5 bool is_historical"),
        *("6 bool is_transient", "7 bool is_null", "10 uint32 int_value", "11 uint64 long_value"),
        *("12 float float_value", "13 double double_value", "14 bool boolean_value", "15 string string_value"),
        "16 bytes bytes_value",
    ],
}
VERDICT = {
    "schema": "taktsight.verdict/1",
    "epoch": "0123456789ab",
    "seq": 17,
    "run": "ba9876543210",
    "trigger": 4,
    "partId": None,
    "outcome": "reject",
    "reason": "score",
    "detail": "",
    "score": 0.75,
    "threshold": 1,
    "latencyMs": 31.5,
    "isSimulated": True,
    "lineAction": "divert",
    "internalRecipeId": "bottle",
    "recipeDigest": "d" * 64,
    "creationTime": "2026-11-22T10:00:00.123Z",
}
CREATED_MS = 1_795_341_600_123


def google_messages():
    """Return {name: class} made by Google protobuf itself from FIELDS."""
    file = descriptor_pb2.FileDescriptorProto(name="sparkplug_b_test.proto", package="b", syntax="proto2")
    for message, fields in FIELDS.items():
        described = file.message_type.add(name=message)
        if message == "Metric":
            described.oneof_decl.add(name="value")
        for number, kind, name in (field.split() for field in fields):
            field = described.field.add(name=name, number=int(number), label=1 if kind != "Metric" else 3)
            if kind == "Metric":
                field.type, field.type_name = 11, ".b.Metric"
            else:
                field.type = getattr(descriptor_pb2.FieldDescriptorProto, f"TYPE_{kind.upper()}")
            if int(number) >= 10:
                field.oneof_index = 0
    return message_factory.GetMessages([file], pool=descriptor_pool.DescriptorPool())


GOOGLE = {name.removeprefix("b."): made for name, made in google_messages().items()}
VALUE_FIELD = {4: "long_value", 10: "double_value", 11: "boolean_value", 12: "string_value"}

times = st.none() | st.integers(0, 2**64 - 1)
valued = (
    st.tuples(st.just(DataType.INT64), st.none() | st.integers(-(2**63), 2**63 - 1))
    | st.tuples(st.just(DataType.DOUBLE), st.none() | st.floats())
    | st.tuples(st.just(DataType.BOOLEAN), st.none() | st.booleans())
    | st.tuples(st.just(DataType.STRING), st.none() | st.text())
)
metrics = st.builds(
    lambda kind_and_value, **rest: Metric(datatype=kind_and_value[0], value=kind_and_value[1], **rest),
    valued,
    name=st.none() | st.text(),
    timestamp_ms=times,
    historical=st.booleans(),
    alias=times,
)
payloads = st.builds(
    Payload, timestamp_ms=times, metrics=st.lists(metrics, max_size=4).map(tuple), seq=st.none() | st.integers(0, 255)
)


def by_google(payload, with_datatypes):
    built = GOOGLE["Payload"]()
    for name, value in (("timestamp", payload.timestamp_ms), ("seq", payload.seq)):
        if value is not None:
            setattr(built, name, value)
    for metric in payload.metrics:
        one = built.metrics.add()
        for name in ("name", "alias"):
            if getattr(metric, name) is not None:
                setattr(one, name, getattr(metric, name))
        if metric.timestamp_ms is not None:
            one.timestamp = metric.timestamp_ms
        if with_datatypes:
            one.datatype = metric.datatype
        if metric.historical:
            one.is_historical = True
        if metric.value is None:
            one.is_null = True
        else:
            value = metric.value % 2**64 if metric.datatype == DataType.INT64 else metric.value
            setattr(one, VALUE_FIELD[metric.datatype], value)
    return built


@given(payloads, st.booleans())
def test_every_payload_is_byte_for_byte_what_google_protobuf_makes(payload, with_datatypes):
    assert encode(payload, with_datatypes=with_datatypes) == by_google(payload, with_datatypes).SerializeToString()


@given(payloads)
def test_what_was_encoded_is_what_is_decoded(payload):
    decoded = decode(encode(payload))
    assert encode(decoded) == encode(payload)  # bytes: NaN does not equal itself
    assert [metric.name for metric in decoded.metrics] == [metric.name for metric in payload.metrics]


FRAGMENTS = st.lists(
    st.binary(max_size=6)
    | st.sampled_from([b"\x12\x04\x0a\x02ab", b"\x12\x02\x70\x01", b"\x18\x05", b"\x12\x00", b"\x0a", b"\xff" * 9])
    | st.binary(max_size=40).map(lambda data: b"\x12" + bytes([len(data)]) + data)
    | payloads.map(encode),
    max_size=5,
).map(b"".join)


@given(FRAGMENTS | st.binary(max_size=200))
@example(b"\x80" * 11)
@example(b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")
@example(b"\x12\x07\x78\x01\x7a\x03\xff\xfe\xfd")
def test_malformed_bytes_raise_our_own_error_and_nothing_else(data):
    try:
        decoded = decode(data)
    except MalformedPayload:
        return
    assert isinstance(decoded, Payload)


@given(FRAGMENTS)
def test_where_we_understand_a_payload_google_protobuf_understands_the_same(data):
    try:
        ours = decode(data)
    except MalformedPayload:
        return
    try:
        theirs = GOOGLE["Payload"].FromString(data)
    except DecodeError as error:
        pytest.fail(f"{data!r} is {ours} to us and to Google: {error}")
    assert ours.timestamp_ms == (theirs.timestamp if theirs.HasField("timestamp") else None)
    assert ours.seq == (theirs.seq if theirs.HasField("seq") else None)
    assert len(ours.metrics) == len(theirs.metrics)
    for mine, other in zip(ours.metrics, theirs.metrics, strict=True):
        assert mine.name == (other.name if other.HasField("name") else None)
        assert mine.datatype == (other.datatype if other.HasField("datatype") else None)
        assert mine.historical == other.is_historical
        field = other.WhichOneof("value")
        if field in ("boolean_value", "string_value", "bytes_value") and not other.is_null:
            assert mine.value == getattr(other, field)
        if field is None or other.is_null:
            assert mine.value is None


@given(payloads.map(lambda payload: by_google(payload, True).SerializeToString()), st.data())
def test_a_payload_cut_short_is_refused_or_read_up_to_a_whole_field(data, draw):
    cut = data[: draw.draw(st.integers(0, len(data)))]
    try:
        decode(cut)
    except MalformedPayload:
        with pytest.raises(DecodeError):
            GOOGLE["Payload"].FromString(cut)


@pytest.mark.parametrize(
    ("fill", "datatype", "value"),
    [
        ({"int_value": 2**32 - 5}, 3, -5),
        ({"int_value": 2**32 - 5}, 7, 2**32 - 5),
        ({"long_value": 2**64 - 1}, 4, -1),
        ({"long_value": 2**64 - 1}, 8, 2**64 - 1),
        ({"long_value": 1_795_341_600_000}, 13, 1_795_341_600_000),
        ({"float_value": 0.5}, 9, 0.5),
        ({"double_value": math.inf}, 10, math.inf),
        ({"boolean_value": False}, 11, False),
        ({"string_value": "Grüße"}, 12, "Grüße"),
        ({"bytes_value": b"\x00\xff"}, 17, b"\x00\xff"),
        ({"is_null": True, "int_value": 3}, 3, None),
        ({}, 3, None),
    ],
)
def test_values_of_other_implementations_are_read_as_their_datatype_says(fill, datatype, value):
    sent = GOOGLE["Payload"](timestamp=5, metrics=[{"name": "x", "datatype": datatype, **fill}])
    assert decode(sent.SerializeToString()) == Payload(5, (Metric("x", datatype, value),))


def test_an_int64_of_ten_bytes_is_minus_one():
    assert encode(Payload(None, (Metric(None, DataType.INT64, -1),)), with_datatypes=False) == (
        b"\x12\x0b\x58" + b"\xff" * 9 + b"\x01"
    )


def test_unknown_fields_and_kinds_of_values_are_skipped():
    dataset = b"\x8a\x01\x02\x08\x01"
    metric = b"\x0a\x01x" + dataset + b"\xa1\x06" + bytes(8) + b"\xad\x06" + bytes(4)
    assert decode(b"\x12" + bytes([len(metric)]) + metric + b"\x38\x01") == Payload(None, (Metric("x", None, None),))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"\x13\x14", id="a group"),
        pytest.param(b"\x00\x00", id="field 0"),
        pytest.param(b"\x17\x00", id="wire type 7"),
        pytest.param(b"\x12\x05ab", id="shorter than announced"),
        pytest.param(b"\x12\x04\x0a\x02\xff\xff", id="a name that is not UTF-8"),
        pytest.param(b"\x08", id="a tag without a value"),
    ],
)
def test_malformed_payloads_are_refused(data):
    with pytest.raises(MalformedPayload):
        decode(data)


def test_a_value_that_is_not_of_its_datatype_is_refused_by_the_encoder():
    with pytest.raises(ValueError, match="no value of datatype"):
        encode(Payload(1, (Metric("x", DataType.DOUBLE, "1.0"),)))


def test_a_birth_holds_the_number_of_the_connection_and_the_rebirth_command_as_false():
    bdseq, rebirth = birth_metrics(255, 1000)
    assert bdseq == bdseq_metric(255, 1000) == Metric("bdSeq", DataType.INT64, 255, 1000)
    assert rebirth == Metric("Node Control/Rebirth", DataType.BOOLEAN, False, 1000)


def test_a_verdict_is_told_with_its_own_time_and_nulls_where_it_has_nothing():
    told = {metric.name: metric for metric in row_metrics("verdict", VERDICT, historical=True, now_ms=5)}
    assert {metric.timestamp_ms for metric in told.values()} == {CREATED_MS}
    assert all(metric.historical for metric in told.values())
    assert told["Verdict/Part Id"].value is None
    assert (told["Verdict/Seq"].value, told["Verdict/Epoch"].value) == (17, "0123456789ab")
    assert (told["Verdict/Score"].value, told["Verdict/Threshold"].value) == (0.75, 1.0)
    assert isinstance(told["Verdict/Threshold"].value, float)
    assert told["Line Action"].value == "divert"


def test_numbers_that_never_come_are_told_as_missing():
    message = {"epoch": "0123456789ab", "first": 3, "last": 9, "why": "damaged", "creationTime": "nonsense"}
    told = {metric.name: metric.value for metric in row_metrics("missing", message, historical=False, now_ms=5)}
    assert told == {"Missing/Epoch": "0123456789ab", "Missing/First": 3, "Missing/Last": 9, "Missing/Why": "damaged"}


def test_a_device_is_born_with_every_metric_it_will_ever_send_oldest_first():
    status = {"station": "cell7", "state": "running", "alarms": [{"code": "storage_low", "detail": "x"}]}
    born = device_metrics(VERDICT, status, CREATED_MS + 7)
    missing = row_metrics("missing", {}, historical=False, now_ms=1)
    names = {metric.name for metric in born}
    for told in (row_metrics("verdict", VERDICT, historical=False, now_ms=1), missing, status_metrics(status, 1)):
        assert {metric.name for metric in told} <= names
    assert len(names) == len(born)
    assert all(isinstance(metric.datatype, DataType) for metric in born)
    assert [metric.timestamp_ms for metric in born] == sorted(metric.timestamp_ms for metric in born)
    values = {metric.name: metric.value for metric in born}
    assert (values["Station/State"], values["Station/Alarms"]) == ("running", "storage_low")
    assert values["Verdict/Outcome"] == "reject"


def test_a_device_without_any_verdict_yet_is_born_with_nulls():
    assert {metric.value for metric in device_metrics(None, None, 5)} == {None}
    assert {metric.timestamp_ms for metric in device_metrics(None, None, 5)} == {5}


@given(st.dictionaries(st.sampled_from(sorted(VERDICT)), st.none() | st.booleans() | st.integers() | st.text()))
def test_a_message_with_fields_of_any_kind_can_be_told(message):
    encode(Payload(1, row_metrics("verdict", message, historical=False, now_ms=5)))


@pytest.mark.parametrize(
    ("metric", "asks"),
    [
        (Metric(REBIRTH, 11, True), True),
        (Metric(REBIRTH, None, True), True),
        (Metric(REBIRTH, 11, False), False),
        (Metric(REBIRTH, 3, 1), False),
        (Metric(REBIRTH, 11, None), False),
        (Metric("Node Control/Reboot", 11, True), False),
        (Metric(None, 11, True, alias=2), False),
    ],
)
def test_only_a_true_rebirth_asks_for_a_rebirth(metric, asks):
    assert asks_for_rebirth(Payload(1, (Metric("other", 12, "x"), metric))) is asks


def test_a_host_says_whether_it_is_online():
    assert host_state(b'{"timestamp": 1795341600123, "online": true}') == HostState(True, CREATED_MS)


@given(st.binary(max_size=80))
@example(b"ONLINE")
@example(b"[" * 60_000)
@example(b'{"online": "true", "timestamp": 1}')
@example(b'{"online": true}')
@example(b'{"online": true, "timestamp": true}')
@example(b'{"online": true, "timestamp": 1e999}')
@example(b"\xff\xfe")
def test_what_is_no_state_of_a_host_is_refused_with_our_own_error(data):
    with pytest.raises(MalformedPayload):
        host_state(data)


def test_topics_are_those_of_the_specification():
    settings = SparkplugSettings("plant1", "line3", "cell7", "scada")
    assert settings.topic("NBIRTH") == "spBv1.0/plant1/NBIRTH/line3"
    assert settings.topic("DDATA") == "spBv1.0/plant1/DDATA/line3/cell7"
    assert settings.host_topic() == "spBv1.0/STATE/scada"


@pytest.mark.parametrize("key", ["group", "edge_node", "device", "primary_host"])
@pytest.mark.parametrize("name", ["", "a/b", "a+", "#", "a\x00", "x" * 257, 7])
def test_a_name_that_topics_cannot_carry_is_refused(key, name):
    with pytest.raises(SettingsError, match=f"sparkplug.{key}"):
        SparkplugSettings(**{"group": "plant1", "edge_node": "line3", "device": "cell7", key: name})


def test_a_group_cannot_be_named_as_the_topic_of_hosts():
    with pytest.raises(SettingsError, match="STATE"):
        SparkplugSettings("STATE", "line3", "cell7")


def test_a_double_keeps_every_bit():
    value = struct.unpack("<d", bytes(range(8)))[0]
    assert decode(encode(Payload(1, (Metric("x", DataType.DOUBLE, value),)))).metrics[0].value == value
