"""taktsight-agent: the line side."""

from __future__ import annotations

import faulthandler
import resource
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from agent.between.stations import Stations
from agent.cameras.command import camera_commands
from agent.capture import PartCapture, awaited, beat_of, read_station_without_recipe
from agent.config import Station, read_station, read_stations
from agent.doctor.command import doctor_command
from agent.engines.command import compile_command, selftest_command
from agent.engines.engine import KINDS, TOLERANCES, EngineSettings, open_engine
from agent.errors import CameraError, StorageError
from agent.health.top import top_command
from agent.install.command import install_command, uninstall_command
from agent.journal import log_to_journal
from agent.line.inspection import Inspection
from agent.line.pipeline import Pipeline
from agent.line.tally import KEPT_LATENCIES, Tally
from agent.mqtt.client import MqttSettings
from agent.notify import supervisor
from agent.outbox.command import show_commands, show_outbox
from agent.publishing.verdict_files import verdict_files
from agent.recipes.command import audit_command, recipes_commands
from agent.replay import part_score, replay, replay_items, write_heatmap
from agent.shift.report import write_shift_report
from agent.verdict import Verdict
from agent.watch import watch
from calibration.console import EXIT_CODES, console, latency_table, note, progress_bars, run_command, say
from calibration.errors import InputError
from calibration.options import Finite
from calibration.photometric import PHOTOMETRIC_FILE, write_photometric
from calibration.recipe import read_recipe
from calibration.recording import RecordingWriter
from calibration.scores import PartScore, Scores, write_scores


class InOrder(click.Group):
    """Lists its commands by what people do first, not by the alphabet; those not named here come last."""

    ORDER = (
        *("run", "install", "uninstall", "doctor", "top", "watch", "report"),
        *("capture", "replay", "camera", "recipes", "compile", "selftest", "outbox", "commands", "audit"),
    )

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in this order."""
        known = [name for name in self.ORDER if name in self.commands]
        return known + sorted(set(super().list_commands(ctx)) - set(known))


@click.group(cls=InOrder, epilog=f"Example: taktsight-agent run station.yaml\n\n{EXIT_CODES}")
@click.version_option(package_name="taktsight")
def commands() -> None:
    """One trigger, one verdict, within the takt."""


@commands.command(
    "run", short_help="Inspect parts as STATION says.", epilog="Example: taktsight-agent run station.yaml --count 100"
)
@click.argument("station", type=click.Path(path_type=Path))
@click.option("--count", type=click.IntRange(min=1), help="Stop after so many triggers; else run until stopped.")
def run_command_line(station: Path, count: int | None) -> None:
    """Inspect parts as STATION (a .yaml file) says, until SIGTERM or Ctrl-C; open triggers get their verdict first.

    A file with several cameras is one station for each, in a process of its own; STATION/NAME is one of them alone.
    """
    if several := read_stations(station):
        sys.exit(_run_several(station, several, count))
    settings = read_station(station)
    log_to_journal(station=settings.name)
    service = supervisor()
    if service.is_there:
        faulthandler.enable()  # the watchdog's SIGABRT shows where every thread hung
    service.status("loading the recipe and proving the engine")
    inspection = Inspection(station, settings, service)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: inspection.stop())
    origin = inspection.origin
    say(f"{settings.name}: {origin.recipe} on {origin.engine}, every {settings.beat.takt_ms:g} ms")
    tally, ended = inspection.run(count)
    undelivered = ended.undelivered
    _print_tally(tally)
    if undelivered.verdicts or undelivered.heatmaps:
        note(
            f"{undelivered.verdicts} verdicts and {undelivered.heatmaps} heatmaps wait in the outbox and go out when "
            f"the station runs again: {settings.outbox.folder}"
        )
    if ended.lost:
        raise StorageError(
            f"{ended.lost} verdicts could not be stored and are lost: see the alarms above, free the disk"
        )
    if settings.archive is not None and service.watchdog_s is None:  # a service ends quickly, also after a year
        _report(settings, settings.archive.folder, f"{settings.name}: {inspection.origin.recipe}")


def _report(settings: Station, archive: Path, title: str) -> None:
    """Write the report of all parts in the archive, if there are any; one that cannot be written is a note."""
    try:
        if verdict_files(archive):
            write_shift_report(archive, archive / "report.html", title=title, deadline_ms=settings.beat.deadline_ms)
            say(f"report: {archive / 'report.html'}")
    except (InputError, OSError) as error:
        note(f"no report: {error}")


def _run_several(file: Path, stations: Mapping[str, Station], count: int | None) -> int:
    """Run a station for each camera, and return the exit code."""
    log_to_journal(station=file.stem)
    parent = Stations({name: file / name for name in stations}, supervisor(), count=count)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: parent.stop())
    say(f"{file.name}: {len(stations)} cameras: {', '.join(station.name for station in stations.values())}")
    return parent.run()


@commands.command(
    "replay",
    short_help="Inspect images as the line would.",
    epilog="Example: taktsight-agent replay flange.recipe images/test --scores flange.scores",
)
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("images", type=click.Path(path_type=Path))
@click.option(
    "--scores", type=click.Path(path_type=Path), help="Write scores here, for taktsight-calibration threshold."
)
@click.option("--heatmaps", type=click.Path(path_type=Path), help="Write one picture per part into this folder.")
@click.option(
    "--engine", type=click.Choice(["auto", *KINDS]), default="auto", show_default=True, help="As engine.kind."
)
@click.option(
    "--precision", type=click.Choice(list(TOLERANCES)), default="f32", show_default=True, help="As engine.precision."
)
@click.option("--threads", type=click.IntRange(1, 256), default=2, show_default=True, help="Of one inference.")
def replay_command(  # noqa: PLR0917 one parameter per option
    recipe: Path,
    images: Path,
    scores: Path | None,
    heatmaps: Path | None,
    engine: str,
    precision: str,
    threads: int,
) -> None:
    """Inspect IMAGES (a folder, folders by label such as test/, or a recording) exactly as the line would."""
    loaded = read_recipe(recipe)
    opened = open_engine(loaded, EngineSettings(engine, precision, threads))
    items, photometric = replay_items(images)
    parts: list[PartScore] = []
    stage_ms: dict[str, list[float]] = defaultdict(list)
    with progress_bars() as progress:
        for item, verdict in replay(items, Pipeline(loaded, opened, photometric), loaded.view, progress):
            parts.append(part_score(item, verdict))
            _note_stages(stage_ms, verdict)
            if heatmaps is not None:
                write_heatmap(heatmaps, item, verdict, loaded.thresholds.map)
    if scores is not None:
        write_scores(scores, Scores(loaded.detector_digest, opened.label, tuple(parts)))
        say(f"scores: {scores}")
    console.print(_outcome_table(parts))
    console.print(latency_table(stage_ms, f"{opened.label}, one image at a time"))
    for reason, number in Counter(part.reason for part in parts if part.score is None).items():
        note(f"{number} part{'s' if number > 1 else ''} without verdict: {reason}")


@commands.command(
    "capture",
    short_help="Record parts from the camera.",
    epilog="Example: taktsight-agent capture station.yaml good-parts/ --count 60",
)
@click.argument("station", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--count", type=click.IntRange(min=1), default=60, show_default=True, help="Parts to record.")
def capture_command(station: Path, out: Path, count: int) -> None:
    """Record parts of STATION into OUT as `run` takes them: lossless, with one line of metadata per frame.

    A part comes every takt_ms, with the signal that `trigger` names, or with the camera's own trigger; one whose frame
    is lost does not count. Ctrl-C ends with what was recorded. STATION needs no recipe yet.
    """
    settings = read_station_without_recipe(station)
    beat = beat_of(settings)
    writer = RecordingWriter(out)
    if not settings.photometric.is_identity:
        write_photometric(out / PHOTOMETRIC_FILE, settings.photometric)
    with progress_bars() as progress:
        capture = PartCapture(
            settings.camera.open(), beat, writer.append, awaited=awaited(settings), tell=note, progress=progress
        )
        captured = capture.run(count)
    if captured.lost:
        note(f"{captured.lost} of {captured.recorded + captured.lost} triggers brought no frame")
    if captured.recorded < count:
        why = "stopped by Ctrl-C" if captured.was_interrupted else "the camera has no more frames"
        note(f"{captured.recorded} of {count} parts recorded: {why}")
        if not captured.recorded and not captured.was_interrupted:
            raise CameraError("no frame could be read: see the notes above")
    say(f"recording: {out}")


@commands.command(
    "watch",
    short_help="Show verdicts as they come over MQTT.",
    epilog="Example: taktsight-agent watch acme/plant1/assembly/line3/cell1 --port 1883",
)
@click.argument("topic")
@click.option("--host", default="127.0.0.1", show_default=True, help="The MQTT broker.")
@click.option("--port", type=click.IntRange(1, 65535), default=1883, show_default=True, help="Of the broker.")
@click.option("--protocol", type=click.Choice(["5", "3"]), default="5", show_default=True, help="3 is MQTT 3.1.1.")
@click.option("--username", help="At the broker; needs --password-file.")
@click.option("--password-file", type=click.Path(path_type=Path), help="Its first line is the password.")
@click.option("--ca-file", type=click.Path(path_type=Path), help="Given: TLS.")
@click.option("--cert-file", type=click.Path(path_type=Path), help="With --key-file: show this certificate.")
@click.option("--key-file", type=click.Path(path_type=Path), help="Private key of --cert-file.")
@click.option("--take-waiting", is_flag=True, help="Also show what waits for a first subscriber: nobody else gets it.")
@click.option("--count", type=click.IntRange(min=1), help="Stop after so many verdicts.")
@click.option("--timeout", type=Finite(min=0), help="Stop after so many seconds.")
def watch_command(
    topic: str, protocol: str, take_waiting: bool, count: int | None, timeout: float | None, **connection: Any
) -> None:
    """Show the verdicts of the station at TOPIC as they come over MQTT; to keep them, see taktsight-subscribe."""
    settings = MqttSettings(topic=topic, protocol=int(protocol), **connection)
    watch(settings, count=count, timeout_s=timeout, console=console, take_waiting=take_waiting)


@commands.command(
    "report",
    short_help="Make a page of what a station archived.",
    epilog="Example: taktsight-agent report archive/ --out shift.html",
)
@click.argument("archive", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="HTML file to write.")
def report_command(archive: Path, out: Path) -> None:
    """Make a page of what a station archived: verdicts, causes, latencies, pictures."""
    summary = write_shift_report(archive, out)
    say(f"{summary.parts} parts; report: {out}")


@commands.command(
    "outbox",
    short_help="Show or export what waits for consumers.",
    epilog="Example: taktsight-agent outbox station.yaml --export waiting.jsonl",
)
@click.argument("station", type=click.Path(path_type=Path))
@click.option("--export", type=click.Path(path_type=Path), help="Write the messages here, one JSON object per line.")
@click.option("--discard", "discard_rest", is_flag=True, help="Then delete quarantine and damaged databases.")
def outbox_command(station: Path, export: Path | None, discard_rest: bool) -> None:
    """Show what STATION keeps for its consumers; beside a running agent, how much waits for whom."""
    if discard_rest and export is None:
        raise click.UsageError("--discard needs --export FILE: nothing is deleted that nobody has")
    show_outbox(read_station(station), export, discard_rest=discard_rest)


@commands.command(
    "commands",
    short_help="Show who commanded what over MQTT.",
    epilog="Example: taktsight-agent commands station.yaml --last 20",
)
@click.argument("station", type=click.Path(path_type=Path))
@click.option("--last", type=click.IntRange(min=1), default=50, show_default=True, help="So many of the newest.")
def commands_command(station: Path, last: int) -> None:
    """Show who commanded what of STATION over MQTT, and what came of it."""
    show_commands(read_station(station), last)


commands.add_command(camera_commands)
commands.add_command(doctor_command)
commands.add_command(recipes_commands)
commands.add_command(top_command)
commands.add_command(install_command)
commands.add_command(uninstall_command)
commands.add_command(audit_command)
commands.add_command(compile_command)
commands.add_command(selftest_command)


def main() -> None:
    """Entry point of the console script."""
    run_command(commands, "taktsight-agent")


def _note_stages(stage_ms: dict[str, list[float]], verdict: Verdict) -> None:
    for stage, duration_ms in verdict.stage_ms.items():
        stage_ms[stage].append(duration_ms)
    stage_ms["all stages"].append(sum(verdict.stage_ms.values()))


def _outcome_table(parts: list[PartScore]) -> Table:
    table = Table(title="verdicts", title_justify="left")
    for heading in ("folder", "parts", "pass", "reject", "no verdict"):
        table.add_column(heading, justify="left" if heading == "folder" else "right")
    for label in sorted({part.label for part in parts}):
        outcomes = Counter(part.outcome for part in parts if part.label == label)
        counts = (sum(outcomes.values()), outcomes["pass"], outcomes["reject"], outcomes["no_verdict"])
        table.add_row(label or "-", *(str(count) for count in counts))
    return table


def _print_tally(tally: Tally) -> None:
    """Print outcomes, reasons, what was counted beside them, and latencies."""
    console.print(
        f"{tally.triggers} triggers, {tally.verdicts} verdicts: "
        + ", ".join(f"{number} {outcome}" for outcome, number in sorted(tally.outcomes.items()))
    )
    for reason, number in sorted(tally.reasons.items()):
        if reason != "score":
            say(f"  no verdict, {reason}: {number}")
    for what, number in (
        ("parts without a verdict: they went by unseen", tally.parts_unseen),
        ("results after their deadline", tally.late_results),
        ("stale frames", tally.stale_frames),
        ("verdicts without pictures", tally.shed_pictures),
        ("verdicts not delivered", tally.delivery_faults),
    ):
        if number:
            say(f"  {what}: {number}")
    stage_ms = {stage: list(values) for stage, values in tally.stage_ms.items()}
    console.print(latency_table(stage_ms, f"latency, last {KEPT_LATENCIES:,} parts at most"))
    say(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
