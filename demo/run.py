"""`make demo`: a line in a box, from good parts to verdicts on MQTT, with the commands that a user would type.

    simulated line -> recording -> trainer -> recipe -> agent at 2 Hz -> embedded broker -> this subscriber

At the end the verdicts, as they came over MQTT, stand beside the simulator's truth. With `--camera genicam` the same
parts stand before a GigE Vision camera, and come through harvesters and our GenTL producer.
"""

from __future__ import annotations

import argparse
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from line_camera import LineCamera, before_the_camera, build
from rich.table import Table

from agent.config import read_station
from agent.mqtt.client import MqttSettings
from agent.simulation.line import LineSettings, PartPlan, SimulatedLine
from agent.watch import watch
from calibration.console import console, latency_table, say

HERE = Path(__file__).parent
OUT = HERE.parent / "out" / "demo"
BIN = Path(sys.executable).parent
GENICAM = "genicam"
WATCH_TIMEOUT_S = 120.0
WANTED = {"good": "pass", "defective": "reject"}  # every other kind: no_verdict


def main() -> int:
    """Run the whole demo; 0 if every trigger got exactly one verdict over MQTT."""
    started_s, options = time.monotonic(), read_options()
    out: Path = options.out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    if options.camera == GENICAM:
        headline("0. The camera: its GenTL producer, and a line simulator that speaks GigE Vision")
        say("$ " + shown(" ".join(build())))
    learn_file, station_file, recipe = out / "learn.yaml", out / "line.yaml", out / "flange.recipe"
    port = free_port()
    learn_file.write_text((HERE / "learn.yaml").read_text())
    station_file.write_text((HERE / "line.yaml").read_text().replace("port: 1883", f"port: {port}"))
    line = settings_of(station_file)

    headline("1. The line makes good parts; the camera records them")
    with camera(options, learn_file, options.good):
        run("taktsight-agent", "capture", learn_file, out / "good", "--count", options.good)
    headline("2. The trainer learns what a good part looks like")
    run("taktsight-trainer", "fit", out / "good", "--recipe", recipe, "--product", "flange", "--size", options.size)
    headline(f"3. The agent inspects {options.parts} parts at 2 Hz; verdicts come over MQTT")
    settings = MqttSettings(topic="acme/plant1/assembly/line1/cell1", port=port, protocol=3)
    with camera(options, station_file, options.parts), broker(port), Agent(station_file, options.parts) as agent:
        verdicts = watch(
            settings,
            count=options.parts,
            timeout_s=WATCH_TIMEOUT_S,
            console=console,
            on_subscribed=agent.start,
            give_up=agent.failed,
        )
    headline("4. What came out")
    show_confusion(verdicts, line, options.parts)
    show_latency(verdicts)
    say(f"agent's own summary: {shown(agent.log_file)}")
    say(f"trainer's report:    {shown(recipe)}.html")
    say(f"shift report:        {shown(out / 'archive' / 'report.html')}")
    say(f"done in {time.monotonic() - started_s:.0f} s")
    return 0 if sorted(message["trigger"] for message in verdicts) == list(range(1, options.parts + 1)) else 1


def read_options() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description="A line in a box: simulated parts, training, inspection, verdicts.")
    parser.add_argument(
        "--camera",
        choices=("simulated", GENICAM),
        default="simulated",
        help="genicam: the same parts before a GigE Vision camera; builds agent/gentl",
    )
    parser.add_argument("--good", type=int, default=80, help="good parts to learn from [80]")
    parser.add_argument("--parts", type=int, default=100, help="parts to inspect [100]")
    parser.add_argument("--size", type=int, default=512, help="of the detector's picture, px [512]")
    parser.add_argument("--out", type=Path, default=OUT, help="folder, emptied first [out/demo]")
    return parser.parse_args()


def settings_of(station_file: Path) -> LineSettings:
    """Return which parts the line makes."""
    line = read_station(station_file).camera.line
    assert line is not None
    return line


@contextmanager
def camera(options: argparse.Namespace, station_file: Path, count: int) -> Iterator[None]:
    """Put the parts of this station before the camera that is wanted; the simulated one is part of the agent."""
    if options.camera != GENICAM:
        yield
        return
    pictures = station_file.with_suffix("") / "pictures"
    with LineCamera(settings_of(station_file), count, pictures) as line_camera:
        station_file.write_text(before_the_camera(station_file.read_text()))
        say("$ " + " ".join(shown(word) for word in line_camera.command))
        yield


def headline(text: str) -> None:
    """Print what comes next."""
    console.print(f"\n[bold]{text}[/]")


def run(command: str, *arguments: object) -> None:
    """Show a command as the user would type it, and run it."""
    words = [command, *(str(argument) for argument in arguments)]
    say("$ " + " ".join(shown(word) for word in words))
    done = subprocess.run([str(BIN / command), *words[1:]], check=False)
    if done.returncode != 0:
        sys.exit(done.returncode)


def shown(path: object) -> str:
    """Return a path as the user would type it."""
    return str(path).replace(f"{Path.cwd()}/", "")


@contextmanager
def broker(port: int) -> Iterator[None]:
    """Run the embedded broker on a free loopback port."""
    process = subprocess.Popen(
        [sys.executable, str(HERE / "broker.py"), str(port)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline().strip() != b"ready":
            sys.exit("the embedded broker did not start")
        yield
    finally:
        process.terminate()
        process.wait(timeout=10)


class Agent:
    """The agent as a process beside us, as systemd would run it; its own summary goes to a file."""

    def __init__(self, station_file: Path, parts: int) -> None:
        self.log_file = station_file.with_name("agent.log")
        self._command = ["taktsight-agent", "run", str(station_file), "--count", str(parts)]
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Agent:
        return self

    def start(self) -> None:
        """Start inspecting."""
        say("$ " + " ".join(shown(word) for word in self._command))
        with self.log_file.open("w") as log:
            self._process = subprocess.Popen(
                [str(BIN / self._command[0]), *self._command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def failed(self) -> bool:
        """Return True if the process ended with an error."""
        return self._process is not None and self._process.poll() not in (None, 0)

    def __exit__(self, *_: object) -> None:
        if self._process is None:
            return
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
        if self.failed():
            say(self.log_file.read_text())


def show_confusion(verdicts: list[dict[str, Any]], settings: LineSettings, parts: int) -> None:
    """Print what each kind of part was in truth against what was said of it."""
    line = SimulatedLine(settings)
    said: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for message in verdicts:
        plan = line.plan(message["trigger"])
        said[plan.kind, _kind(plan)][message["outcome"]] += 1
    table = Table(title="truth against verdict", title_justify="left")
    for heading in ("truth", "parts", "pass", "reject", "no verdict", "as wanted"):
        table.add_column(heading, justify="left" if heading == "truth" else "right")
    for (kind, name), outcomes in sorted(said.items()):
        wanted = outcomes[WANTED.get(kind, "no_verdict")]
        counts = (outcomes.total(), outcomes["pass"], outcomes["reject"], outcomes["no_verdict"])
        table.add_row(name, *(str(count) for count in counts), f"{wanted}/{outcomes.total()}")
    console.print(table)
    escaped = sum(outcomes["pass"] for (kind, _), outcomes in said.items() if kind != "good")
    say(f"{len(verdicts)} verdicts for {parts} triggers; {escaped} parts passed that should not have")


def show_latency(verdicts: list[dict[str, Any]]) -> None:
    """Print latencies per stage, from the messages."""
    stage_ms: dict[str, list[float]] = defaultdict(list)
    for message in verdicts:
        for stage, duration_ms in message["processingTimes"]["stageMs"].items():
            stage_ms[stage].append(duration_ms)
        stage_ms["trigger to verdict"].append(message["latencyMs"])
    console.print(latency_table(stage_ms, "latency"))


def free_port() -> int:
    """Return a TCP port on loopback that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _kind(plan: PartPlan) -> str:
    return f"defective: {plan.defect}" if plan.defect else plan.kind.replace("_", " ")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)
