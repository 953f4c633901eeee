"""A Debian package of the bundle: dpkg lays wheels and units, and postinst makes the environment for the Python found.

python packaging/deb.py --arch x86_64 --engine openvino, after packaging/bundle.py of the same, writes dist/*.deb.

An environment that was made beforehand would run with one minor version of Python alone: one package for each release
of each distribution, broken by the next upgrade. The wheels inside serve several, and a trigger makes a new environment
when the system's Python changes. Nothing is fetched: plants have no network.
"""

from __future__ import annotations

import argparse
import email.utils
import gzip
import hashlib
import os
import shutil
import sys
from pathlib import Path

from release import BUILD, DIST, ENGINES, NAME, PROJECT, VERSION, commit_time_s, run, stem

MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
SHARE, DOC = Path("usr/share") / NAME, Path("usr/share/doc")
UNITS = {
    "taktsight-agent@.service": "usr/lib/systemd/system/taktsight-agent@.service",
    "taktsight-compile@.service": "usr/lib/systemd/system/taktsight-compile@.service",
    "taktsight.sysusers": "usr/lib/sysusers.d/taktsight.conf",
    "taktsight.tmpfiles": "usr/lib/tmpfiles.d/taktsight.conf",
}
COMMANDS = ("taktsight-agent", "taktsight-calibration")
MAINTAINER = "taktsight <taktsight@localhost>"  # DEBFULLNAME and DEBEMAIL, as for Debian's own tools


def main() -> None:
    """Lay out the package and let dpkg-deb pack it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=list(ENGINES), required=True)
    parser.add_argument("--arch", choices=list(MACHINES), required=True)
    wanted = parser.parse_args()
    bundle = BUILD / stem(wanted.engine, wanted.arch)
    if not bundle.is_dir():
        sys.exit(f"{bundle}: not found: run `make bundle` with the same ENGINE and ARCH first")
    package, machine = f"{NAME}-{wanted.engine}", MACHINES[wanted.arch]
    root = BUILD / "deb" / f"{package}_{VERSION}_{machine}"
    shutil.rmtree(root, ignore_errors=True)
    lay_out(root, bundle, package)
    control(root, package, wanted.engine, machine)
    plain(root)
    archive = DIST / f"{root.name}.deb"
    run("dpkg-deb", "--root-owner-group", "-Zgzip", "-z1", "--build", root, archive)  # wheels are compressed already


def lay_out(root: Path, bundle: Path, package: str) -> None:
    """Put the bundle, the units and the package's papers where they belong."""
    shutil.copytree(bundle, root / SHARE)
    for name, place in UNITS.items():
        copy(PROJECT / "systemd" / name, root / place)
    (root / "usr/bin").mkdir(parents=True)
    for name in COMMANDS:
        (root / "usr/bin" / name).symlink_to(f"/opt/{NAME}/bin/{name}")
    debian, papers = PROJECT / "packaging" / "debian", root / DOC / package
    copy(debian / "copyright", papers / "copyright")
    when = email.utils.formatdate(commit_time_s())
    entry = f"{package} ({VERSION}) unstable; urgency=medium\n\n  * See CHANGELOG.md.\n\n -- {maintainer()}  {when}\n"
    (papers / "changelog.gz").write_bytes(gzip.compress(entry.encode(), mtime=0))
    overrides = (debian / "lintian-overrides").read_text(encoding="utf-8")
    place = root / "usr/share/lintian/overrides" / package
    place.parent.mkdir(parents=True)
    place.write_text(overrides, encoding="utf-8")


def control(root: Path, package: str, engine: str, machine: str) -> None:
    """Write what dpkg wants to know of the package, and its scripts."""
    folder, debian = root / "DEBIAN", PROJECT / "packaging" / "debian"
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    folder.mkdir()
    sums = "".join(f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.relative_to(root)}\n" for path in files)
    (folder / "md5sums").write_text(sums, encoding="utf-8")
    fields = {
        "package": package,
        "version": VERSION,
        "machine": machine,
        "engine": engine,
        "others": ", ".join(f"{NAME}-{other}" for other in ENGINES if other != engine),  # by name: dpkg exchanges these
        "maintainer": maintainer(),
        "kilobytes": sum(path.stat().st_size for path in files) // 1024,
    }
    (folder / "control").write_text(
        (debian / "control.in").read_text(encoding="utf-8").format(**fields), encoding="utf-8"
    )
    for name in ("postinst", "prerm", "postrm", "triggers"):
        copy(debian / name, folder / name)
        (folder / name).chmod(0o644 if name == "triggers" else 0o755)


def maintainer() -> str:
    """Return who answers for this build."""
    name, address = os.environ.get("DEBFULLNAME"), os.environ.get("DEBEMAIL")
    return f"{name} <{address}>" if name and address else MAINTAINER


def copy(source: Path, target: Path) -> None:
    """Copy a file, with the folders above it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def plain(root: Path) -> None:
    """Give everything the modes that a package is to have, whatever the umask here."""
    for path in (root, *root.rglob("*")):
        if path.is_symlink() or (path.parent.name == "DEBIAN" and path.is_file()):
            continue
        path.chmod(0o755 if path.is_dir() or path.suffix == ".sh" else 0o644)


if __name__ == "__main__":
    main()
