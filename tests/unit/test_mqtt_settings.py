import os
from pathlib import Path

import pytest

from agent.messages import Origin, new_epoch
from agent.mqtt import MqttPublisher, MqttSettings
from calibration.errors import SettingsError

ROOT = "acme/plant1/hall2/line3/cell7"
ORIGIN = Origin("cell7", new_epoch(), "bottle", "d" * 64, "onnx", simulated=True, on_no_verdict="reject")


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("topic", {"topic": "acme/+/line"}),
        ("topic", {"topic": "acme/#"}),
        ("topic", {"topic": "acme//line"}),
        ("topic", {"topic": "/acme"}),
        ("topic", {"topic": "acme/"}),
        ("topic", {"topic": ""}),
        ("topic", {"topic": "acme\n"}),
        ("topic", {"topic": "$SYS/x"}),
        ("topic", {"topic": "x" * 2000}),
        ("host", {"host": ""}),
        ("host", {"host": "x" * 70 + ".example"}),
        ("port", {"port": 0}),
        ("protocol", {"protocol": 4}),
        ("keepalive_s", {"keepalive_s": 0}),
        ("max_waiting_verdicts", {"max_waiting_verdicts": 0}),
        ("username", {"password_file": Path("x")}),
        ("ca_file", {"cert_file": Path("x"), "key_file": Path("x")}),
        ("key_file", {"ca_file": Path("x"), "cert_file": Path("x")}),
    ],
)
def test_a_setting_that_can_never_work_is_refused_by_its_key(key, settings):
    with pytest.raises(SettingsError, match=rf"^mqtt\.{key}: "):
        MqttSettings(**{"topic": ROOT, **settings})


@pytest.mark.parametrize(
    ("key", "settings"),
    [
        ("password_file", {"username": "a", "password_file": Path("absent")}),
        ("password_file", {"username": "a", "password_file": Path(os.devnull)}),
        ("ca_file", {"ca_file": Path("absent")}),
        ("ca_file", {"ca_file": Path(__file__)}),
    ],
)
def test_a_password_or_certificate_that_cannot_be_read_is_refused_by_its_key(key, settings):
    with pytest.raises(SettingsError, match=rf"^mqtt\.{key}"):
        MqttPublisher(MqttSettings(topic=ROOT, **settings), ORIGIN)
