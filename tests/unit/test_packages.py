"""install.sh and the Debian package's scripts: what they delete is ours, and nobody uses it."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGING = Path(__file__).resolve().parents[2] / "packaging"
MINOR = "{}.{}".format(*sys.version_info)
NOT_OURS = (
    "taktsight-2026-backup",
    "taktsight-1.0-py3.11-notes",
    f"taktsight-0.1.0-py{MINOR}-01234567",
)
STATION = "etc/systemd/system/multi-user.target.wants/taktsight-agent@cell7.service"
KEPT = (STATION, "etc/taktsight/cell7.yaml", "var/lib/taktsight/cell7/outbox/outbox.db")


def lay_bundle(folder: Path, version: str, engine: str = "onnxruntime") -> str:
    """Fill a folder with all that install.sh looks at; return the name of its environment."""
    (folder / "wheels").mkdir(parents=True)
    texts = {"VERSION": f"{version}\n", "PYTHONS": f"{MINOR}\n", "requirements.txt": f"# {engine} {version}\n"}
    for name, text in texts.items():
        (folder / name).write_text(text)
    shutil.copy(PACKAGING / "install.sh", folder)
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in (*texts, "install.sh")}
    (folder / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in digests.items()))
    return f"taktsight-{version}-py{MINOR}-{digests['requirements.txt'][:8]}"


def lay_environment(path: Path) -> Path:
    """Make an environment as pip would have left it; its agent writes down what it was asked."""
    (path / "bin").mkdir(parents=True)
    (path / "complete").touch()
    (path / "bin" / "python").symlink_to(sys.executable)
    agent = path / "bin" / "taktsight-agent"
    agent.write_text(f'#!/bin/sh\necho "$*" >>"{path.parent}/asked"\nrm -f "{path.parent.parent / STATION}"\n')
    agent.chmod(0o755)
    return path


def lay_station(root: Path) -> None:
    for name in KEPT:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / STATION).symlink_to("/nowhere")
    for name in KEPT[1:]:
        (root / name).write_text("kept")


# install.sh


def installed(tmp_path: Path, *versions: str) -> list[Path]:
    """Install one version after the other, each from a bundle of its own; return their environments."""
    made = []
    for version in versions:
        bundle = tmp_path / f"bundle-{version}"
        made.append(lay_environment(tmp_path / "opt" / lay_bundle(bundle, version)))
        environment = {**os.environ, "PREFIX": str(tmp_path / "opt" / "taktsight"), "PYTHON": sys.executable}
        subprocess.run(
            ["sh", bundle / "install.sh"], env=environment, check=True, timeout=60, stdout=subprocess.DEVNULL
        )
    return made


def test_the_environment_before_stays_and_older_ones_go(tmp_path: Path) -> None:
    first, second, third = installed(tmp_path, "0.1.0", "0.2.0", "0.3.0")
    assert (tmp_path / "opt" / "taktsight").resolve() == third
    assert [one.exists() for one in (first, second, third)] == [False, True, True]


def test_an_environment_that_a_process_runs_from_stays_until_it_has_ended(tmp_path: Path) -> None:
    (first,) = installed(tmp_path, "0.1.0")
    command = [first / "bin" / "python", "-c", "input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as station:
        second, third = installed(tmp_path, "0.2.0", "0.3.0")
        assert [one.exists() for one in (first, second, third)] == [True, True, True]
        station.communicate(b"\n")
    (fourth,) = installed(tmp_path, "0.4.0")
    assert [one.exists() for one in (first, second, third, fourth)] == [False, False, True, True]


def test_a_folder_that_only_looks_like_an_environment_stays(tmp_path: Path) -> None:
    for name in NOT_OURS:
        (tmp_path / "opt" / name).mkdir(parents=True)
    (tmp_path / "opt" / NOT_OURS[0] / "complete").touch()
    installed(tmp_path, "0.1.0", "0.2.0", "0.3.0")
    assert all((tmp_path / "opt" / name).is_dir() for name in NOT_OURS)


# The Debian package


class Debian:
    """A dpkg with a root folder of its own; scripts are the package's, with their paths moved into that folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self._folder = folder / "root", folder
        for name in ("admin/info", "admin/updates", "admin/triggers", "root/opt", "programs"):
            (folder / name).mkdir(parents=True)
        for name in ("status", "available"):
            (folder / "admin" / name).touch()
        for name in ("userdel", "getent", "systemd-sysusers", "systemd-tmpfiles"):
            program = folder / "programs" / name
            program.write_text(f'#!/bin/sh\necho {name} "$*" >>"{self.root}/opt/asked"\n')
            program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder / 'programs'}:{os.environ['PATH']}:/usr/sbin:/sbin")
        monkeypatch.setenv("PREFIX", str(self.root / "opt" / "taktsight"))
        monkeypatch.setenv("PYTHON", sys.executable)
        monkeypatch.syspath_prepend(str(PACKAGING))
        spec = importlib.util.spec_from_file_location("deb_of_taktsight", PACKAGING / "deb.py")
        assert spec is not None
        assert spec.loader is not None
        self._deb = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self._deb)

    def install(self, engine: str) -> Path:
        """Install the package of an engine; return its environment."""
        package = self._folder / f"taktsight-{engine}"
        name = lay_bundle(package / "usr/share/taktsight", "0.1.0", engine)
        self._deb.control(package, package.name, engine, "all")
        for script in ("postinst", "prerm", "postrm"):
            path, text = package / "DEBIAN" / script, (PACKAGING / "debian" / script).read_text()
            for place in ("/opt/", "/etc/", "/usr/share/taktsight", "/var/", "/run/"):
                text = text.replace(f" {place}", f" {self.root}{place}")
                assert place not in text.replace(f"{self.root}{place}", ""), "this would reach into the machine itself"
            path.write_text(text)
        environment = lay_environment(self.root / "opt" / name)
        subprocess.run(["dpkg-deb", "--root-owner-group", "--build", package], check=True, capture_output=True)
        self.dpkg("--force-depends", "--install", f"{package}.deb")
        return environment

    def dpkg(self, *arguments: str) -> None:
        places = (f"--admindir={self._folder / 'admin'}", f"--instdir={self.root}", f"--log={self._folder / 'log'}")
        forced = ("--force-script-chrootless", "--force-not-root")
        done = subprocess.run(
            ["dpkg", *places, *forced, *arguments], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def asked(self) -> list[str]:
        """Return what the agent and the stubs for system programs were asked since the last time."""
        path = self.root / "opt" / "asked"
        words = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [line for line in words if line.startswith(("uninstall", "userdel"))]

    def all_there(self) -> bool:
        return all(os.path.lexists(self.root / name) for name in KEPT)


@pytest.fixture
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Debian:
    if shutil.which("dpkg") is None or shutil.which("dpkg-deb") is None:
        pytest.skip("needs dpkg")
    return Debian(tmp_path, monkeypatch)


def test_a_station_goes_on_when_the_package_of_another_engine_takes_over(debian: Debian) -> None:
    old = debian.install("openvino")
    lay_station(debian.root)
    new = debian.install("onnxruntime")
    for step in (lambda: None, lambda: debian.dpkg("--purge", "taktsight-openvino")):
        step()
        assert debian.all_there()
        assert debian.asked() == []
        assert (debian.root / "opt/taktsight").resolve() == new
        assert old.exists()  # a station may run from it


def test_a_purge_of_what_another_engines_package_left_takes_nothing_away(debian: Debian) -> None:
    debian.install("openvino")
    debian.dpkg("--remove", "taktsight-openvino")  # as apt does before it installs the other one
    new = debian.install("onnxruntime")
    lay_station(debian.root)
    debian.dpkg("--purge", "taktsight-openvino")
    assert debian.all_there()
    assert (debian.root / "opt/taktsight").resolve() == new
    assert debian.asked() == []


def test_a_purge_of_the_last_package_leaves_nothing_but_what_is_not_ours(debian: Debian) -> None:
    debian.install("openvino")
    lay_station(debian.root)
    debian.install("onnxruntime")
    for name in NOT_OURS:
        (debian.root / "opt" / name).mkdir()
    debian.dpkg("--purge", "taktsight-onnxruntime")
    assert debian.asked() == ["uninstall cell7", "userdel taktsight"]
    assert sorted(path.name for path in (debian.root / "opt").iterdir()) == sorted(NOT_OURS)
    left = [name for name in KEPT if os.path.lexists(debian.root / name)]
    assert left == []


def test_a_purge_of_what_was_removed_before_leaves_the_station_that_a_bundle_brought_since(debian: Debian) -> None:
    debian.install("openvino")
    debian.dpkg("--remove", "taktsight-openvino")
    lay_station(debian.root)
    bundle = lay_environment(debian.root / "opt" / lay_bundle(debian.root / "bundle", "0.1.0"))
    debian.dpkg("--purge", "taktsight-openvino")
    assert debian.all_there()
    assert bundle.exists()
    assert debian.asked() == []
