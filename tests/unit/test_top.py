"""What an engineer sees of a running station, over real HTTP, and what is said where there is none."""

import http.server
import io
import json
import re
import socket
import threading

import pytest
from click.testing import CliRunner
from rich.console import Console

from agent.health.health import DEFAULT_PORT
from agent.health.metrics import HealthServer
from agent.health.top import NoAnswer, fetch, show_live, top_command
from agent.health.top_picture import drawn, within_a_turn
from agent.publishing.messages import Alarm
from agent.verdict import Reason
from calibration.errors import SettingsError, TaktsightError
from tests.health import DEVIATION, MEDIAN, Clock, new_health, run, scored, silent


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def health(clock):
    return new_health(clock)


@pytest.fixture
def server(health):
    one = HealthServer(health, 0)
    assert one.start()
    yield one
    one.stop()


def seen(health, width=80, trouble="", **terminal):
    """Return what a terminal of this width shows, without colours."""
    console = Console(file=io.StringIO(), width=width, color_system=None, **terminal)
    console.print(drawn(json.loads(json.dumps(health.snapshot())), console, trouble))
    return console.file.getvalue()


def headline(health, **more):
    return seen(health, **more).splitlines()[1].strip()


def one_line(text):
    return " ".join(text.split())


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


@pytest.fixture
def foreign():
    """Serve this answer on a port of its own, as another program would."""
    servers = []

    def serve(body, status=200, length=None):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.send_header("Content-Length", str(len(body) if length is None else length))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        one = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.02}).start()
        servers.append(one)
        return one.server_address[1]

    yield serve
    for one in servers:
        one.shutdown()
        one.server_close()


def test_a_station_that_keeps_its_takt_says_so_on_the_second_line(health, clock):
    run(health, clock, 1000)
    assert re.match(r"KEEPS ITS TAKT  p99.9 \d\d\.\d of 45 ms, 0 of 1,000 parts late in 50 s", headline(health))


def test_one_late_part_is_the_headline(health, clock):
    run(health, clock, 999)
    health.note(silent(Reason.LATE, 45.2))
    assert headline(health) == "LATE  1 of 1,000 parts had no answer at 45 ms in 50 s"


def test_little_room_before_the_deadline_is_told_before_a_part_is_late(health):
    for _ in range(100):
        health.note(scored(latency_ms=38.0))
    assert headline(health).startswith("TIGHT  p99.9 38.0 of 45 ms")


def test_parts_without_verdict_are_the_headline_however_quick_they_were(health, clock):
    run(health, clock, 90)
    for _ in range(10):
        health.note(silent(Reason.TOO_DARK, 5.0))
    assert headline(health).startswith("KEEPS ITS TAKT")
    for _ in range(3):
        health.note(silent(Reason.BLURRED, 5.0))
    assert headline(health) == "NOT JUDGED  13 of 103 parts had no verdict in 4 s: too_dark 10, blurred 3"


def test_a_lost_frame_that_takes_the_whole_deadline_is_not_blamed_on_the_engine(health, clock):
    run(health, clock, 99)
    health.note(silent(Reason.FRAME_LOST, 45.1))
    assert headline(health) == "FRAMES LOST  1 of 100 parts had no frame at 45 ms in 5 s: camera, trigger"


def test_the_legend_of_the_bar_is_not_broken_within_a_shade(health, clock):
    run(health, clock, 99)
    health.note(scored(latency_ms=400.0))
    lines = [line.strip() for line in seen(health, 80).splitlines()]
    assert "█ to p50   ▓ to p99   ░ to max" in lines


@pytest.mark.parametrize("state", ["starting", "ready", "paused", "halted", "stopped"])
def test_a_station_that_does_not_judge_does_not_keep_its_takt(health, clock, state):
    run(health, clock, 100)
    health.tell(state, [])
    assert headline(health) == f"{state.upper()}  no part is judged"


def test_a_line_that_stands_still_is_told(health, clock):
    run(health, clock, 100)
    clock.now_s += 30
    assert headline(health) == "NO PARTS  no verdict for 30 s"


@pytest.mark.parametrize("width", [40, 80, 118, 200])
def test_everything_is_there_at_any_width_and_nothing_is_wider(health, clock, width):
    run(health, clock, 300, rejects=2)
    health.note(silent(Reason.NOT_REGISTERED, 12.0))
    health.tell("running", [Alarm("storage_low", "12 MB left of 2048: look at the MES")])
    health.gauges = {"outbox_waiting": 3, "inspect_memory_bytes": 400 * 2**20, "stale_frames_total": 2}
    text = seen(health, width)
    assert max(map(len, text.splitlines())) <= width
    for words in (
        "cell7 flange running",
        "KEEPS",
        "deadline",
        "alarm storage_low: 12 MB left",
        "drift",
        "none, passed",
    ):
        assert words in one_line(text)
    for words in ("outbox waiting 3", "inspect 400 MiB", "stale frames 2"):
        assert words in one_line(text)
    if width >= 80:
        for row in (
            r"pass +300 +99\.0 % +300",
            r"reject +2 +0\.7 % +2",
            r"not_registered +1 +0\.3 % +1",
            r"engine +302 +\d\.\d +\d+\.\d",
            r"trigger to verdict +303( +\d\d\.\d){4}",
            r"angle, deg( +-?\d+\.\d\d){4}",
            r"brightness( +0\.\d{3}){4}",
        ):
            assert re.search(row, text), row


def test_the_bar_ends_where_the_slowest_part_lies_on_the_way_to_the_deadline(health):
    for latency_ms in (9.0, 18.0, 22.5):
        health.note(scored(latency_ms=latency_ms))
    bar = next(line for line in seen(health, 102).splitlines() if line.startswith("█"))
    assert bar.index("|") == 90
    assert (bar.count("█"), bar.count("▓"), bar.count("░")) == (36, 9, 0)
    health.note(scored(latency_ms=400.0))
    bar = next(line for line in seen(health, 102).splitlines() if line.startswith("█"))
    assert bar.index("|") == 90
    assert bar.rstrip().endswith("▓" * 10) or bar.rstrip().endswith("░" * 10)


def test_the_strip_shows_late_parts_and_gaps(health, clock):
    health.note(scored(latency_ms=5.0))
    clock.now_s += 20
    health.note(scored(latency_ms=40.0))
    clock.now_s += 10
    health.note(silent(Reason.LATE, 45.1))
    assert "\n▁ █! slowest of each 10 s, ! late" in seen(health)


def test_a_terminal_without_blocks_gets_letters(health, clock):
    run(health, clock, 50)
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii"), width=80, color_system=None)
    console.print(drawn(json.loads(json.dumps(health.snapshot())), console))
    console.file.flush()
    assert b"KEEPS ITS TAKT" in console.file.buffer.getvalue()
    assert b"####" in console.file.buffer.getvalue()


def test_drift_and_its_alarm_are_shown(health):
    for _ in range(100):
        health.note(scored(MEDIAN + 2.5 * DEVIATION))
    text = one_line(seen(health))
    assert "drift UP, passed parts at +2.5 deviations from the calibration's" in text
    assert "alarm score_drift: parts that pass score 2.5 deviations above" in text


def test_a_station_without_parts_or_recipe_is_drawn_too(clock):
    from agent.health.health import Health

    health = Health("cell7", takt_ms=500, deadline_ms=450, monotonic=clock, now=clock.utc)
    text = one_line(seen(health))
    assert "no recipe yet" in text
    assert "STARTING" in text
    assert "not watched" in text


def test_words_of_the_station_do_not_steer_the_terminal(health):
    health.tell("running", [Alarm("paused", "\x1b[2J[red]gone[/]\x07")])
    text = seen(health)
    assert "\x1b" not in text
    assert "?[2J[red]gone[/]?" in text


def test_once_prints_one_picture_and_ends(server, health, clock, tmp_path):
    run(health, clock, 200)
    station = tmp_path / "station.yaml"
    station.write_text(f"station: cell7\nhealth: {{port: {server.port}}}\nrecipe: of others\n")
    for arguments in ([str(station), "--once"], ["--port", str(server.port)]):
        done = CliRunner().invoke(top_command, arguments, standalone_mode=False)
        assert done.exception is None
        assert "KEEPS ITS TAKT" in done.output


def test_a_station_that_does_not_run_is_said_with_what_to_do(tmp_path):
    port = free_port()
    with pytest.raises(NoAnswer, match=f"no station answers on 127.0.0.1:{port} .*taktsight-agent run") as raised:
        fetch(port)
    assert raised.value.exit_code == 1
    done = CliRunner().invoke(top_command, ["--port", str(port)], standalone_mode=False)
    assert isinstance(done.exception, NoAnswer)


def test_a_station_that_tells_nobody_is_an_error_of_its_settings(tmp_path):
    station = tmp_path / "station.yaml"
    station.write_text("station: cell7\nhealth: {port: 0}\n")
    done = CliRunner().invoke(top_command, [str(station)], standalone_mode=False)
    assert isinstance(done.exception, SettingsError)
    assert "health.port: 0 found" in str(done.exception)


def test_without_a_station_and_without_a_port_it_asks_at_the_default(monkeypatch):
    asked = []
    monkeypatch.setattr("agent.health.top.fetch", lambda port, name: asked.append((port, name)) or {}["stop"])
    CliRunner().invoke(top_command, ["--once"], standalone_mode=False)
    assert asked == [(DEFAULT_PORT, None)]


def test_another_station_on_the_port_is_not_shown_for_this_one(server):
    with pytest.raises(SettingsError, match=r"is station .cell7., not .cell8.: .*health\.port of its own"):
        fetch(server.port, "cell8")


@pytest.mark.parametrize(
    ("body", "error", "words"),
    [
        (b"<html>", SettingsError, "is no station"),
        (b"[1, 2]", SettingsError, "None"),
        (b'{"schema": "taktsight.health/9"}', SettingsError, "need taktsight.health/1"),
    ],
)
def test_another_program_on_the_port_is_no_station(foreign, body, error, words):
    with pytest.raises(error, match=words):
        fetch(foreign(body))


def test_a_station_that_ends_in_the_middle_of_its_answer_did_not_answer(foreign):
    with pytest.raises(NoAnswer):
        fetch(foreign(b'{"schema": "taktsi', length=5000))
    with pytest.raises(NoAnswer):
        fetch(foreign(b"too many clients", status=503))


def test_figures_without_what_belongs_to_them_are_an_error_that_says_so(health):
    console = Console(file=io.StringIO(), width=80)
    with pytest.raises(TaktsightError, match=r"cannot be read .*KeyError"):
        drawn({"schema": "taktsight.health/1"}, console)


def test_it_goes_on_over_a_restart_of_the_station(health, clock):
    """Seen, gone, back: the last picture stays, with a headline that says that nobody answers."""
    run(health, clock, 100)
    first = HealthServer(health, 0)
    assert first.start()
    running, pictures = [first], []
    terminal = Console(file=io.StringIO(), width=80, height=50, force_terminal=True, color_system=None)

    def wait(_seconds):
        pictures.append(terminal.file.getvalue())
        terminal.file.truncate(0)
        terminal.file.seek(0)
        if len(pictures) == 1:
            running.pop().stop()
        elif len(pictures) == 3:
            running.append(HealthServer(health, first.port))
            assert running[0].start()
        elif len(pictures) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        show_live(lambda: fetch(first.port, "cell7"), terminal, wait=wait)
    running.pop().stop()
    said = [re.search(r"KEEPS ITS TAKT|NO ANSWER {2}no answer since [\d:]{8}: trying again", text) for text in pictures]
    assert [one.group(0)[:9] for one in said] == ["KEEPS ITS", "NO ANSWER", "NO ANSWER", "KEEPS ITS"]
    assert "trigger to verdict" in pictures[1]


def test_a_station_that_was_never_there_is_not_waited_for():
    with pytest.raises(NoAnswer):
        show_live(lambda: fetch(free_port()), Console(file=io.StringIO()), wait=lambda _: pytest.fail("it waited"))


@pytest.mark.parametrize(
    ("least", "middle", "most", "shown"),
    [
        (-3.0, 1.0, 4.0, (-3.0, 1.0, 4.0)),
        (175.0, 179.0, 190.0, (175.0, 179.0, -170.0)),
        (-170.0, 10.0, 190.0, (-180.0, 10.0, 180.0)),  # parts that lie any way round
    ],
)
def test_angles_are_shown_within_half_a_turn(least, middle, most, shown):
    spread = {"mean": middle, "sd": 1.0, "min": least, "max": most}
    turned = within_a_turn(spread)
    assert (turned["min"], turned["mean"], turned["max"]) == shown
