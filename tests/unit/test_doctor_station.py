"""What the doctor says about a station's recipe, engine, files, folders, outbox and audit trail."""

import os
import sqlite3

import pytest
from recipes import tiny_recipe, write_tiny_recipe

from agent.audit import AuditLog
from agent.doctor.doctor import examine
from agent.doctor.finding import Grade
from agent.doctor.folders import Wanted, disk, file_system, folders, growth, may_write, readable_files, wanted_folders
from agent.doctor.machine import Account, Disk, Machine
from agent.doctor.outbox import audit_trail, outbox, used_by
from agent.doctor.recipe import engine_findings, inference_finding, judging, stored_recipes, thresholds_finding, trust
from agent.engines.engine import EngineSettings
from agent.line.beat import Beat
from agent.outbox.folder import LOCK, locked
from agent.outbox.outbox import Outbox
from agent.recipes.store import ChosenThreshold, RecipeStore
from calibration.signing import make_key, read_signing_key, sign_recipe
from calibration.thresholds import Thresholds
from tests.machines import AGENT, DISK, case_at, grades, machine_at, only

GB = 10**9
ONNX = "engine: {kind: onnxruntime, threads: 1}"


@pytest.fixture
def machine(tmp_path):
    return machine_at(tmp_path / "root")


@pytest.fixture
def signed(tmp_path):
    """Settings with the key that signed tiny.recipe."""
    write_tiny_recipe(tmp_path / "tiny.recipe")
    make_key(tmp_path / "release.key")
    sign_recipe(tmp_path / "tiny.recipe", read_signing_key(tmp_path / "release.key"), 7)
    return f"recipes: {{keys: [release.key.pub]}}\n{ONNX}"


# recipe and engine


def test_a_signed_recipe_on_a_right_engine_is_fine(tmp_path, machine, signed):
    case = case_at(tmp_path, machine, signed)
    found = list(judging(case))
    assert grades(found) == {"recipe": "ok", "engine": "ok", "engine.time": "ok", "recipe.thresholds": "ok"}
    assert "revision 7, signed by" in only(found, "recipe").found
    assert "reproduces the trainer's answers" in only(found, "engine").found
    assert grades(trust(case)) == {"recipe.trust": "ok"}


def test_a_station_that_runs_unsigned_recipes_is_warned(tmp_path, machine):
    write_tiny_recipe(tmp_path / "tiny.recipe")
    case = case_at(tmp_path, machine, ONNX)
    assert grades(trust(case)) == {"recipe.trust": "warn"}
    assert only(judging(case), "recipe").grade is Grade.OK


def test_a_recipe_that_may_not_run_fails_and_no_engine_is_asked(tmp_path, machine, signed):
    write_tiny_recipe(tmp_path / "tiny.recipe")  # nobody signed this one
    (found,) = judging(case_at(tmp_path, machine, signed))
    assert (found.name, found.grade) == ("recipe", Grade.FAIL)
    assert "not signed" in found.found


def test_an_engine_that_answers_otherwise_fails(tmp_path, machine):
    wrong = tiny_recipe(level=0.6).selftest
    (found,) = engine_findings(case_at(tmp_path, machine, ONNX), tiny_recipe(selftest=wrong))
    assert (found.name, found.grade) == ("engine", Grade.FAIL)
    assert "differs from the trainer's answers" in found.found


@pytest.mark.parametrize(
    ("took_ms", "grade"),
    [([59.0] * 19 + [200.0], "ok"), ([61.0] * 20, "warn"), ([99.0], "warn"), ([100.0] * 20, "fail")],
)
def test_the_engine_may_take_60_percent_of_the_deadline(took_ms, grade):
    found = inference_finding(took_ms, Beat(takt_ms=200.0, deadline_ms=100.0))
    assert str(found.grade) == grade
    assert f"longest {max(took_ms):.1f}" in found.found
    assert found.found.endswith("of the deadline")
    within_takt = inference_finding(took_ms, Beat(takt_ms=100.0, deadline_ms=300.0))
    assert (within_takt.grade, within_takt.found) == (found.grade, found.found.replace("deadline", "takt"))


@pytest.mark.parametrize(
    ("fitted_on", "label", "grade"),
    [
        ("torch f32", "openvino f32, 2 threads", "ok"),
        ("openvino f32, 2 threads", "openvino f32, 2 threads", "ok"),
        ("openvino bf16, 2 threads", "openvino f32, 2 threads", "warn"),
        ("torch f32", "openvino bf16, 2 threads", "warn"),
    ],
)
def test_thresholds_belong_to_a_precision(fitted_on, label, grade):
    limits = Thresholds(0.1, 0.2, false_reject_rate=0.01, rate_upper_bound=0.03, n_good=99, fitted_on=fitted_on)
    assert str(thresholds_finding(tiny_recipe(thresholds=limits), label).grade) == grade


def test_recipes_of_the_folder_that_cannot_run_are_named(tmp_path, machine, signed):
    case = case_at(tmp_path, machine, signed)
    folder = tmp_path / "recipes" / "cell7"
    assert grades(stored_recipes(case)) == {"recipe.folder": "ok"}
    folder.mkdir(parents=True)
    (folder / "old.recipe").write_bytes(b"nothing")
    (found,) = stored_recipes(case)
    assert (found.grade, found.found) == (Grade.WARN, "1 of 1 recipes cannot run here: old")


def test_a_choice_that_is_not_used_is_warned_of(tmp_path, machine, signed):
    case = case_at(tmp_path, machine, signed)
    trust_of = case.station.recipes.trust
    store = RecipeStore(case.station.recipes.folder, trust_of, tmp_path / "before.recipe")
    store.choose_threshold(ChosenThreshold("d" * 64, 0.125))
    found = only(judging(case), "recipe.choice")
    assert found.grade is Grade.WARN
    assert f"threshold 0.125, chosen in place of {tmp_path / 'before.recipe'}" in found.found
    RecipeStore(case.station.recipes.folder, trust_of, tmp_path / "tiny.recipe").choose_threshold(None)
    assert "recipe.choice" not in grades(judging(case))


# files and folders


def test_files_that_the_agent_cannot_read_are_named(tmp_path, signed):
    hidden = tmp_path / "tiny.recipe"
    case = case_at(tmp_path, machine_at(tmp_path / "root", may=lambda who, path, mode: path != hidden), signed)
    (found,) = readable_files(case)
    assert found.grade is Grade.FAIL
    assert found.found == f"{hidden}: not readable for taktsight"
    assert grades(readable_files(case_at(tmp_path, machine_at(tmp_path / "root"), signed))) == {"files": "ok"}


def test_what_systemd_hands_over_is_not_asked_of_the_files(tmp_path, signed):
    machine = machine_at(
        tmp_path, {"run/credentials/u/mqtt.key": "k"}, may=lambda who, path, mode: "mqtt" not in path.name
    )
    key = tmp_path / "run/credentials/u/mqtt.key"
    mqtt = f"mqtt: {{topic: a, username: u, password_file: {key}}}"
    assert grades(readable_files(case_at(tmp_path, machine, f"{signed}\n{mqtt}"))) == {"files": "ok"}


def test_who_may_not_know_what_the_agent_may_do_is_told_to_ask_as_root(tmp_path, signed):
    facts = "LoadState=loaded\nUser=taktsight"
    machine = machine_at(tmp_path, user=Account("bob", 1000, 1000), run=lambda command: facts)
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    for name in ("release.key.pub", "tiny.recipe"):
        (tmp_path / "etc/taktsight" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).rename(tmp_path / "etc/taktsight" / name)
    case = case_at(tmp_path, machine, signed, file=tmp_path / "etc/taktsight/cell7.yaml")
    (found,) = readable_files(case)
    assert found.grade is Grade.WARN
    assert "agent runs as taktsight, the doctor was asked as bob" in found.found
    assert set(grades(folders(case))) == {"outbox.disk"}


def test_the_folders_are_those_that_the_settings_ask_for(tmp_path, machine):
    case = case_at(tmp_path, machine)
    assert [(folder.name, folder.most_mb) for folder in wanted_folders(case)] == [("outbox", 0)]
    more = "mqtt: {topic: a}\narchive: {folder: archive, max_mb: 5}\ncommands: {allow: [recipe, capture]}"
    wanted = {folder.name: folder for folder in wanted_folders(case_at(tmp_path, machine, more))}
    assert list(wanted) == ["outbox", "archive", "recipes", "captures"]
    assert wanted["outbox"].most_mb == 2048 + 64 + 8
    assert wanted["outbox"].reserve_mb == 8
    assert wanted["archive"].most_mb == 5


def outbox_at(path, **fields):
    return Wanted(**{"name": "outbox", "path": path, "most_mb": 100.0, "reserve_mb": 8.0, "must_last": True, **fields})


def test_a_folder_must_be_one_that_the_agent_may_write(tmp_path):
    def finding(path, **answers):
        case = case_at(tmp_path, machine_at(tmp_path / "root", **answers))
        return may_write(case, outbox_at(path), AGENT)

    assert finding(tmp_path).grade is Grade.OK
    assert "the agent makes it" in finding(tmp_path / "not" / "yet").found
    assert "taktsight may not write there" in finding(tmp_path, may=lambda who, path, mode: mode != "w").found
    assert finding(tmp_path, may=lambda who, path, mode: mode != "x").grade is Grade.FAIL
    read_only = Disk(100 * GB, 10**6, is_read_only=True)
    found = finding(tmp_path, may=lambda who, path, mode: mode != "w", disk_of=lambda path: read_only)
    assert "read-only" in found.found
    (tmp_path / "file").write_text("")
    assert finding(tmp_path / "file").grade is Grade.FAIL


def test_a_folder_outside_of_what_the_unit_may_write_fails(tmp_path):
    facts = {"LoadState": "loaded", "ProtectSystem": "strict", "StateDirectory": "taktsight/cell7", "User": "taktsight"}

    def finding(path, **more):
        said = "\n".join(f"{key}={value}" for key, value in {**facts, **more}.items())
        (tmp_path / "run/systemd/system").mkdir(parents=True, exist_ok=True)
        case = case_at(
            tmp_path, machine_at(tmp_path, run=lambda command: said), file=tmp_path / "etc/taktsight/cell7.yaml"
        )
        path.mkdir(parents=True, exist_ok=True)
        return may_write(case, outbox_at(path), AGENT)

    assert finding(tmp_path / "var/lib/taktsight/cell7/outbox").grade is Grade.OK
    found = finding(tmp_path / "var/lib/taktsight/cell8/outbox")
    assert found.grade is Grade.FAIL
    assert "outside of what taktsight-agent@cell7.service may write" in found.found
    assert finding(tmp_path / "data", ReadWritePaths=f"-{tmp_path}/data").grade is Grade.OK
    assert finding(tmp_path / "data", ProtectSystem="full").grade is Grade.OK


def mounted(tmp_path, kind, at=None):
    return {
        "proc/self/mountinfo": "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        f"30 22 0:5 / {str(at or tmp_path).replace(' ', chr(92) + '040')} rw - {kind} none rw"
    }


@pytest.mark.parametrize(
    ("kind", "found", "fields", "grade", "text"),
    [
        ("ext4", DISK, {}, "ok", "ext4, 100000 MB free"),
        ("ext4", Disk(7 * 10**6, None, False), {}, "fail", "7 MB free"),
        ("ext4", Disk(99 * 10**6, None, False), {}, "warn", "99 MB free"),
        ("ext4", Disk(GB, 999, False), {}, "warn", "room for 999 files"),
        ("tmpfs", DISK, {}, "warn", "tmpfs"),
        ("nfs4", DISK, {}, "warn", "nfs4"),
        ("tmpfs", DISK, {"must_last": False}, "ok", "tmpfs"),
    ],
)
def test_a_disk_lasts_and_has_room(tmp_path, *, kind, found, fields, grade, text):
    machine = machine_at(tmp_path / "root", mounted(tmp_path, kind), disk_of=lambda path: found)
    (finding,) = disk(machine, outbox_at(tmp_path / "not" / "yet", **fields))
    assert str(finding.grade) == grade
    assert text in finding.found


def test_what_is_used_already_counts_as_room(tmp_path):
    (tmp_path / "heatmaps").mkdir()
    (tmp_path / "heatmaps" / "1.jpg").write_bytes(bytes(2_000_000))
    machine = machine_at(tmp_path / "root", disk_of=lambda path: Disk(98_000_000, None, False))
    (finding,) = disk(machine, outbox_at(tmp_path))
    assert (finding.grade, finding.found) == (Grade.OK, "?, 98 MB free, 2 MB used")


@pytest.mark.parametrize(
    ("free_gb", "keep_days", "grade", "text"),
    [  # at 10 Hz, 1.34 GB a day
        (122, 0, "ok", "full in 91 days"),
        (119, 0, "warn", "grow by up to 1339 MB a day: the disk is full in 89 days"),
        (11, 7, "ok", "take up to 10714 MB"),
        (10, 7, "warn", "take up to 10714 MB, 10000 MB free, 0 MB used"),
        (122, 365, "ok", "full in 91 days"),
    ],
)
def test_verdict_lines_find_room_for_three_months_or_for_as_long_as_they_are_kept(
    tmp_path, *, free_gb, keep_days, grade, text
):
    machine = machine_at(tmp_path / "root", disk_of=lambda path: Disk(free_gb * GB, None, False))
    settings = f"archive: {{folder: archive, keep_days: {keep_days}}}"
    (finding,) = growth(case_at(tmp_path, machine, settings))
    assert str(finding.grade) == grade
    assert text in finding.found


def test_verdict_lines_that_are_there_count_as_room(tmp_path):
    machine = machine_at(tmp_path / "root", disk_of=lambda path: Disk(10 * GB, None, False))
    case = case_at(tmp_path, machine, "archive: {folder: archive, keep_days: 7}")
    (tmp_path / "archive").mkdir()
    with (tmp_path / "archive" / "verdicts-2025-03-04.jsonl").open("wb") as file:
        file.truncate(GB)
    (finding,) = growth(case)
    assert finding.grade is Grade.OK


def test_a_station_without_an_archive_has_no_verdict_lines(tmp_path, machine):
    assert list(growth(case_at(tmp_path, machine))) == []


def test_the_innermost_mount_says_what_kind_of_disk_it_is(tmp_path):
    inner = tmp_path / "with space"
    (inner / "below").mkdir(parents=True)
    machine = machine_at(tmp_path / "root", mounted(tmp_path, "tmpfs", inner))
    assert file_system(machine, inner / "below") == "tmpfs"
    assert file_system(machine, tmp_path) == "ext4"
    assert file_system(machine_at(tmp_path / "bare"), tmp_path) == "?"
    assert file_system(Machine(), tmp_path) != "?"


# outbox and audit trail


@pytest.fixture
def case(tmp_path, machine):
    return case_at(tmp_path, machine, "mqtt: {topic: a, consumers: [mes]}\noutbox: {folder: outbox}")


def fill(case, count, *, acknowledged=0):
    box = Outbox(case.station.outbox, case.station.name)
    box.set_consumers(["mes"])
    box.store([({"station": "cell7", "heatmap": None}, None)] * count)
    box.read(0, count)
    box.acknowledge("mes", acknowledged)
    return box


def test_a_station_without_a_broker_has_no_outbox(tmp_path, machine):
    assert list(outbox(case_at(tmp_path, machine))) == []


def test_an_outbox_that_nothing_was_stored_in_is_fine(case):
    assert grades(outbox(case)) == {"outbox.agent": "ok", "outbox": "ok"}


@pytest.mark.parametrize(("count", "acknowledged", "grade"), [(600, 0, "ok"), (601, 0, "warn"), (601, 1, "ok")])
def test_a_minutes_parts_may_wait(case, count, acknowledged, grade):
    fill(case, count, acknowledged=acknowledged).close()
    found = only(outbox(case), "outbox")
    assert str(found.grade) == grade
    assert f"{count - acknowledged} for mes" in found.found


def test_an_outbox_in_use_is_read_and_who_uses_it_is_told(case, tmp_path):
    box = fill(case, 3)
    folder = case.station.outbox.folder
    lock = (folder / LOCK).stat()
    device = f"{os.major(lock.st_dev):02x}:{os.minor(lock.st_dev):02x}"
    machine_at(tmp_path / "root", {"proc/locks": f"1: FLOCK  ADVISORY  WRITE 4711 {device}:{lock.st_ino} 0 EOF"})
    found = list(outbox(case))
    assert only(found, "outbox.agent").found == "an agent runs: process 4711"
    assert "3 for mes" in only(found, "outbox").found
    box.close()


def test_the_real_kernel_names_the_process_that_holds_the_outbox(case):
    box = fill(case, 1)
    assert used_by(Machine(), case.station.outbox.folder) == os.getpid()
    box.close()
    assert used_by(Machine(), case.station.outbox.folder) is None


def test_looking_holds_up_no_agent_and_changes_nothing(case):
    fill(case, 3).close()
    folder = case.station.outbox.folder

    def contents():
        files = [path for path in folder.iterdir() if path.is_file()]
        return {path.name: path.read_bytes() for path in files if not path.name.endswith(("-wal", "-shm"))}

    before, looking = contents(), outbox(case)
    next(looking)
    os.close(locked(folder))  # an agent could start at this moment
    list(looking)
    assert contents() == before


def test_quarantine_and_databases_set_aside_warn(case):
    box = fill(case, 3)
    box.quarantine(2, "the broker refuses it")
    box.close()
    (case.station.outbox.folder / "damaged-20261122T120000Z").mkdir()
    found = list(outbox(case))
    assert grades(found) == {
        "outbox.agent": "ok",
        "outbox": "ok",
        "outbox.quarantine": "warn",
        "outbox.damaged": "warn",
    }
    assert only(found, "outbox.quarantine").found.startswith("1 messages")


def test_a_database_that_cannot_be_read_fails(case):
    fill(case, 3).close()
    file = case.station.outbox.folder / "outbox.db"
    file.write_bytes(b"no database" * 1000)
    assert only(outbox(case), "outbox").grade is Grade.FAIL
    file.unlink()
    sqlite3.connect(file).close()
    file.touch()
    assert only(outbox(case), "outbox").grade is Grade.FAIL


def test_the_account_of_changes_is_whole_or_fails(case):
    (found,) = audit_trail(case)
    assert (found.grade, found.found) == (Grade.OK, "no line yet")
    trail = AuditLog(case.station.outbox.folder)
    for number in range(3):
        trail.append("test", new=number)
    (found,) = audit_trail(case)
    assert found.grade is Grade.OK
    assert found.found.startswith("3 lines, an unbroken chain")
    with trail.path.open("ab") as file:
        file.write(b'{"utc": "2026')
    assert grades(audit_trail(case)) == {"audit": "warn"}
    trail.path.write_bytes(trail.path.read_bytes().replace(b'"new": 1', b'"new": 9'))
    assert grades(audit_trail(case)) == {"audit": "fail"}


def test_a_whole_station_is_looked_over(tmp_path, signed):
    machine = machine_at(tmp_path / "root")
    case = case_at(tmp_path, machine, signed)
    assert case.station.engine == EngineSettings("onnxruntime", "f32", 1, cache=tmp_path / "engines" / "cell7")
    found = grades(examine(case.file, machine))
    assert "fail" not in found.values()
    assert {"station", "recipe", "engine.time", "outbox.disk", "audit", "broker", "clock", "python"} <= set(found)
