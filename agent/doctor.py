"""What could go wrong before the first part does: the installation, the engines, a station's settings."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass
from pathlib import Path

from agent.config import read_station
from agent.engine import ENGINES, open_engine
from agent.recipe_store import RecipeStore
from calibration.errors import TaktsightError

OUR_NAMES = ("agent", "calibration", "trainer")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    subject: str
    fine: bool
    text: str


def examine(station_file: Path | None) -> list[Finding]:
    """Return findings about this machine and, where given, about a station and its recipe on its engine."""
    findings = [Finding("python", True, platform.python_version()), *_names(), _engines()]
    return findings if station_file is None else [*findings, *_station(station_file)]


def _names() -> list[Finding]:
    """Another distribution with a package called `trainer` would merge into the same folder."""
    owners = importlib.metadata.packages_distributions()
    findings = []
    for name in OUR_NAMES:
        others = sorted(set(owners.get(name, [])) - {"taktsight"})
        text = f"also provided by {', '.join(others)}: uninstall it" if others else "ours alone"
        findings.append(Finding(f"package {name}", not others, text))
    return findings


def _engines() -> Finding:
    installed = [kind for kind in ENGINES if importlib.util.find_spec(kind) is not None]
    if not installed:
        return Finding(
            "engines", False, "none installed: pip install 'taktsight[openvino]' or 'taktsight[onnxruntime]'"
        )
    return Finding("engines", True, ", ".join(installed))


def _station(station_file: Path) -> list[Finding]:
    try:
        station = read_station(station_file)
        _, recipe = RecipeStore(station.recipes.folder, station.recipes.trust, station.recipe).current()
        engine = open_engine(recipe, station.engine)
    except TaktsightError as error:
        return [Finding("station", False, str(error))]
    return [
        Finding("station", True, f"{station.name}: takt {station.beat.takt_ms:g} ms"),
        Finding("recipe", True, f"{recipe.product}, {recipe.detector}, digest {recipe.digest[:12]}"),
        Finding("engine", True, f"{engine.label} reproduces the trainer's answers"),
    ]
