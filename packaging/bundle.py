"""A bundle for plants without a network: wheels for several Pythons, install.sh, digests and the bill of materials.

python packaging/bundle.py --arch aarch64 --engine onnxruntime --pythons 3.11 3.12, with the packages of
locks/tools.txt, writes dist/*.tar. Every file that comes from outside is checked against the lock's hash.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tarfile
from pathlib import Path

from release import (
    BUILD,
    DIST,
    ENGINES,
    LOCKS,
    NAME,
    PROJECT,
    VERSION,
    commit_time_s,
    digest,
    lock_of,
    locked,
    our_wheel,
    run,
    stem,
)

# What the machines offer: glibc 2.28 and newer (Debian 12, Ubuntu 22.04, JetPack 6, and all that came after them)
PLATFORMS = ("manylinux_2_28_{}", "manylinux_2_27_{}", "manylinux_2_17_{}", "manylinux2014_{}")
BESIDE = ("packaging/install.sh", "LICENSE", "SECURITY.md", "docs/install.md")


def main() -> None:
    """Gather everything in a folder and pack it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=list(ENGINES), required=True)
    parser.add_argument(
        "--arch", choices=sorted({machine for each in ENGINES.values() for machine in each}), required=True
    )
    parser.add_argument("--pythons", nargs="+", required=True, metavar="3.N")
    wanted = parser.parse_args()
    if wanted.arch not in ENGINES[wanted.engine]:
        sys.exit(f"{wanted.engine} has no wheels for {wanted.arch}: give ENGINE=onnxruntime")
    folder = BUILD / stem(wanted.engine, wanted.arch)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "wheels").mkdir(parents=True)
    gather(folder, wanted.engine, wanted.arch, wanted.pythons)
    print(f"bundle: {pack(folder).relative_to(PROJECT)}")


def gather(folder: Path, engine: str, machine: str, pythons: list[str]) -> None:
    """Fill a folder with all that install.sh needs."""
    wheels, lock = folder / "wheels", lock_of(engine)
    for python in pythons:
        download(wheels, lock, python, machine)
    pip_alone = BUILD / "pip.txt"  # makes the environment; it does not stay in it
    pip_alone.write_text(
        "".join(one[0] for one in locked(LOCKS / "tools.txt") if one["name"] == "pip"), encoding="utf-8"
    )
    download(wheels, pip_alone, pythons[0], machine)
    ours = our_wheel(wheels)
    text = f"{lock.read_text(encoding='utf-8')}{NAME}=={VERSION} \\\n    --hash=sha256:{digest(ours)}\n"
    (folder / "requirements.txt").write_text(text, encoding="utf-8")
    (folder / "VERSION").write_text(f"{VERSION}\n", encoding="utf-8")
    (folder / "PYTHONS").write_text(" ".join(pythons) + "\n", encoding="utf-8")
    for name in (*BESIDE, DIST / f"{stem(engine)}.cdx.json"):
        shutil.copy(PROJECT / name, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = "".join(f"{digest(path)}  {path.relative_to(folder)}\n" for path in files)
    (folder / "SHA256SUMS").write_text(sums, encoding="utf-8")


def download(wheels: Path, lock: Path, python: str, machine: str) -> None:
    """Fetch the wheels of a lock file for one Python and machine; one that does not exist ends the script."""
    abi = f"cp{python.replace('.', '')}"
    options = [f"--python-version={python}", "--implementation=cp", f"--abi={abi}", "--abi=abi3", "--abi=none"]
    options += [f"--platform={platform.format(machine)}" for platform in PLATFORMS]
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes")
    run(*pip, *options, "-r", lock, "-d", wheels)


def pack(folder: Path) -> Path:
    """Return a tar of a folder: the same files make the same archive, whoever packs them."""
    archive = DIST / f"{folder.name}.tar"  # wheels are compressed already

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = "root"
        entry.mtime = commit_time_s()
        entry.mode = 0o755 if entry.isdir() or entry.name.endswith(".sh") else 0o644
        return entry

    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as tar:
        tar.add(folder, folder.name, recursive=False, filter=plain)
        for path in sorted(folder.rglob("*")):
            tar.add(path, f"{folder.name}/{path.relative_to(folder)}", recursive=False, filter=plain)
    archive.with_name(f"{archive.name}.sha256").write_text(f"{digest(archive)}  {archive.name}\n", encoding="utf-8")
    return archive


if __name__ == "__main__":
    main()
