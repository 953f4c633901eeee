"""Installing twice changes nothing, what a person wrote is kept, and nothing of ours is left behind."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import json
import os
import stat
import tomllib
from pathlib import Path, PurePosixPath

import pytest
from click.testing import CliRunner

from agent.config import read_station
from agent.errors import StorageError
from agent.install import command as command_module
from agent.install.command import install_command, uninstall_command
from agent.install.install import DROP_INS, FOLDERS, HIDDEN, SHARED, UNITS, Installer, Wish, shipped
from agent.install.steps import RECORD, Machine, Step, command, read_record
from agent.outbox.outbox import Outbox, OutboxSettings
from calibration.errors import TaktsightError
from calibration.signing import make_key

PROJECT = Path(__file__).parents[2]
LINK = UNITS / "multi-user.target.wants/taktsight-agent@cell7.service"
UNIT = UNITS / "taktsight-agent@.service"
OWN = UNITS / "taktsight-agent@cell7.service.d"
SETTINGS, KEY = Path("/etc/taktsight/cell7.yaml"), Path("/etc/taktsight/credentials/cell7.key")
STATE = Path("/var/lib/taktsight/cell7")
FAKE = """#!/bin/sh
echo "$(basename "$0") $*" >> {calls}
case "$*" in {failing}) echo "it is not so" >&2; exit 1;; esac
"""


class Image:
    """The image of a machine in a folder, on which the commands are run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()

    def run(self, command, *arguments: str) -> str:
        done = CliRunner().invoke(command, [*arguments, "--root", str(self.root)])
        if isinstance(done.exception, Exception):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done.stdout

    def install(self, *arguments: str, station: str = "cell7") -> str:
        return self.run(install_command, station, *arguments)

    def uninstall(self, *arguments: str, station: str = "cell7") -> str:
        return self.run(uninstall_command, station, *arguments)

    def path(self, path: Path | str) -> Path:
        return self.root / Path(path).relative_to("/")

    def write(self, path: Path, text: str) -> None:
        self.path(path).parent.mkdir(parents=True, exist_ok=True)
        self.path(path).write_text(text)

    def files(self) -> dict[str, str]:
        """Return what lies there: text of files, targets of links."""
        return {
            f"/{path.relative_to(self.root)}": f"-> {path.readlink()}" if path.is_symlink() else path.read_text()
            for path in sorted(self.root.rglob("*"))
            if path.is_symlink() or path.is_file()
        }


@pytest.fixture
def image(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))  # no systemd here
    return Image(tmp_path / "image")


@pytest.fixture
def booted(tmp_path, image):
    """Returns a function that makes a machine as it is when it runs; its commands only write down how they were run."""

    def boot(failing: str = "nothing") -> tuple[Machine, Path]:
        calls = tmp_path / "calls"
        for name in ("systemctl", "systemd-sysusers", "systemd-tmpfiles", "userdel"):
            program = tmp_path / "bin" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(FAKE.format(calls=calls, failing=failing).replace("basename", "/usr/bin/basename"))
            program.chmod(0o755)
        machine = Machine(image.root)
        machine.is_live = True
        return machine, calls

    return boot


def prefix(folder: Path) -> Path:
    """Return an environment that looks as if the agent were in it."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "taktsight-agent").touch()
    return folder


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def done(steps: list[Step]) -> list[str]:
    for step in steps:
        step.do()
    return [step.told for step in steps]


def test_a_dry_run_tells_the_steps_and_does_none(image):
    told = image.install("--camera", "gige", "--dry-run").splitlines()
    assert image.files() == {}
    assert told[-1] == "note: a dry run: nothing was changed"
    assert image.install("--camera", "gige").splitlines() == told[:-1]
    told = image.uninstall("--purge", "--dry-run").splitlines()
    before = image.files()
    assert image.uninstall("--purge").splitlines() == told[:-1]
    assert before[str(SETTINGS)]


def test_what_is_installed_is_what_was_shipped(image):
    image.install("--camera", "usb3", "--gpu", "nvidia", "--realtime")
    for name, path in SHARED.items():
        assert image.path(path).read_text() == (PROJECT / "systemd" / name).read_text()
    for name in ("usb3-vision.conf", "nvidia.conf", "realtime.conf"):
        assert image.path(OWN / name).read_text() == (PROJECT / "systemd" / "drop-ins" / name).read_text()
    assert image.path(LINK).readlink() == UNIT
    assert mode(image.path(UNIT)) == 0o644


def test_settings_are_an_example_that_the_agent_reads_under_the_stations_own_name(image):
    image.install(station="press-2")
    path = image.path("/etc/taktsight/press-2.yaml")
    assert mode(path) == 0o640
    make_key(path.parent / "release.key")
    station = read_station(path)
    assert station.name == "press-2"
    assert station.outbox.folder == Path("/var/lib/taktsight/press-2/outbox")
    assert "cell7" not in path.read_text()


def test_folders_are_closed_as_the_units_own_list_has_it(image):
    image.install()
    listed = [line.split() for line in shipped("taktsight.tmpfiles").splitlines() if line.startswith("d ")]
    assert {Path(path): int(bits, 8) for _, path, bits, *_ in listed} == FOLDERS
    assert all(mode(image.path(path)) == bits for path, bits in FOLDERS.items())


def test_installing_again_changes_nothing(image):
    image.install("--camera", "gige")
    before = image.files()
    told = image.install("--camera", "gige")
    assert image.files() == before
    assert not [line for line in told.splitlines() if line.startswith(("write", "remove", "folder"))]


def test_what_the_user_wrote_is_kept_and_told(image):
    image.write(SETTINGS, "station: mine\n")
    assert f"keep    {SETTINGS}: yours" in image.install()
    assert image.path(SETTINGS).read_text() == "station: mine\n"


def test_a_file_that_was_changed_by_hand_is_kept_but_an_older_one_of_ours_is_replaced(image):
    image.install("--camera", "gige", "--realtime")
    mine, older = image.path(OWN / "realtime.conf"), image.path(UNIT)
    mine.write_text(mine.read_text().replace("CPUAffinity=2 3", "CPUAffinity=6 7"))
    older.write_text("what an older version wrote\n")
    assert f"keep    {UNIT}: changed by hand" in image.install()  # nobody noted that it was ours
    record = json.loads(image.path(RECORD).read_text())
    record["files"][str(UNIT)] = hashlib.sha256(older.read_bytes()).hexdigest()
    image.path(RECORD).write_text(json.dumps(record))
    told = image.install()
    assert f"write   {UNIT} " in told
    assert older.read_text() == shipped(UNIT.name)
    assert f"keep    {OWN / 'realtime.conf'}: changed by hand" in told
    assert "CPUAffinity=6 7" in mine.read_text()


def test_what_is_not_named_stays_and_what_is_named_takes_the_place_of_its_kind(image):
    image.install("--camera", "gige", "--realtime")
    image.write(OWN / "own.conf", "[Service]\nWatchdogSec=20s\n")

    def there() -> set[str]:
        return {path.name for path in image.path(OWN).iterdir()}

    image.install()
    assert there() == {"gige.conf", "realtime.conf", "own.conf"}
    image.install("--camera", "usb3")
    assert there() == {"usb3-vision.conf", "realtime.conf", "own.conf"}
    image.install("--camera", "none", "--no-realtime", "--gpu", "nvidia")
    assert there() == {"nvidia.conf", "own.conf"}


def test_every_drop_in_can_be_wished_for():
    wished = Wish("gige", "nvidia", True).drop_ins() | Wish("none", "none", False).drop_ins()
    assert set(wished) == set(DROP_INS) == {path.name for path in (PROJECT / "systemd" / "drop-ins").iterdir()}


def test_uninstalling_keeps_settings_keys_and_what_the_station_wrote(image):
    image.install("--camera", "gige")
    kept = {SETTINGS: image.path(SETTINGS).read_text(), KEY: "key", STATE / "archive/verdicts.jsonl": "{}\n"}
    for path, text in kept.items():
        image.write(path, text)
    image.uninstall()
    assert image.files() == {str(path): text for path, text in kept.items()}
    assert not image.path(OWN).exists()


def test_uninstalling_keeps_what_was_changed_by_hand(image):
    image.install("--realtime")
    image.write(OWN / "realtime.conf", "[Service]\nCPUAffinity=6 7\n")
    assert f"keep    {OWN / 'realtime.conf'}: changed by hand" in image.uninstall()
    assert image.path(OWN / "realtime.conf").exists()
    assert not image.path(UNIT).exists()


def test_shared_files_go_with_the_last_station(image):
    image.install()
    image.install(station="cell8")
    image.uninstall()
    assert image.path(UNIT).exists()
    assert not os.path.lexists(image.path(LINK))
    image.uninstall(station="cell8")
    assert not [path for path in image.files() if "systemd" in path or path.endswith(".conf")]


def test_a_purge_leaves_nothing_of_the_last_station(image):
    image.install("--camera", "gige", "--realtime")
    for path in (KEY, STATE / "archive/verdicts.jsonl", Path("/var/cache/taktsight/cell7/model.blob")):
        image.write(path, "x")
    image.write(Path("/etc/other"), "not ours")
    image.uninstall("--purge")
    assert image.files() == {"/etc/other": "not ours"}
    assert not image.path("/var/lib/taktsight").exists()


def test_a_purge_leaves_the_other_station_alone(image):
    for name in ("cell7", "cell8"):
        image.install(station=name)
        image.write(Path(f"/etc/taktsight/credentials/{name}.key"), name)
        image.write(Path(f"/etc/taktsight/certificates/{name}.crt"), name)
        image.write(Path(f"/var/lib/taktsight/{name}/archive/verdicts.jsonl"), name)
    image.uninstall("--purge")
    left = image.files()
    assert not [path for path in left if "cell7" in path]
    assert {"/etc/taktsight/cell8.yaml", "/etc/taktsight/credentials/cell8.key"} <= set(left)
    assert left["/var/lib/taktsight/cell8/archive/verdicts.jsonl"] == "cell8"


@pytest.mark.parametrize("link", [STATE, STATE / "out"])
def test_a_link_is_deleted_and_not_followed(image, link):
    image.install()
    image.write(Path("/srv/kept"), "not ours")
    image.path(link).parent.mkdir(parents=True)
    image.path(link).symlink_to("../" * len(link.parts[2:]) + "srv")
    image.uninstall("--purge")
    assert image.files() == {"/srv/kept": "not ours"}


@pytest.mark.parametrize("outbox", ["outbox", "outbox/top"])
def test_a_purge_deletes_no_verdict_that_was_not_delivered(image, outbox):
    image.install()
    with contextlib.closing(Outbox(OutboxSettings(image.path(STATE / outbox), reserve_mb=0), "cell7")) as box:
        box.store([({"schema": "taktsight.verdict/1", "station": "cell7", "heatmap": None}, None)])
        with pytest.raises(StorageError):  # in use: an agent runs there
            image.uninstall("--purge")
    with pytest.raises(TaktsightError, match=r"1 messages wait .*--export FILE"):
        image.uninstall("--purge")
    assert image.path(SETTINGS).exists()
    image.uninstall("--purge", "--discard")
    assert image.files() == {}


def test_a_station_that_was_never_installed_cannot_be_uninstalled(image):
    image.install()
    with pytest.raises(TaktsightError, match=r"no such station was installed; found: cell7"):
        image.uninstall(station="cell8")


def test_a_purge_deletes_what_a_station_left_that_was_uninstalled_before(image):
    image.install("--camera", "gige")
    image.write(KEY, "key")
    image.write(STATE / "archive/verdicts.jsonl", "{}\n")
    image.uninstall()
    with pytest.raises(TaktsightError, match=r"taken away before.*--purge"):
        image.uninstall()
    assert image.files()
    image.uninstall("--purge")
    assert image.files() == {}
    with pytest.raises(TaktsightError, match="no such station was installed; found: none"):
        image.uninstall("--purge")


def test_a_late_purge_deletes_no_verdict_that_was_not_delivered(image):
    image.install()
    image.uninstall()
    with contextlib.closing(Outbox(OutboxSettings(image.path(STATE / "outbox"), reserve_mb=0), "cell7")) as box:
        box.store([({"schema": "taktsight.verdict/1", "station": "cell7", "heatmap": None}, None)])
    with pytest.raises(TaktsightError, match="1 messages wait"):
        image.uninstall("--purge")
    assert image.path(SETTINGS).exists()
    image.uninstall("--purge", "--discard")
    assert image.files() == {}


@pytest.mark.parametrize("first", ["cell8", "cell7"])
def test_a_purge_leaves_what_another_station_left(image, first):
    for name in ("cell7", "cell8"):
        image.install(station=name)
        image.write(Path(f"/var/lib/taktsight/{name}/archive/verdicts.jsonl"), name)
    image.uninstall(station="cell8")
    if first == "cell7":
        image.uninstall()
    told = image.uninstall("--purge")
    assert "keep    /etc/taktsight, /var/lib/taktsight: cell8" in told
    assert set(image.files()) == {"/etc/taktsight/cell8.yaml", "/var/lib/taktsight/cell8/archive/verdicts.jsonl"}
    image.uninstall("--purge", station="cell8")
    assert image.files() == {}


@pytest.mark.parametrize("name", ["..", ".", "../taktsight", "cell7/outbox"])
def test_a_purge_of_what_is_no_name_deletes_nothing(image, name):
    image.install()
    image.write(STATE / "outbox/last-seq", "7")
    before = image.files()
    with pytest.raises(TaktsightError, match="no such station"):
        image.uninstall("--purge", "--discard", station=name)
    assert image.files() == before


def test_the_debian_packages_own_units_are_left_to_it(image):
    image.install()
    packaged = Path("/usr/lib/systemd/system") / UNIT.name
    image.write(packaged, "the package's")
    assert "the Debian package's" in image.install()
    assert not image.path(UNIT).exists()  # it would have won over the package's
    assert image.path(LINK).readlink() == packaged
    image.uninstall()
    assert image.path(packaged).read_text() == "the package's"


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a b", ".hidden", "-x", "käse", "x" * 64, "a\n", "a%i", "#", "+"])
def test_a_name_that_is_no_file_unit_or_topic_is_refused(image, name):
    with pytest.raises(TaktsightError, match="cannot be the name of a station"):
        Installer(Machine(image.root), read_record(Machine(image.root))).install(name, Wish())


def test_an_environment_elsewhere_stands_in_the_unit(image):
    image.install("--prefix", "/srv/taktsight")
    assert "ExecStart=/srv/taktsight/bin/taktsight-agent run /etc/taktsight/%i.yaml" in image.path(UNIT).read_text()
    assert "/opt/" not in image.path(UNIT).read_text()


@pytest.mark.parametrize("place", [*(f"{folder}/venv" for folder in HIDDEN), "venv"])
def test_an_environment_that_the_service_would_not_see_is_refused(image, place):
    with pytest.raises(TaktsightError, match="the service sees nothing below"):
        image.install("--prefix", place)


def test_on_a_running_machine_systemd_is_told_in_order(booted, tmp_path, monkeypatch):
    monkeypatch.setattr("agent.install.install.HIDDEN", ())  # temporary folders are, in truth
    machine, calls = booted()
    record, environment = read_record(machine), prefix(tmp_path / "venv")
    told = done(Installer(machine, record, environment).install("cell7", Wish(camera="gige")))
    run = calls.read_text().splitlines()
    assert run == [
        "systemd-sysusers taktsight.conf",
        "systemd-tmpfiles --create taktsight.conf",
        "systemctl daemon-reload",
        "systemctl enable taktsight-agent@cell7.service",
    ]
    assert [line.removeprefix("run     ") for line in told if line.startswith("run ")] == run
    assert told.index(f"write   {OWN / 'gige.conf'} (0644)") < told.index("run     systemctl daemon-reload")
    calls.unlink()
    done(Installer(machine, read_record(machine), environment).uninstall("cell7", purge=False))
    assert calls.read_text().splitlines() == [
        "systemctl disable --now taktsight-agent@cell7.service",
        "systemctl daemon-reload",
    ]


def test_a_command_that_fails_ends_it_with_its_own_words_and_is_not_noted_as_installed(booted, tmp_path, monkeypatch):
    monkeypatch.setattr("agent.install.install.HIDDEN", ())
    machine, _ = booted(failing="enable*")
    steps = Installer(machine, read_record(machine), prefix(tmp_path / "venv")).install("cell7", Wish())
    with pytest.raises(TaktsightError, match=r"systemctl enable taktsight-agent@cell7.service: .* 1: it is not so"):
        done(steps)
    assert read_record(machine).stations == []


def test_a_program_that_is_not_there_is_told(image):
    with pytest.raises(TaktsightError, match="needs a machine with systemd"):
        command("systemctl", "daemon-reload").do()


def test_an_environment_without_the_agent_or_with_a_hidden_python_is_refused(booted, tmp_path, monkeypatch):
    monkeypatch.setattr("agent.install.install.HIDDEN", ("/nowhere", str(tmp_path / "home")))
    machine, _ = booted()
    (check, *_) = Installer(machine, read_record(machine), tmp_path / "empty").install("cell7", Wish())
    with pytest.raises(TaktsightError, match=r"taktsight-agent: not found: install the agent there"):
        check.do()
    environment = prefix(tmp_path / "venv")
    (environment / "bin" / "python").symlink_to(tmp_path / "home" / "python3")
    (check, *_) = Installer(machine, read_record(machine), environment).install("cell7", Wish())
    with pytest.raises(TaktsightError, match="system's own Python"):
        check.do()


def test_only_root_installs_on_the_machine_itself(image, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    machine = Machine(image.root)
    machine.is_live = True
    undone = [Step("write", lambda: pytest.fail("it was done"))]
    with pytest.raises(TaktsightError, match="needs root"):
        command_module._carry_out(undone, machine, dry_run=False)
    command_module._carry_out(undone, machine, dry_run=True)


@pytest.mark.parametrize("text", ["", "[]", '{"format": 2}', '{"format": 1, "stations": [], "files": []}'])
def test_a_record_that_is_none_of_ours_is_refused(image, text):
    image.write(RECORD, text)
    with pytest.raises(TaktsightError, match="not a record of format 1"):
        image.install()
    assert set(image.files()) == {str(RECORD)}


def test_an_image_whose_links_lead_out_of_it_is_refused(image, tmp_path):
    (tmp_path / "real").mkdir()
    image.path("/etc").symlink_to(tmp_path / "real")
    with pytest.raises(TaktsightError, match="leads out of"):
        image.install()
    assert list((tmp_path / "real").iterdir()) == []


def test_cpus_that_the_machine_lacks_are_told(monkeypatch, capsys):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    command_module._note_missing_cpus("no-such-station")
    assert "names CPU 3, which this machine lacks" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    command_module._note_missing_cpus("no-such-station")
    assert capsys.readouterr().out == ""


def test_every_file_of_systemd_is_part_of_the_package():
    shown = importlib.resources.files("agent") / "systemd"
    sources = {str(path.relative_to(PROJECT / "systemd")) for path in (PROJECT / "systemd").rglob("*.*")}
    assert all((shown / name).is_file() for name in sources if not name.endswith("drop-ins"))
    globs = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["agent"]
    files = [name for name in sources if (PROJECT / "systemd" / name).is_file()]
    assert len(files) >= 8
    assert [name for name in files if not any(PurePosixPath("systemd", name).match(glob) for glob in globs)] == []
