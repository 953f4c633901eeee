"""The Node-RED flow of the integrator's page: our topics, and function nodes that do what they say."""

import json
from pathlib import Path

import pytest

from tests.node import run_node
from tests.schemas import sample

FLOW = Path(__file__).parents[2] / "docs" / "node-red" / "verdicts.json"
SCRIPT = Path(__file__).parent / "node_red_function.cjs"
NODES = {node["id"]: node for node in json.loads(FLOW.read_text(encoding="utf-8"))}


@pytest.fixture
def outputs_of(tmp_path):
    """Returns a function: what leaves each output of a function node for each of these payloads."""

    def run(name, payloads):
        file = tmp_path / "payloads.json"
        file.write_text(json.dumps(payloads), encoding="utf-8")
        return run_node(SCRIPT, str(FLOW), name, str(file))

    return run


def verdict(seq, *, epoch="5f0c61a2b9de", station="cell7"):
    return {**sample("verdict"), "seq": seq, "epoch": epoch, "station": station}


def test_the_flow_subscribes_to_our_topics_with_qos_1_and_a_session_that_waits():
    sources = [node for node in NODES.values() if node["type"] == "mqtt in"]
    assert {node["topic"] for node in sources} == {
        f"acme/plant1/+/+/+/{kind}" for kind in ("verdict", "missing", "status")
    }
    assert all((node["qos"], node["datatype"]) == ("1", "json") for node in sources)
    broker = NODES[sources[0]["broker"]]
    assert (broker["protocolVersion"], broker["cleansession"], broker["sessionExpiry"]) == ("5", False, "86400")


def test_every_wire_and_every_configuration_leads_to_a_node():
    targets = {target for node in NODES.values() for wires in node.get("wires", []) for target in wires}
    targets |= {
        node[key]
        for node in NODES.values()
        for key in ("z", "broker", "tls")
        if node["type"] != "mqtt-broker" and key in node
    }
    assert targets <= set(NODES)
    assert NODES["taktsight-broker"]["tls"] in NODES


def test_each_part_is_passed_on_once_and_gaps_are_said(outputs_of):
    notice = {**sample("missing"), "seq": 5, "first": 5, "last": 5}
    came = [verdict(1), verdict(2), verdict(2), verdict(4), notice, notice, verdict(3), verdict(6), verdict(1)]
    left = outputs_of("each part once", came)
    passed = [[message["seq"] for message in outputs[0]] for outputs in left]
    assert passed == [[1], [2], [], [4], [], [], [3], [6], []]
    said = [message for outputs in left for message in (outputs[1] if len(outputs) > 1 else [])]
    assert [(message["first"], message["last"]) for message in said] == [(3, 3), (5, 5)]
    assert said[1] == notice


def test_stations_and_epochs_are_told_apart(outputs_of):
    came = [verdict(7), verdict(7, station="cell8"), verdict(1, epoch="0123456789ab"), verdict(7)]
    left = outputs_of("each part once", came)
    assert [len(outputs[0]) for outputs in left] == [1, 1, 1, 1]
    assert all(outputs[1] == [] for outputs in left)


def test_a_status_is_passed_on_when_state_or_alarms_change(outputs_of):
    status = sample("status")
    left = outputs_of("on a change", [status, {**status, "lastSeq": 9}, {**status, "state": "halted"}, status])
    assert [[message["state"] for message in outputs[0]] for outputs in left] == [
        ["running"],
        [],
        ["halted"],
        ["running"],
    ]
