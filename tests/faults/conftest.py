"""What tests with a real broker share."""

import pytest
from broker import Mosquitto


@pytest.fixture
def impatience(monkeypatch):
    """Tries a lost connection again after 0.1 s, and says at once what changed, so that the tests are soon over."""
    monkeypatch.setattr("agent.mqtt.courier.RECONNECT_MIN_S", 0.1)
    monkeypatch.setattr("agent.mqtt.courier.RECONNECT_MAX_S", 0.2)
    monkeypatch.setattr("agent.mqtt.delivery_report.LOOK_EVERY_S", 0.05)
    monkeypatch.setattr("agent.mqtt.delivery_report.LEAST_PAUSE_S", 0.1)


@pytest.fixture
def new_broker(tmp_path):
    """Returns a function that makes a broker, not yet started; every one is stopped in the end."""
    made = []

    def make(**options):
        made.append(Mosquitto(tmp_path, **options))
        return made[-1]

    yield make
    for one in made:
        one.stop()


@pytest.fixture
def broker(new_broker):
    return new_broker().start()
