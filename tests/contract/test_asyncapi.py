"""The AsyncAPI document: true to the topics, schemas and settings of the code, and valid for the official parser."""

import json

import pytest
import yaml

from agent.commands.commands import COMMANDS
from agent.mqtt.client import MqttSettings
from agent.mqtt.link import MOST_INCOMING_BYTES, client_id
from agent.outbox.outgoing import HEATMAP_EXPIRY_S
from agent.publishing.messages import heatmap_topic
from tests.node import run_node
from tests.schemas import INTERFACE, closed, faults, sample, schema

PATH = INTERFACE / "asyncapi.yaml"
PARSER = "@asyncapi/parser@3.6.3"
SCRIPT = INTERFACE.parents[1] / "tests" / "contract" / "asyncapi_check.cjs"
DOCUMENT = yaml.safe_load(PATH.read_text(encoding="utf-8"))
MESSAGES = DOCUMENT["components"]["messages"]
EXAMPLES = [(name, example) for name, message in MESSAGES.items() for example in message.get("examples", [])]
ROOT = "{enterprise}/{site}/{area}/{line}/{cell}"


def references(part, path=""):
    """Every $ref below this part, with the place where it stands."""
    if isinstance(part, dict):
        if "$ref" in part:
            yield path, part["$ref"]
        for key, value in part.items():
            yield from references(value, f"{path}/{key}")
    elif isinstance(part, list):
        for number, value in enumerate(part):
            yield from references(value, f"{path}/{number}")


def resolved(reference):
    """What a $ref points at; raises KeyError or FileNotFoundError where that is nothing."""
    name, _, pointer = reference.partition("#")
    target = DOCUMENT if not name else json.loads((INTERFACE / name).read_text(encoding="utf-8"))
    for step in filter(None, pointer.split("/")):
        target = target[step]
    return target


def channel(name):
    return DOCUMENT["channels"][name]


def test_every_reference_leads_somewhere():
    found = list(references(DOCUMENT))
    assert len(found) > 30
    assert all(resolved(reference) is not None for _, reference in found)


def test_every_schema_of_the_folder_is_used_by_the_message_of_its_name():
    used = {name: message["payload"].get("$ref") for name, message in MESSAGES.items()}
    published = {path.name.removesuffix(".schema.json") for path in INTERFACE.glob("*.schema.json")}
    assert used == {**{name: f"./{name}.schema.json" for name in published}, "heatmap": None}


def test_the_channels_are_the_topics_of_the_code():
    assert {name: one["address"].removeprefix(f"{ROOT}/") for name, one in DOCUMENT["channels"].items()} == {
        "verdict": "verdict",
        "missing": "missing",
        "heatmap": heatmap_topic("{seq}"),
        "status": "status",
        "ack": "ack/{consumer}",
        "command": "cmd/{name}",
        "reply": "cmd/{name}/reply",
    }
    assert all(one["address"].startswith(f"{ROOT}/") for one in DOCUMENT["channels"].values())


@pytest.mark.parametrize("name", DOCUMENT["channels"])
def test_a_channel_explains_every_parameter_of_its_address(name):
    named = {part.strip("{}") for part in channel(name)["address"].split("/") if part.startswith("{")}
    assert set(channel(name)["parameters"]) == named


def test_the_commands_are_those_of_the_code():
    assert DOCUMENT["components"]["parameters"]["name"]["enum"] == list(COMMANDS)


def test_what_the_station_sends_and_receives_is_said_for_every_channel():
    actions = {
        operation["channel"]["$ref"].rsplit("/", 1)[1]: operation["action"]
        for operation in DOCUMENT["operations"].values()
    }
    heard = {"ack", "command"}
    assert actions == {name: "receive" if name in heard else "send" for name in DOCUMENT["channels"]}


def test_everything_travels_with_qos_1_and_status_alone_is_retained():
    for operation in DOCUMENT["operations"].values():
        binding = operation["bindings"]["mqtt"]
        assert binding["qos"] == 1
        assert binding["retain"] is operation["channel"]["$ref"].endswith("/status")


def test_how_the_station_connects_is_said_as_it_is_done():
    binding = DOCUMENT["servers"]["plant"]["bindings"]["mqtt"]
    settings = MqttSettings(topic="acme/plant1/hall2/line3/cell7")
    assert (binding["cleanSession"], binding["sessionExpiryInterval"]) == (True, 0)
    assert binding["maximumPacketSize"] == MOST_INCOMING_BYTES
    assert binding["keepAlive"] == settings.keepalive_s
    assert binding["clientId"] == client_id(settings)
    assert binding["lastWill"]["topic"] == f"{settings.topic}/status"


def test_a_heatmap_expires_as_it_is_said():
    assert DOCUMENT["operations"]["sendHeatmap"]["bindings"]["mqtt"]["messageExpiryInterval"] == HEATMAP_EXPIRY_S


def test_the_last_will_is_a_status_on_the_topic_of_the_status():
    will = DOCUMENT["servers"]["plant"]["bindings"]["mqtt"]["lastWill"]
    message = json.loads(will["message"].replace(", ", ","))
    assert will["topic"].endswith("/status")
    assert (will["qos"], will["retain"], message["state"]) == (1, True, "offline")
    assert faults(message, closed(schema("status"))) == []


@pytest.mark.parametrize(("name", "example"), EXAMPLES, ids=[f"{name}-{one['name']}" for name, one in EXAMPLES])
def test_every_example_validates(name, example):
    assert faults(example["payload"], closed(schema(name))) == []


@pytest.mark.parametrize("name", [name for name in MESSAGES if name != "heatmap"])
def test_every_message_has_the_example_of_the_integrators_page(name):
    assert sample(name) in [example["payload"] for example in MESSAGES[name]["examples"]]


def test_the_official_parser_accepts_the_document_and_sees_all_of_it():
    found = run_node(SCRIPT, str(PATH), package=PARSER)
    assert found["errors"] == []
    assert {one["address"] for one in found["channels"]} == {one["address"] for one in DOCUMENT["channels"].values()}
    assert found["operations"] == {name: one["action"] for name, one in DOCUMENT["operations"].items()}
    fields = {message["id"]: set(message["fields"]) for one in found["channels"] for message in one["messages"]}
    assert fields["verdict"] == set(schema("verdict")["properties"])
    assert fields["status"] == set(schema("status")["properties"])


def test_the_official_parser_refuses_a_document_that_is_broken(tmp_path):
    for path in INTERFACE.glob("*.schema.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    text = PATH.read_text(encoding="utf-8")
    broken = tmp_path / "asyncapi.yaml"
    broken.write_text(text.replace("action: receive", "action: listen", 1), encoding="utf-8")
    assert run_node(SCRIPT, str(broken), package=PARSER)["errors"]
