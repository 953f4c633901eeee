"""What the integrator's page gives away for the broker: certificates, mosquitto.conf, access list, and its commands."""

import base64
import gc
import hashlib
import json
import os
import queue
import secrets
import shutil
import ssl
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from agent.clock import Stamp
from agent.commands.commands import Commands, MemoryOperations
from agent.commands.log import CommandLog
from agent.mqtt.publisher import MqttPublisher, MqttSettings, outbox_consumers
from agent.outbox.outbox import Outbox, OutboxSettings
from agent.publishing.messages import Origin, heatmap_payload, new_id, verdict_message
from agent.verdict import Outcome, Reason, Verdict
from tests.broker import free_port, mosquitto_program, wait_until
from tests.node import QUIET, apt_install, lacking
from tests.schemas import closed, commands, faults, schema

DOCS = Path(__file__).parents[2] / "docs" / "mosquitto"
LINE = "acme/plant1/hall2/line3"
CELL7, CELL8 = f"{LINE}/cell7", f"{LINE}/cell8"
USERS = ("cell7", "cell8", "mes", "planner")
OUT = ("verdict", "missing", "heatmap/1", "status", "cmd/pause/reply")  # what a station says
NOT_AUTHORIZED = 0x87

pytestmark = pytest.mark.broker


class Plant:
    """A broker set up as the page says, with the certificates that it makes, on a free port."""

    def __init__(self, folder):
        self.folder = folder
        self.port, self.password_port = free_port(), free_port()
        run_commands("certificates", folder)
        make_password(folder / "passwords", "mes", "secret")
        (folder / "db").mkdir()
        text = (DOCS / "mosquitto.conf").read_text(encoding="utf-8")
        for theirs, ours in {
            "\nlistener 8883\n": f"\nlistener {self.port} 127.0.0.1\n",
            "\nacl_file /etc/mosquitto/taktsight.acl": f"\nacl_file {DOCS / 'taktsight.acl'}",
            "\n# listener 8884\n": f"\n# listener {self.password_port} 127.0.0.1\n",
            " /etc/mosquitto/passwords": f" {folder}/passwords",
            "file /etc/mosquitto/certs/": f"file {folder}/",
            " /var/lib/mosquitto/": f" {folder}/db/",
        }.items():
            assert theirs in text
            text = text.replace(theirs, ours)
        begin = text.index("# password_file")
        end = text.index("\n\n", begin)
        text = text[:begin] + text[begin:end].replace("# ", "") + text[end:]  # a reader who wants it takes these away
        text += "log_dest none\n" + ("user root\n" if os.geteuid() == 0 else "")
        (folder / "mosquitto.conf").write_text(text, encoding="utf-8")
        self._process = subprocess.Popen([mosquitto_program(), "-c", str(folder / "mosquitto.conf")], **QUIET)
        wait_until(self._answers)

    def stop(self):
        self._process.kill()
        self._process.wait(5)

    def _answers(self):
        assert self._process.poll() is None, "mosquitto does not accept the configuration"
        try:
            ssl.get_server_certificate(("127.0.0.1", self.port), timeout=1)
        except ConnectionRefusedError:
            return False
        except OSError:  # it wants a certificate of us
            return True
        return True


class Client:
    """One user of the broker, with a certificate, over MQTT 5; hears what it may of everything below the plant."""

    def __init__(self, plant, user):
        self.heard = []
        self._answers = {}
        self._ready = threading.Event()
        self._client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
        self._client.tls_set(*(str(plant.folder / name) for name in ("authority.crt", f"{user}.crt", f"{user}.key")))
        self._client.on_connect = lambda client, *_: client.subscribe("acme/#", qos=1)
        self._client.on_subscribe = lambda *_: self._ready.set()
        self._client.on_message = lambda _client, _data, message: self.heard.append(message)
        self._client.on_publish = lambda _client, _data, mid, reason, _props: self._answers.update({mid: reason.value})
        self._client.connect("127.0.0.1", plant.port)
        self._client.loop_start()
        assert self._ready.wait(5), f"{user} could not connect"

    def may_write(self, topic, payload=b"{}"):
        """Publish, and return whether the broker let us."""
        mid = self._client.publish(topic, payload, qos=1).mid
        wait_until(lambda: mid in self._answers)
        return self._answers[mid] != NOT_AUTHORIZED

    def topics(self):
        return {message.topic for message in list(self.heard)}

    def stop(self):
        self._client.disconnect()
        self._client.loop_stop()


def make_password(file, user, password):
    """Write a password file as mosquitto_passwd does (PBKDF2 with SHA-512, 101 rounds)."""
    salt = secrets.token_bytes(12)
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, 101)
    fields = "$".join(("", "7", "101", base64.b64encode(salt).decode(), base64.b64encode(digest).decode()))
    file.write_text(f"{user}:{fields}\n", encoding="utf-8")


def run_commands(name, folder, changes=None, *, more=""):
    """Run the commands of the page in a folder, with parts of their text replaced; return what they print."""
    text = commands(name).rstrip() + more
    for theirs, ours in (changes or {}).items():
        assert theirs in text
        text = text.replace(theirs, ours)
    for program in ("bash", "openssl"):
        if shutil.which(program) is None:
            lacking(f"{program} is not installed: run `apt-get install {program}`")
    with (folder / f"{name}.printed").open("wb+") as printed:
        done = subprocess.run(
            ["bash", "-ec", text], cwd=folder, timeout=30, check=False, **{**QUIET, "stdout": printed}
        )
        printed.seek(0)
        assert done.returncode == 0, name
        return printed.read().decode()


@pytest.fixture(scope="module")
def plant(tmp_path_factory):
    one = Plant(tmp_path_factory.mktemp("plant"))
    yield one
    one.stop()


@pytest.fixture(scope="module")
def clients(plant):
    found = {user: Client(plant, user) for user in USERS}
    yield found
    for client in found.values():
        client.stop()


@pytest.mark.parametrize(
    ("user", "allowed"),
    [
        ("cell7", [f"{CELL7}/{ending}" for ending in OUT]),
        ("cell8", [f"{CELL8}/{ending}" for ending in OUT]),
        ("mes", [f"{CELL7}/ack/mes", f"{CELL8}/ack/mes"]),
        ("planner", [f"{CELL7}/cmd/pause", f"{CELL8}/cmd/pause"]),
    ],
)
def test_everyone_may_write_what_is_his_and_nothing_else(clients, user, allowed):
    endings = (*OUT, "cmd/pause", "ack/mes", "ack/planner", "else", "heatmap/1/2")
    topics = [f"{cell}/{ending}" for cell in (CELL7, CELL8) for ending in endings]
    topics += ["acme/plant2/hall2/line3/cell7/verdict", "spBv1.0/plant1/NCMD/cell7", "cell7", "$SYS/x"]
    assert [topic for topic in topics if clients[user].may_write(topic)] == allowed


def test_everyone_hears_what_is_his_and_nothing_else(clients):
    said = {
        "cell7": [f"{CELL7}/{ending}" for ending in OUT],
        "cell8": [f"{CELL8}/{ending}" for ending in OUT],
        "mes": [f"{CELL7}/ack/mes"],
        "planner": [f"{CELL7}/cmd/pause", f"{CELL8}/cmd/pause"],
    }
    for user, topics in said.items():
        assert all(clients[user].may_write(topic) for topic in topics)
    wants = {
        "cell7": {f"{CELL7}/ack/mes", f"{CELL7}/cmd/pause"},
        "cell8": {f"{CELL8}/cmd/pause"},
        "mes": {*said["cell7"], *said["cell8"]},
        "planner": {f"{cell}/{ending}" for cell in (CELL7, CELL8) for ending in ("status", "cmd/pause/reply")},
    }
    wait_until(lambda: all(clients[user].topics() >= topics for user, topics in wants.items()))
    assert clients["cell7"].topics() == wants["cell7"]
    assert clients["cell8"].topics() - {f"{CELL8}/ack/mes"} == wants["cell8"]  # the mes may have said it before
    assert clients["mes"].topics() == wants["mes"]
    assert clients["planner"].topics() == wants["planner"]


def answer_to_a_stranger(plant, port, password=None):
    """What the broker says to a client without a certificate that calls itself mes: "in", "out", or None: nothing."""
    answers = queue.SimpleQueue()
    stranger = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
    stranger.tls_set(str(plant.folder / "authority.crt"))
    stranger.username_pw_set("mes", password)
    stranger.on_connect = lambda _client, _data, _flags, reason, _props: answers.put(
        "out" if reason.is_failure else "in"
    )
    stranger.on_disconnect = lambda *_: answers.put(None)
    stranger.connect("127.0.0.1", port)
    stranger.loop_start()
    try:
        return answers.get(timeout=5)
    finally:
        stranger.disconnect()
        stranger.loop_stop()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # paho forgets a refused TLS socket
def test_without_a_certificate_of_the_plant_the_broker_does_not_even_answer(plant):
    assert answer_to_a_stranger(plant, plant.port, "secret") is None
    gc.collect()


def test_on_the_other_listener_a_password_lets_in_and_a_wrong_one_does_not(plant):
    assert answer_to_a_stranger(plant, plant.password_port, "secret") == "in"
    assert answer_to_a_stranger(plant, plant.password_port, "wrong") == "out"
    assert answer_to_a_stranger(plant, plant.password_port) == "out"


class Station:
    """A station with three verdicts on this broker, with its certificate, that lets itself be paused."""

    def __init__(self, folder, plant):
        origin = Origin("cell7", new_id(), "bottle", "d" * 64, "onnx", simulated=True, on_no_verdict="reject")
        ca, cert, key = (plant.folder / name for name in ("authority.crt", "cell7.crt", "cell7.key"))
        settings = MqttSettings(
            topic=CELL7, port=plant.port, consumers=("mes",), ca_file=ca, cert_file=cert, key_file=key
        )
        self.run = origin.run
        self.operations = MemoryOperations()
        self._log = CommandLog(folder, "cell7")
        self._commands = Commands(
            self.operations, self._log, station="cell7", run=origin.run, allow=frozenset({"pause"})
        )
        self.outbox = Outbox(OutboxSettings(folder / "outbox", reserve_mb=0.0), "cell7")
        self.outbox.set_consumers(outbox_consumers(settings))
        self.publisher = MqttPublisher(settings, origin, self.outbox, on_command=self._obey)
        heatmap = heatmap_payload(np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64), 0.5)
        verdict = Verdict(1, Outcome.PASS, Reason.SCORE, score=0.25, threshold=0.5)
        message = verdict_message(verdict, origin, Stamp(datetime.now(UTC), 1.0), heatmap)
        self.stored = self.outbox.store([(message, heatmap)] * 3)
        self.publisher.start()

    def stop(self):
        self.publisher.stop(0.2)
        self.outbox.close()
        self._log.close()

    def _obey(self, incoming):
        reply = self._commands.handle(incoming.name, incoming.payload, incoming.retained)
        self.publisher.publish_reply(incoming.name, reply, incoming.correlation)


@pytest.fixture
def station(tmp_path, plant):
    one = Station(tmp_path, plant)
    yield one
    one.stop()


@pytest.fixture
def here(plant):
    """What stands for the plant's broker and for the installed library in the commands of the page."""
    return {"broker.example": "127.0.0.1", "8883": str(plant.port)}


LIBRARY = {"taktsight-subscribe": f"{sys.executable} -m taktsight_subscribe"}


def test_the_page_shows_how_to_look_on_with_mosquitto_sub(plant, here, station):
    needs_mosquitto_clients()
    printed = run_commands("subscribe", plant.folder, here, more=" -C 3 -W 20").splitlines()
    assert [line.split(" ", 1)[0] for line in printed] == [f"{CELL7}/verdict"] * 3
    assert [json.loads(line.split(" ", 1)[1]) for line in printed] == station.stored
    assert station.outbox.waiting == 3


def test_the_page_shows_how_to_receive_store_and_acknowledge_with_the_library(plant, here, station):
    printed = run_commands("library", plant.folder, {**here, **LIBRARY}, more=" --count 3 --timeout 20 --json")
    assert [json.loads(line) for line in printed.splitlines()] == station.stored
    wait_until(lambda: station.outbox.waiting == 0)


def said_in_this_run(clients, station, ending):
    """What the planner has heard from this station since it was started."""
    heard = [
        json.loads(message.payload) for message in list(clients["planner"].heard) if message.topic.endswith(ending)
    ]
    return [message for message in heard if message.get("run") == station.run]


@pytest.mark.parametrize("name", ["send", "pause"])
def test_the_page_shows_how_to_command_a_station(plant, here, clients, station, name):
    needs_mosquitto_clients()
    wait_until(lambda: said_in_this_run(clients, station, "/status"))  # it listens before it speaks
    run_commands(name, plant.folder, {**here, **(LIBRARY if name == "send" else {})})
    wait_until(lambda: said_in_this_run(clients, station, "/cmd/pause/reply"))
    assert said_in_this_run(clients, station, "/cmd/pause/reply")[0]["result"] == "done"
    assert station.operations.calls == [("pause", "change of shift")]


def test_what_a_station_says_of_itself_on_the_way_keeps_to_the_schema(clients, station):
    wait_until(lambda: said_in_this_run(clients, station, "/status"))
    station.stop()
    wait_until(lambda: said_in_this_run(clients, station, "/status")[-1]["state"] == "stopped")
    for status in said_in_this_run(clients, station, "/status"):
        assert faults(status, closed(schema("status"))) == []


def needs_mosquitto_clients():
    """Skip without mosquitto_sub and mosquitto_pub; install them on the spot where we may."""
    if shutil.which("mosquitto_sub") is None:
        apt_install("mosquitto-clients")
    if shutil.which("mosquitto_sub") is None:
        lacking("mosquitto_sub is not installed: run `apt-get install mosquitto-clients`")
