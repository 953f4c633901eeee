"""Write docs/reference.md from the code that reads station.yaml: `python docs/make_reference.py`.

`read_station` reads as ever, from a section that notes what is asked of it: key, type, range, choices, default. What a
key is for is one line in WORDS; a test holds the page, and both, to the code.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import agent.config
from agent.cameras.several import CAMERAS
from agent.commands.message import COMMANDS
from calibration.errors import TaktsightError
from calibration.settings import REQUIRED, Section

PAGE = Path(__file__).parent / "reference.md"
STATION = "cell7"  # name of the station that is read
UNITS = {
    "us": "us",
    "hz": "Hz",
    "db": "dB",
    "ms": "ms",
    "px": "px",
    "deg": "degrees",
    "mb": "MB",
    "s": "s",
}  # by the last word of a key
LIKELY: dict[str, Any] = {"mqtt.topic": "a/b", "output.heartbeat_coil": 1}  # values that a reader's own checks let pass
FORMULAS = {  # of defaults and limits that hang on other keys
    "0.9 x `takt_ms`": lambda given: 0.9 * given["takt_ms"],
    "`queue_length` x `takt_ms`": lambda given: given["queue_length"] * given["takt_ms"],
}
NAMED = {("output.at_ms", "minimum"): "`deadline_ms`"}  # limits that are another key's value
BESIDE = "`{}/{{station}}` beside station.yaml"  # what a folder is that is not given
DEFAULTS = {  # of keys that say "not given", and what stands in then
    "outbox.folder": BESIDE.format("outbox"),
    "recipes.folder": BESIDE.format("recipes"),
    "commands.captures": BESIDE.format("captures"),
    "engine.cache": BESIDE.format("engines"),
    "mqtt.client_id": "from the topic",
    "realtime.cpus": "all",
    "camera.producer": "those in `GENICAM_GENTL64_PATH`",
    "realtime.priority": "20 under the unit, 0 by hand",
    "sparkplug.device": "the station's name",
    "output.at_ms": "`deadline_ms`",
    "output.chip": "`/dev/gpiochip0`",
    "trigger.chip": "`/dev/gpiochip0`",
}
KINDS = {"number": "number", "whole": "whole number", "flag": "`true` or `false`", "text": "text", "path": "path",
         "whole_list": "list of whole numbers", "text_list": "list of words"}  # fmt: skip
IN_KINDS = ("camera", "output", "trigger")  # sections whose keys hang on their `kind`
SECTIONS = {
    "": "Station",
    "recipes": "Whose recipes run",
    "camera": "Camera",
    "camera.trigger": "Camera: trigger",
    "camera.white_balance": "Camera: white balance",
    "engine": "Engine",
    "trigger": "What announces parts",
    "output": "Output",
    "mqtt": "Broker and consumers",
    "outbox": "Verdicts that wait",
    "commands": "Commands over MQTT",
    "archive": "Archive",
    "health": "Figures",
    "realtime": "Priority",
    "sparkplug": "Sparkplug B",
}
ABOUT = {
    "recipes": "One of `keys` and `unsigned` must be given. See [run a station](run-a-station.md#recipes).",
    "camera": "Keys with a kind in brackets are read with that kind alone. `genicam`: see [cameras](camera.md); what\n"
    "is not given is as the camera's user set has it.",
    "camera.white_balance": "Left out: as the camera is.",
    "output": "Left out: nobody is told. Kinds in brackets: read with those alone. See [the gate](output.md).",
    "trigger": "Left out: the beat of `takt_ms`, or the camera's own trigger. See [triggers](camera.md#trigger).",
    "mqtt": "Left out: no broker; verdicts are in the archive alone. See [connect the MES](connect-the-mes.md).",
    "archive": "Left out: nothing is archived.",
    "health": "See [health](health.md).",
    "realtime": "CPUs and locked memory need the drop-in [realtime.conf](install.md#as-a-service).",
    "sparkplug": "Left out: no Sparkplug. Needs `mqtt`. See [connect the MES](connect-the-mes.md#sparkplug-b).",
}
SHORTEST = """\
station: cell7
recipe: flange.recipe
recipes: {unsigned: allow}
takt_ms: 500
camera: {kind: simulated}
"""
WORDS = {
    "station": "name in every message",
    "recipe": "file; the recipe that it begins with",
    "takt_ms": "from trigger to trigger",
    "deadline_ms": "from trigger to verdict",
    "queue_length": "parts that may wait for the inspection; one more is `overrun`",
    "on_no_verdict": "what the line does with a part without verdict (halted: `reject`); `stop` stops the station too",
    "photometric": "file from `taktsight-calibration photometric`",
    "recipes.keys": "files with the public keys of those whose recipes run here",
    "recipes.unsigned": "`allow`: also those that nobody signed, or somebody unknown did",
    "recipes.folder": "what `taktsight-agent recipes add` brought in, and which one is active",
    "camera.kind": "`folder` replays images, `simulated` draws flanges, `genicam` is a real one",
    "camera.path": "folder of images or a recording; each image once, in the order of the names",
    "camera.bit_depth": "of 16-bit files whose sensor uses fewer bits; left out: as the file or the recording says",
    "camera.prerendered": "parts drawn before the start; 0: each as it comes",
    "camera.seed": "which machine made the parts",
    "camera.lot": "which parts",
    "camera.width_px": "of a frame",
    "camera.height_px": "of a frame",
    "camera.shift_px": "largest shift of a part, either way",
    "camera.angle_deg": "largest turn of a part, either way",
    "camera.light_drift": "share by which the light changes",
    "camera.noise": "standard deviation, gray levels",
    "camera.defect_share": "share of parts with a defect",
    "camera.lost": "triggers whose frame never comes",
    "camera.dark": "triggers with the lamp off",
    "camera.saturated": "triggers exposed too long",
    "camera.blurred": "triggers out of focus",
    "camera.wrong_part": "triggers with another product",
    "camera.half_out": "triggers with the part half out of view",
    "camera.late": "triggers whose frame comes late",
    "camera.late_ms": "how late these are",
    "camera.colour": "frames in colour",
    "camera.producer": "the .cti file of the camera's maker",
    "camera.serial": "which camera; left out: the only one",
    "camera.id": "which camera, by the producer's own name for it",
    "camera.user_set": "loaded first, so that nothing is left of what others set; `keep`: none is",
    "camera.pixel_format": "as the camera names it: `Mono8`, `Mono12p`, `BayerRG8`, ...",
    "camera.region": "`[x, y, width, height]`, px",
    "camera.exposure_us": "`ExposureTime`",
    "camera.gain_db": "`Gain`",
    "camera.gain_raw": "`GainRaw` of older cameras, in units of their own",
    "camera.packet_size": "GigE Vision, bytes; 8192 or 9000 with jumbo frames, 1500 without",
    "camera.rate_hz": "frames a second at most; what sets the pace in free run",
    "camera.buffers": "frames that the producer has room for",
    "camera.strobe": "line that is active while the sensor is exposed, such as `Line2`",
    "camera.chunks": "what comes with each frame, such as `ExposureTime`, `Gain`, `LineStatusAll`",
    "camera.nodes": "other nodes, `Name=value`, set last in this order",
    "camera.trigger.source": "`Software`: the agent, every `takt_ms`; the camera's `Line1`, `Action1`, ...; `free_run`",
    "camera.trigger.activation": "of the line",
    "camera.trigger.delay_us": "from the trigger to the exposure",
    "camera.trigger.debounce_us": "shorter pulses on the line are none",
    "camera.trigger.counter": "of the camera, such as `Counter0`: counts triggers, those without a picture too",
    "camera.trigger.transfer_ms": "from the trigger to the frame: the deadline counts from the trigger",
    "camera.trigger.least_gap_ms": "exposures nearer to each other are counted and marked `early_trigger`; 0: none",
    "camera.white_balance.red": "`BalanceRatio` of red",
    "camera.white_balance.green": "of green",
    "camera.white_balance.blue": "of blue",
    "engine.kind": "`auto`: openvino on x86-64 where it is installed, else onnxruntime; `tensorrt`: [GPU](engines.md)",
    "engine.precision": "`bf16` on openvino only, where the [gate](engines.md#the-parity-gate) lets it; fit thresholds "
    "on it first. `f16` on tensorrt, its default",
    "engine.threads": "of one inference on the CPU",
    "engine.runtime": "tensorrt: Python module",
    "engine.workspace_mb": "tensorrt: device memory that compiling may use",
    "engine.cache": "tensorrt: folder of compiled plans",
    "engine.fallback": "tensorrt: `allow`: a CPU engine in f32 stands in where there is no GPU, and says so",
    "trigger.kind": "`modbus`: a PLC announces parts; `gpio`: a pin of this computer does",
    "trigger.least_gap_ms": "parts nearer to each other are counted (`parts_too_near`); 0: none",
    "trigger.host": "address of the PLC",
    "trigger.port": "of the PLC",
    "trigger.unit": "Modbus unit of the PLC",
    "trigger.signal": "`input`, `coil`: its rising edge is a part; `counter`: each step of a holding register",
    "trigger.address": "of the signal on the wire, from 0",
    "trigger.poll_ms": "between two questions to the PLC; less than `within_ms`",
    "trigger.answer_ms": "within which the PLC must answer",
    "trigger.within_ms": "a part that may have come longer ago is `frame_lost`, it is not pictured elsewhere",
    "trigger.chip": "of the pin",
    "trigger.line": "number of the pin on its chip",
    "trigger.active": "level of the pin while a part is there",
    "trigger.debounce_us": "shorter pulses are none",
    "output.kind": "`file`: one line per part, `trigger action ms-after-trigger`, as a gate would be told",
    "output.file": "file to append to",
    "output.at_ms": "from the trigger of a part until it is before the gate",
    "output.pulse_ms": "for which the gate stays open at most; below the takt",
    "output.host": "address of the PLC",
    "output.port": "of the PLC",
    "output.unit": "Modbus unit of the PLC",
    "output.coil": "address on the wire, from 0; on: the gate is open",
    "output.confirm_ms": "within which the PLC must confirm a write",
    "output.heartbeat_coil": "changes as long as the agent drives the gate; the PLC must watch it",
    "output.heartbeat_ms": "between two changes",
    "output.user_output": "output of the GenICam camera, on while the gate is open",
    "output.chip": "of the pin",
    "output.active": "level at which the gate is open",
    "output.line": "number of the pin on its chip",
    "mqtt.topic": "root of all topics, `{enterprise}/{site}/{area}/{line}/{cell}`; no wildcards, no empty levels",
    "mqtt.host": "name or address of the broker",
    "mqtt.port": "8883 by habit with TLS",
    "mqtt.protocol": "5, or 3 for brokers that know only MQTT 3.1.1",
    "mqtt.client_id": "unique at the broker",
    "mqtt.username": "user at the broker",
    "mqtt.password_file": "its first line is the password; needs `username`",
    "mqtt.ca_file": "given: TLS, and the broker's certificate is checked against it",
    "mqtt.cert_file": "the station's own certificate; needs `ca_file` and `key_file`",
    "mqtt.key_file": "private key of `cert_file`",
    "mqtt.keepalive_s": "a station that falls silent is `offline` after 1.5 times this",
    "mqtt.heatmaps": "publish heatmaps",
    "mqtt.consumers": "who must acknowledge each verdict (letters, digits, `_`, `-`, at most 32); none: the broker",
    "outbox.folder": "where verdicts wait, and the audit trail; a local disk that outlives a power cut",
    "outbox.heatmap_mb": "of heatmaps that wait; the oldest go first",
    "outbox.max_mb": "of verdicts that wait, 1.2 KB each; beyond it the station halts",
    "outbox.reserve_mb": "kept free on the disk for the last verdicts",
    "commands.allow": "what is carried out; needs `mqtt`",
    "commands.captures": "recordings made by `capture`",
    "commands.threshold_factor": "a commanded threshold lies between the recipe's own / this and * this",
    "archive.folder": "verdict lines and pictures of this station",
    "archive.pictures": "of which parts; `rejects`: parts without verdict too",
    "archive.max_mb": "of pictures; the oldest go first, also where the disk runs short",
    "archive.keep_days": "of verdict lines, a file a day; 0: for ever. 1.5 KB a part",
    "health.port": "on 127.0.0.1, for `taktsight-agent top` and Prometheus; 0: off; each station needs its own",
    "realtime.priority": "SCHED_FIFO for the inspect process; 0: never",
    "realtime.cpus": "of the inspect process; the publish process takes the others",
    "realtime.lock_memory": "nothing of the inspect process is ever paged out",
    "sparkplug.group": "Sparkplug group id",
    "sparkplug.edge_node": "Sparkplug edge node id",
    "sparkplug.device": "Sparkplug device id",
    "sparkplug.primary_host": "verdicts wait while this host application is offline",
}


@dataclass(frozen=True, slots=True)
class Key:
    """One key as its reader asks for it."""

    kind: str  # name of the reader
    default: Any = REQUIRED
    minimum: float | None = None
    maximum: float | None = None
    options: tuple[str, ...] = ()
    optional: bool = False  # somebody asked first whether it is given


class NotingSection(Section):
    """A section in which every key is given, and that notes how each is read."""

    def __init__(self, given: dict[str, Any], noted: dict[str, Key], path: str = "") -> None:
        super().__init__({}, path, Path())
        self._given, self._noted, self._asked = given, noted, set[str]()

    def number(
        self, key: str, default: Any = REQUIRED, *, minimum: float | None = None, maximum: float | None = None
    ) -> float:
        """Note a number."""
        self._note(key, Key("number", default, minimum, maximum))
        return float(self._answer(key, default, minimum or 0.0))

    def whole(self, key: str, default: Any = REQUIRED, *, minimum: int, maximum: int) -> int:
        """Note a whole number."""
        self._note(key, Key("whole", default, minimum, maximum))
        return int(self._answer(key, default, LIKELY.get(self._path + key, minimum)))

    def text(self, key: str, default: Any = REQUIRED) -> str:
        """Note text."""
        self._note(key, Key("text", default))
        return str(self._answer(key, default, LIKELY.get(self._path + key, "a")))

    def choice(self, key: str, options: Sequence[str], default: Any = REQUIRED) -> str:
        """Note one of options."""
        self._note(key, Key("choice", default, options=tuple(options)))
        return str(self._answer(key, default, options[0]))

    def flag(self, key: str, default: Any = REQUIRED) -> bool:
        """Note true or false."""
        self._note(key, Key("flag", default))
        return bool(self._answer(key, default, False))

    def whole_list(self, key: str, default: Sequence[int] = ()) -> tuple[int, ...]:
        """Note a list of whole numbers."""
        self._note(key, Key("whole_list", tuple(default)))
        return tuple(default)

    def text_list(self, key: str, default: Sequence[str] = ()) -> tuple[str, ...]:
        """Note a list of words."""
        self._note(key, Key("text_list", tuple(default)))
        return tuple(default)

    def path(self, key: str, default: Any = REQUIRED) -> Path | None:
        """Note a path."""
        self._note(key, Key("path", default))
        return None if default is None else Path("a")

    def section(self, key: str) -> Section:
        """Go on below key."""
        return NotingSection(self._given, self._noted, f"{self._path}{key}.")

    def has(self, key: str) -> bool:
        """Everything is given, for one camera."""
        self._asked.add(key)
        return key != CAMERAS

    def _note(self, key: str, found: Key) -> None:
        values = (found.kind, found.default, found.minimum, found.maximum, found.options)
        self._noted[self._path + key] = Key(*values, optional=key in self._asked)

    def _answer(self, key: str, default: Any, likely: Any) -> Any:
        return self._given.get(self._path + key, likely if default is REQUIRED else default)


def read_keys(**given: Any) -> dict[str, Key]:
    """Return how each key of a station with these values is read."""
    noted: dict[str, Key] = {}
    values = {"station": STATION, "recipes.unsigned": "allow", "takt_ms": 1000.0, **given}
    with mock.patch.object(agent.config, "read_settings", lambda *_: NotingSection(values, noted)):
        agent.config.read_station(Path("station.yaml"), b"")
    return noted


def keys_and_kinds() -> tuple[dict[str, Key], dict[str, tuple[str, ...]]]:
    """Return every key, and of those of a section that comes in kinds, the kinds with which it is read."""
    every: dict[str, Key] = {}
    kinds: dict[str, tuple[str, ...]] = {}
    for section in IN_KINDS:
        for kind in read_keys()[f"{section}.kind"].options:
            read = read_keys(**{f"{section}.kind": kind})
            every |= read
            for key in (key for key in read if key.startswith(f"{section}.")):
                kinds[key] = (*kinds.get(key, ()), kind)
    return every, kinds


def page() -> str:
    """Return the page. Raises ValueError where a key has no words, or a value no formula."""
    every, kinds = keys_and_kinds()
    lines = [
        "# station.yaml",
        "",
        "<!-- written by docs/make_reference.py from the code that reads the file: edit that -->",
        "",
        "Every key with type, range and default; an unknown key, a wrong type or a value out of range is an error that",
        "names the key (exit code 4). Relative paths start at the file's own folder. A name ends with its unit.",
        "`taktsight-agent doctor station.yaml` checks a file without running it. Several cameras in one file:",
        "[cameras](camera.md#several-cameras). The shortest one:",
        "",
        "```yaml",
        SHORTEST.rstrip(),
        "```",
    ]
    for section, title in SECTIONS.items():
        lines += ["", f"## {title}", ""]
        lines += [ABOUT[section], ""] if section in ABOUT else []
        lines += ["| key | type and range | default | |", "|---|---|---|---|"]
        for key in sorted(every, key=list(WORDS).index):
            if key.rpartition(".")[0] != section:
                continue
            every_kind = len(kinds.get(f"{key.partition('.')[0]}.kind", ()))
            some = f" ({', '.join(kinds[key])})" if key in kinds and len(kinds[key]) < every_kind else ""
            lines.append(f"| `{key}`{some} | {_span(key, every[key])} | {_default(key, every[key])} | {WORDS[key]} |")
    return "\n".join([*lines, ""])


def _span(key: str, found: Key) -> str:
    if key == "commands.allow":
        return "some of " + " ".join(f"`{name}`" for name in COMMANDS)
    if found.kind == "choice":
        return ", ".join(f"`{option}`" for option in found.options)
    if found.kind not in ("number", "whole"):
        return KINDS[found.kind]
    kind = "" if found.kind == "number" else "whole, "
    unit = UNITS.get(key.rpartition("_")[2], "") if "_" in key else ""
    return f"{kind}{_value(key, 'minimum')} to {_value(key, 'maximum')} {unit}".strip()


def _default(key: str, found: Key) -> str:
    if key in DEFAULTS:
        return DEFAULTS[key]
    if found.default is REQUIRED:
        return "none" if found.optional else "**needed**"
    if found.default in (None, ()):
        return "none"
    if found.kind in ("number", "whole"):
        return _value(key, "default")
    return f"`{str(found.default).lower() if found.kind == 'flag' else found.default}`"


def _value(key: str, field: str) -> str:
    """Return a limit or a default; where it changes with the takt, the formula that fits at every takt."""
    if (key, field) in NAMED:
        return NAMED[key, field]
    tries = [{"takt_ms": takt, "queue_length": queue} for takt in (1000.0, 2000.0) for queue in (4, 8)]
    values = [getattr(_with(given)[key], field) for given in tries]
    if len(set(values)) == 1 or key in tries[0]:
        return f"{values[0]:.12g}"
    for text, formula in FORMULAS.items():
        if all(abs(value - formula(given)) < 1e-9 for value, given in zip(values, tries, strict=True)):
            return text
    raise ValueError(f"{key}: {field} is {values} for {tries}: add the formula to FORMULAS")


def _with(given: dict[str, Any]) -> dict[str, Key]:
    return {
        key: found
        for section in IN_KINDS
        for kind in read_keys()[f"{section}.kind"].options
        for key, found in read_keys(**{**given, f"{section}.kind": kind}).items()
    }


def main() -> None:
    """Write the page; a file that reads it as a station would shows that SHORTEST is one."""
    with tempfile.NamedTemporaryFile(suffix=".yaml") as file:
        Path(file.name).write_text(SHORTEST, encoding="utf-8")
        try:
            agent.config.read_station(Path(file.name))
        except TaktsightError as error:
            sys.exit(f"the shortest station.yaml is none: {error}")
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
