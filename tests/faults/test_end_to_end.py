"""Agent, broker and MES as the processes that they are, killed while parts go by: what was stored arrives, once."""

from __future__ import annotations

import random
import sqlite3
import time

import pytest
from broker import Mosquitto, wait_until
from plant import ROOT, balance, mes_process, station_process
from verdicts import archived

pytestmark = pytest.mark.broker

NAGLE_OFF = ("set_tcp_nodelay true",)


@pytest.fixture
def rounds(request):
    return 20 if request.config.getoption("--long", default=False) else 4


@pytest.fixture
def broker(tmp_path):
    folder = tmp_path / "broker"
    folder.mkdir()
    one = Mosquitto(folder, lines=NAGLE_OFF)
    yield one.start()
    one.stop()


@pytest.fixture
def plant(tmp_path, broker):
    """A station and its MES, both running."""
    agent, mes = station_process(tmp_path, broker.port), mes_process(tmp_path, broker.port)
    for process in (mes, agent):
        process.start()
    yield agent, mes
    for process in (agent, mes):
        process.stop()


def at_the_mes(tmp_path):
    """Return how many verdicts the MES has stored."""
    if not (tmp_path / "mes.sqlite").exists():
        return 0
    with sqlite3.connect(tmp_path / "mes.sqlite", timeout=5) as database:
        try:
            return database.execute("SELECT count(*) FROM verdict").fetchone()[0]
        except sqlite3.OperationalError:  # the table is not made yet
            return 0


def settled(tmp_path, agent):
    """End the agent in peace, once it inspects, wait until the MES has all, and return the balance."""
    before = at_the_mes(tmp_path)  # what a life before this one could not deliver in its last seconds, this one does
    wait_until(lambda: at_the_mes(tmp_path) > before, 30)
    agent.stop()
    wait_until(lambda: balance(tmp_path).lost == 0, 30)
    found = balance(tmp_path)
    assert (found.lost, found.holes) == (0, 0), agent.output
    assert found.stored > 20
    return found


def kill_in_mid_stream(tmp_path, process, rounds):
    """Kill a process and start it again, each time at another moment after new verdicts arrived."""
    dice = random.Random(1)
    for _ in range(rounds):
        before = at_the_mes(tmp_path)
        wait_until(lambda before=before: at_the_mes(tmp_path) > before + 5, 30)
        time.sleep(dice.uniform(0, 0.3))
        process.kill()
        process.start()


def test_an_agent_that_is_killed_again_and_again_loses_no_stored_verdict(tmp_path, plant, rounds):
    agent, _ = plant
    kill_in_mid_stream(tmp_path, agent, rounds)
    found = settled(tmp_path, agent)
    assert found.received >= found.stored
    assert found.missing_triggers == 0


def test_a_broker_that_is_killed_with_the_mes_away_loses_nothing(tmp_path, plant, broker, rounds):
    agent, mes = plant
    wait_until(lambda: at_the_mes(tmp_path) > 10, 30)
    for _ in range(max(2, rounds // 4)):
        mes.kill()
        time.sleep(0.5)
        broker.kill()
        time.sleep(0.5)
        broker.start()
        before = at_the_mes(tmp_path)
        mes.start()
        wait_until(lambda before=before: at_the_mes(tmp_path) > before + 10, 30)
    settled(tmp_path, agent)


def test_a_mes_that_is_killed_in_the_middle_of_it_has_each_part_once(tmp_path, plant, rounds):
    agent, mes = plant
    kill_in_mid_stream(tmp_path, mes, rounds)
    settled(tmp_path, agent)


def test_a_command_reaches_the_line_and_its_reply_comes_back(tmp_path, broker):
    from taktsight_subscribe import send_command

    agent = station_process(tmp_path, broker.port)
    settings = tmp_path / "station.yaml"
    settings.write_text(settings.read_text() + "commands: {allow: [pause, resume, selftest, capture, threshold]}\n")
    agent.start()
    try:
        archive = tmp_path / "archive"
        wait_until(lambda: "connected" in agent.output and archived(archive), 30)

        def send(command, **arguments):
            return send_command(ROOT, command, arguments, issuer="planner", port=broker.port)

        assert send("pause", reason="new nest").message["result"] == "done"
        wait_until(lambda: "paused" in {message["reason"] for message in archived(archive)}, 10)
        assert send("resume").message["result"] == "done"
        assert send("selftest").message["result"] == "done"
        assert send("threshold", score=1e300).message["result"] == "failed"
        assert send("recipe", name="other").message["result"] == "refused"
        assert send("capture", count=3).message["result"] == "done"
        wait_until(lambda: len(list((tmp_path / "captures").glob("*/*/*.png"))) == 3, 10)
    finally:
        agent.stop()
