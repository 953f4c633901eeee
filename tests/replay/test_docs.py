"""Every command of the pages for people is typed as it stands, page by page, at a desk laid for the page.

A block without a language, or of `sh`, is commands; what a terminal shows is `text`. What cannot be typed here stands
in NOT_HERE with its reason and is looked at in another way; what has to be said otherwise here, in OTHERWISE.
"""

from __future__ import annotations

import csv
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import click
import cv2
import pytest
from broker import Mosquitto, free_port, mosquitto_program, wait_until
from recipes import SIDE, write_tiny_recipe
from taktsight_subscribe.__main__ import commands as subscribe_commands

from agent.__main__ import commands as agent_commands
from calibration.__main__ import commands as calibration_commands
from calibration.preprocess import View
from trainer.__main__ import commands as trainer_commands

PROJECT = Path(__file__).resolve().parents[2]
PAGES = {
    str(path.relative_to(PROJECT)): path.read_text(encoding="utf-8")
    for path in (
        *sorted(PROJECT.glob("*.md")),
        PROJECT / "subscriber" / "README.md",
        *sorted(PROJECT.glob("docs/*.md")),
    )
}
BLOCK = re.compile(r"(?:^<!-- (run|file): (\S+) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BY_NAME = "docs/connect-the-mes.md"  # tests/faults/test_broker_files.py runs its blocks, with TLS, by their names
FRESH = ("README.md", "docs/train.md", "docs/tutorial.md")  # pages that make their own recipe and key
PROGRAMS = {
    "taktsight-agent": agent_commands,
    "taktsight-trainer": trainer_commands,
    "taktsight-calibration": calibration_commands,
    "taktsight-subscribe": subscribe_commands,
}
SIDE_PX = 128  # of the desk's photos
PHOTOS, TEST_PHOTOS = 16, 60  # good ones: to learn from; as many as a false reject rate of 2 % needs
AT_A_TIME = 2  # pages, each at its own desk
STATION = """\
station: cell7
recipe: {recipe}
recipes: {{unsigned: allow, folder: {state}/recipes}}
takt_ms: 200
camera: {{kind: simulated, width_px: {side}, height_px: {side}, seed: 7, lot: 2, shift_px: 4}}
engine: {{threads: 1}}
mqtt: {{topic: {topic}, port: {port}, {confirmed}}}
outbox: {{folder: {state}/outbox, reserve_mb: 0}}
archive: {{folder: {state}/archive}}
commands: {{allow: [pause, resume], captures: {state}/captures}}
health: {{port: {health}}}
"""
OTHERWISE = (  # (what the page says, what is typed here): no root, no other machine, ports of our own
    (r"^sudo (-u \w+ )?", ""),
    (r"/opt/taktsight/bin/", ""),
    (r"(?<![\w.])/(etc|var/lib)/taktsight\b", r"\1/taktsight"),
    (r" -C /(?= |$)", " -C ."),
    (r" -g taktsight\b", ""),
    (r"--host broker\b", "--host 127.0.0.1"),
    (r"^(taktsight-agent watch|taktsight-subscribe (?:run|send))\b([^#]*)", r"\1\2 --port {port} "),
    (r"^(taktsight-agent (?:un)?install)\b([^#]*)", r"\1\2 --root {image} "),
    (r"--port 9465$", "--port {health}"),
    (r"(demo/learn\.yaml \S+ --count) 100$", r"\1 30"),  # a minute less each, and the commands are the same
    (r"(demo/line\.yaml \S+ --count) 59$", r"\1 20"),
    (r"> next-day\.yaml$", "| sed 's/takt_ms: 100/takt_ms: 50/' > next-day.yaml"),
    (r"(fit images/flange/good .*--size) 384$", r"\1 192"),
    (r"--false-reject-rate 0\.005", "--false-reject-rate 0.02"),
    (r"broker\.py 1883$", "broker.py {port}"),
    (r"^systemctl (?:start|restart|enable --now) taktsight-agent@cell7$",
     "taktsight-agent run etc/taktsight/cell7.yaml --count 3"),
    (r"^systemctl (?:stop|disable --now|status) taktsight-agent@cell7$", "true"),
)  # fmt: skip
LASTING = {  # what runs until it is stopped, and what it says once it does its work
    r"taktsight-agent run \S+$": "ready: ",
    r"taktsight-agent watch (?!.*--count)": r"PASS|REJECT",
    r"taktsight-subscribe run (?!.*--count)": r"PASS|REJECT",
    r"python \S*broker\.py \d+$": "ready",
}
AT_ONCE = ("taktsight-agent run", "taktsight-subscribe run", "python")  # of these: what comes next needs them
RECIPE = "flange.recipe"
FIT = f"taktsight-trainer fit images/flange --recipe {RECIPE}"  # on several pages, of the same photos: done once
FITTING = threading.Lock()
CODES = {"taktsight-agent doctor": (0, 1), "taktsight-subscribe gaps": (0, 1)}  # 1: something was found


def make_reads(command: str) -> None:
    done = subprocess.run(
        ["make", "-n", *shlex.split(command, comments=True)[1:]], cwd=PROJECT, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


def files_are_there(command: str) -> None:
    for word in shlex.split(command, comments=True):
        if word.endswith(".txt") or word.startswith("./"):
            assert (PROJECT / word.partition("[")[0]).exists(), word


def options_are_there(command: str) -> None:
    check_options(re.sub(r"^\S*install\.sh", "taktsight-agent install", command))


def journal_fields_are_there(command: str) -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (PROJECT / "agent").rglob("*.py"))
    for name in re.findall(r"TAKTSIGHT_(\w+)=", command):
        assert re.search(rf"\b{name.lower()}=", sources), name
    assert all(unit == "taktsight-agent@cell7" for unit in re.findall(r"-u (\S+)", command))


NOT_HERE: dict[str, tuple[str, Callable[[str], None]]] = {
    r"make\b": ("builds, installs, or runs everything: too long, or needs a network", make_reads),
    r"(\S*/)?pip install\b|python3 -m venv /opt": ("needs a network", files_are_there),
    r"(?:apt install|dpkg -i)\b|tar xf taktsight-": ("needs what `make bundle` and `make deb` build", lambda _: None),
    r"taktsight-\S*/install\.sh\b": ("the same; its options are those of `install`", options_are_there),
    r"journalctl\b": ("needs the journal of a booted machine: tests/service", journal_fields_are_there),
}


@dataclass
class Desk:
    """One page's folder, its ports, and what runs there."""

    folder: Path
    shelf: Path  # what one page made and another takes
    port: int
    health: int
    at: Path = field(init=False)  # where the person who types stands
    running: list[tuple[str, subprocess.Popen[bytes], Path]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.at = self.folder

    def type(self, command: str) -> None:
        """Type one command and wait for its end, or, if it lasts, until it does its work."""
        ours = {"{port}": self.port, "{health}": self.health, "{image}": self.folder / "image"}
        for said, typed in OTHERWISE:
            command = re.sub(said, re.sub(r"\{\w+\}", lambda name: str(ours[name[0]]), typed), command)
        words = command.partition(" #")[0].strip()
        lasting = next((said for pattern, said in LASTING.items() if re.match(pattern, words)), None)
        if lasting is not None:
            self._begin(words, lasting)
        elif words == FIT:
            with FITTING:  # whoever comes second takes what the first one made
                self._fit(words)
        else:
            self._run(words)

    def _fit(self, words: str) -> None:
        made = self.shelf / "made"
        if not made.exists():
            self._run(words)
            shutil.copytree(self.at, made, ignore=lambda _, names: [n for n in names if not n.startswith(RECIPE)])
        for file in made.iterdir():
            shutil.copy(file, self.at)

    def _run(self, words: str) -> None:
        where = self.folder / "where"
        done = subprocess.run(
            ["bash", "-ec", f"{words}\npwd > {where}"],
            cwd=self.at,
            env=environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        codes = next((codes for start, codes in CODES.items() if words.startswith(start)), (0,))
        assert done.returncode in codes, f"$ {words}\nexit code {done.returncode}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr, f"$ {words}\n{done.stderr}"
        if where.exists():
            self.at = Path(where.read_text().strip())

    def _begin(self, words: str, said: str) -> None:
        log = self.folder / f"lasting-{len(self.running)}.log"
        with log.open("wb") as file:
            program = ["bash", "-c", f"exec {words}"]
            process = subprocess.Popen(
                program, cwd=self.at, env=environment(), stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )
        self.running.append((words, process, log))
        if words.startswith(AT_ONCE):
            self._hears(words, process, log, said)

    def _hears(self, words: str, process: subprocess.Popen[bytes], log: Path, said: str) -> None:
        try:
            wait_until(lambda: re.search(said, log.read_text()) or process.poll() not in (None, 0), 60)
        finally:
            assert re.search(said, log.read_text()), f"$ {words}\n{log.read_text()}"

    def leave(self) -> None:
        """Wait until everything that lasts has done some work, then end it as Ctrl-C does, the newest first."""
        for words, process, log in self.running:
            said = next(said for pattern, said in LASTING.items() if re.match(pattern, words))
            self._hears(words, process, log, said)
        for words, process, log in reversed(self.running):
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) in (0, 130), f"$ {words}\n{log.read_text()}"

    def clear(self) -> None:
        """End what is left when something failed."""
        for _, process, _ in self.running:
            process.kill()
            process.wait()


def environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}


def commands_of(block: str) -> Iterator[str]:
    """Yield each command of a block: lines that a backslash joins are one, those of comments alone none."""
    for line in block.replace("\\\n", " ").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield line.strip()


def is_commands(language: str) -> bool:
    return language in ("", "sh", "bash", "shell", "console")


TYPED = [
    page
    for page, text in PAGES.items()
    if page != BY_NAME and any(is_commands(language) for _, _, language, _ in BLOCK.findall(text))
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with images/flange in MVTec AD layout, and what calibration wants."""
    folder = tmp_path_factory.mktemp("photos")
    station = STATION.format(
        recipe="x", state="x", side=SIDE_PX, topic="a/b", port=1, health=0, confirmed="heatmaps: true"
    )
    (folder / "station.yaml").write_text(station.replace("takt_ms: 200", "takt_ms: 20"))
    agent = [
        sys.executable,
        "-m",
        "agent",
        "capture",
        str(folder / "station.yaml"),
        str(folder / "all"),
        "--count",
        str(PHOTOS + TEST_PHOTOS),
    ]
    subprocess.run(agent, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    shots = sorted((folder / "all").glob("*.png"))
    flange = folder / "images" / "flange"
    for name, chosen in (("train/good", shots[:PHOTOS]), ("test/good", shots[PHOTOS:]), ("test/scratch", shots[:3])):
        (flange / name).mkdir(parents=True)
        for shot in chosen:
            shutil.copy(shot, flange / name)
    for shot in (flange / "test" / "scratch").iterdir():
        cv2.imwrite(str(shot), cv2.line(cv2.imread(str(shot), 0), (30, 40), (90, 90), 255, 3))
    shutil.copytree(flange / "test" / "good", folder / "good-parts")
    for name, level in (("dark", 3), ("white", 220)):
        (folder / name).mkdir()
        for number in range(3):
            cv2.imwrite(str(folder / name / f"{number}.png"), cv2.add(cv2.imread(str(shots[0]), 0) // 64, level))
    shutil.rmtree(folder / "all")
    (folder / "station.yaml").unlink()
    return folder


@pytest.fixture(scope="module")
def typed(request, tmp_path_factory, photos):
    """For each page that is to be tested: what becomes of it. They are typed some at a time."""
    mosquitto_program()
    pages = [item.callspec.params["page"] for item in request.session.items if "typed" in item.fixturenames]
    pages.sort(key=lambda page: (page != "docs/tutorial.md", page not in FRESH))  # those that take long go first
    with ThreadPoolExecutor(AT_A_TIME) as typists:
        folders = {page: tmp_path_factory.mktemp(Path(page).stem) for page in pages}
        yield {page: typists.submit(type_page, page, folder, photos) for page, folder in folders.items()}


def laid_desk(page: str, folder: Path, photos: Path, port: int) -> Desk:
    """Return the desk of a page: photos, a key, a station with its recipe. port: of the broker."""
    shutil.copytree(photos, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("made"))
    shutil.copytree(PROJECT / "demo", folder / "demo")
    etc = folder / "etc" / "taktsight"
    for made in (
        folder / ".venv/bin",
        folder / "new",
        folder / "image",
        etc / "recipes",
        etc / "certificates",
        etc / "credentials",
    ):
        made.mkdir(parents=True)
    (folder / ".venv/bin/activate").touch()
    for name in ("authority.crt", "cell7.crt", "cell7.key", "cell7.password", "new/cell7.key", "new/cell7.crt"):
        (folder / name).write_text("secret\n")
    laid = Desk(folder, photos, port, free_port())
    topic = "acme/plant1/hall2/line3/cell7"
    state = folder / "var" / "lib" / "taktsight" / "cell7"
    for file, recipe, where, confirmed in (
        (folder / "station.yaml", RECIPE, folder, "consumers: [mes]"),
        (etc / "cell7.yaml", f"recipes/{RECIPE}", state, "protocol: 3"),  # though nobody listens
    ):
        values = {"side": SIDE_PX, "topic": topic, "port": laid.port, "health": laid.health, "confirmed": confirmed}
        file.write_text(STATION.format(recipe=recipe, state=where, **values))
    if page not in FRESH:
        for recipe in (folder / RECIPE, etc / "recipes" / RECIPE):
            write_tiny_recipe(recipe, view=View(SIDE, SIDE, colour=False, reference_size=(SIDE_PX, SIDE_PX)))
        laid.type("taktsight-trainer keygen release.key")
    return laid


def lay_plain_photos(images: Path) -> None:
    """Turn images/flange in MVTec AD layout into what a reader has: good photos, and images/line to be judged."""
    layout, flange, line = images / "layout", images / "flange", images / "line"
    flange.rename(layout)
    (layout / "train" / "good").rename(flange)
    line.mkdir()
    for kind in ("good", "scratch"):
        for shot in sorted((layout / "test" / kind).iterdir())[:3]:
            shutil.copy(shot, line / f"{kind}-{shot.name}")
    shutil.rmtree(layout)


def type_page(page: str, folder: Path, photos: Path) -> None:
    """Type all commands of a page at its desk, with a broker beside it. Raises what the first failing one raises."""
    broker = Mosquitto(folder)
    laid = laid_desk(page, folder / "desk", photos, broker.port)
    try:
        if page == "README.md":
            lay_plain_photos(laid.folder / "images")
        if page == "docs/tutorial.md":  # it takes photos of its own, and brings a broker
            shutil.rmtree(laid.folder / "images")
            laid.port = free_port()
        else:
            broker.start()
        if page in ("docs/health.md", "subscriber/README.md"):  # these speak of a station that runs
            laid.type("taktsight-agent run station.yaml")
        if page in ("docs/operations.md", "docs/install.md"):  # and these of one that ran
            laid.type("systemctl start taktsight-agent@cell7")
        for kind, name, language, block in BLOCK.findall(PAGES[page]):
            if kind == "file":
                ports = rf"\1 port: {laid.port},"
                (laid.at / name).write_text(
                    re.sub(r"(mqtt: \{topic: \S+)", ports, block) + f"health: {{port: {laid.health}}}\n"
                )
            for command in commands_of(block) if is_commands(language) else ():
                type_or_look(laid, command)
        laid.leave()
    finally:
        laid.clear()
        broker.stop()


@pytest.mark.broker
@pytest.mark.parametrize("page", TYPED)
def test_every_command_of_the_page_does_what_it_says(page, typed):
    typed[page].result()


def type_or_look(desk: Desk, command: str) -> None:
    for pattern, (_, look) in NOT_HERE.items():
        if re.match(pattern, command):
            look(command)
            if written := re.search(r"> (\S+)$", command):
                (desk.at / written[1]).touch()
            return
    desk.type(command)


def test_the_stages_in_the_readme_are_those_of_the_record_that_it_names():
    with (PROJECT / "benchmarks" / "results" / "deadline.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["case"] == "quiet, FIFO"]
    measured = {row["what"]: float(row["value"]) for row in rows}
    table = re.search(r"^\| stage \|.*?\n\n", PAGES["README.md"], re.MULTILINE | re.DOTALL)[0]
    said = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    columns = ("p50", "p99", "p99.9", "max")
    assert len(said) == 8
    assert said == [[stage, *(f"{measured[f'{stage}, {one}']:.2f}" for one in columns)] for stage, *_ in said]
    share = measured["overhead, p50"] / measured["engine, p50"]
    assert f"adds {share:.0%}".replace("%", " %") in PAGES["README.md"]


def test_the_blocks_of_the_integrators_page_are_run_by_name():
    runner = (PROJECT / "tests" / "faults" / "test_broker_files.py").read_text(encoding="utf-8")
    blocks = [(kind, name) for kind, name, language, _ in BLOCK.findall(PAGES[BY_NAME]) if is_commands(language)]
    assert len(blocks) >= 5
    assert [name for kind, name in blocks if kind != "run" or f'"{name}"' not in runner] == []


def check_options(words: str) -> None:
    """Fail where a word of a command, or an option, is not there any more."""
    program, *rest = shlex.split(words.replace("...", ""), comments=True)
    command: click.Command = PROGRAMS[program]
    for word in rest:
        if isinstance(command, click.Group) and word in command.commands:
            command = command.commands[word]
        elif word.startswith("--"):
            known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
            assert word.partition("=")[0] in known | {"--help", "--version"}, f"{words}: no option {word}"
        elif isinstance(command, click.Group):
            assert any(isinstance(option, click.Argument) for option in command.params), f"{words}: no command {word}"


@pytest.mark.parametrize("page", PAGES)
def test_every_command_in_the_text_and_its_options_are_there(page):
    """Those in the midst of a sentence or a table, which nobody types here."""
    for words in re.findall(r"`(taktsight-(?:agent|trainer|calibration|subscribe) [^`\n|]+)`", PAGES[page]):
        check_options(words)
    for script in re.findall(r"`python (\S+\.py)", PAGES[page]):
        assert (PROJECT / script).is_file(), script


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    here = (PROJECT / page).parent
    for target in re.findall(
        r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.MULTILINE | re.DOTALL)
    ):
        if target.startswith(("http:", "https:")):
            continue
        file, _, anchor = target.partition("#")
        path = here / file if file else PROJECT / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, f"{page}: {target}"


@pytest.mark.parametrize(
    "words",
    ["taktsight-agent run --cuont 3", "taktsight-agent recipe list", "taktsight-trainer sign x --kye y"],
)
def test_a_renamed_option_or_command_is_noticed(words):
    with pytest.raises(AssertionError):
        check_options(words)
