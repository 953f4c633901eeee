"""What `deadline.py` reads from a run that is over, and what it makes of it."""

from __future__ import annotations

import json
import re
import sqlite3
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.line.pipeline import STAGES
from agent.publishing.verdict_files import newest_lines

PATH = "trigger to verdict"
NOT_LOOKED_AT = ("late", "frame_lost", "overrun")  # reasons that say nothing of the part
SETTLED_S = 60.0  # of a run, until its memory is what it stays at


@dataclass(frozen=True)
class Case:
    """One way to make it hard."""

    name: str
    file: str  # name of its folder
    hog: bool = False  # a process at 100 % on every core
    heap: bool = False  # 1.2 million objects in the inspect process, and a thread that makes more
    priority: int = 0  # SCHED_FIFO of the inspect process; 0: as any other


@dataclass(frozen=True)
class Sample:
    """The two processes at one moment."""

    at_s: float
    inspect_mib: float
    publish_mib: float
    inspect_own_mib: (
        float  # of it, what is shared with nobody: growth here is a leak, growth of the whole may be the ring
    )
    publish_own_mib: float
    cpu_s: float  # of both since their start


@dataclass(frozen=True)
class Said:
    """What the same pipeline says of a frame at leisure, and the truth about its part."""

    outcome: str
    reason: str
    score: float | None
    is_defective: bool


@dataclass(frozen=True)
class Run:
    """A case, measured. One entry per part in each list."""

    case: Case
    takt_ms: float
    deadline_ms: float
    triggers: int  # as the agent counted them
    verdicts: list[dict[str, Any]]  # of the archive
    gate: list[tuple[int, str, float]]  # trigger, action, ms after the trigger
    mes: list[int]  # triggers in the MES's database
    samples: list[Sample] = field(default_factory=list)


def read_run(case: Case, folder: Path, takt_ms: float, deadline_ms: float, samples: list[Sample]) -> Run:
    """Return what a run left in its folder."""
    counted = re.search(r"(\d+) triggers, \d+ verdicts", (folder / "agent.log").read_text(encoding="utf-8"))
    if counted is None:
        raise SystemExit(f"{folder / 'agent.log'}: the agent did not end in order")
    lines = reversed(list(newest_lines(folder / "archive")))
    gate = [line.split() for line in (folder / "gate.txt").read_text(encoding="ascii").splitlines()]
    with sqlite3.connect(folder / "mes.sqlite") as database:
        mes = [row[0] for row in database.execute("SELECT trigger FROM verdict WHERE trigger IS NOT NULL")]
    return Run(
        case=case,
        takt_ms=takt_ms,
        deadline_ms=deadline_ms,
        triggers=int(counted[1]),
        verdicts=[json.loads(line) for line in lines if line],
        gate=[(int(trigger), action, float(after_ms)) for trigger, action, after_ms in gate],
        mes=mes,
        samples=samples,
    )


def complaints(run: Run) -> list[str]:
    """Return where triggers, archive, gate and MES do not agree; nothing where every trigger is once in each."""
    wanted = Counter(range(1, run.triggers + 1))
    places = {
        "archive": Counter(message["trigger"] for message in run.verdicts),
        "gate": Counter(trigger for trigger, _, _ in run.gate),
        "MES": Counter(run.mes),
    }
    found = []
    for place, there in places.items():
        missing, extra = wanted - there, there - wanted
        if missing or extra:
            found.append(f"{place}: {missing.total()} missing {_few(missing)}, {extra.total()} too many {_few(extra)}")
    actions = {trigger: action for trigger, action, _ in run.gate}
    differ = [one["trigger"] for one in run.verdicts if actions.get(one["trigger"], "") != one["lineAction"]]
    if differ:
        found.append(f"gate: {len(differ)} actions are not the verdict's {differ[:5]}")
    return found


def wrong(run: Run, said: Sequence[Said]) -> list[int]:
    """Return triggers whose verdict is not what the pipeline says of the same frame at leisure.

    said: of the frames that come round. A part that nobody looked at in time is late, not wrong.
    """
    return [
        one["trigger"]
        for one in run.verdicts
        if one["reason"] not in NOT_LOOKED_AT
        and (one["outcome"], one["reason"])
        != (said[(one["trigger"] - 1) % len(said)].outcome, said[(one["trigger"] - 1) % len(said)].reason)
    ]


def reasons(run: Run) -> Counter[str]:
    """Return how many parts had no verdict, by reason."""
    return Counter(one["reason"] for one in run.verdicts if one["outcome"] == "no_verdict")


def is_late(run: Run) -> NDArray[np.bool_]:
    """Return which parts were late, in the order of `durations`; one may be given up before its deadline."""
    messages = sorted(run.verdicts, key=lambda message: message["trigger"])
    return np.array([one["reason"] == "late" for one in messages], np.bool_)


def judged(run: Run, said: Sequence[Said]) -> tuple[int, int]:
    """Return how many defective parts passed and how many good ones were rejected: the detector's doing."""
    truth = [(said[(one["trigger"] - 1) % len(said)].is_defective, one["outcome"]) for one in run.verdicts]
    return truth.count((True, "pass")), truth.count((False, "reject"))


def durations(run: Run) -> dict[str, NDArray[np.float64]]:
    """Return milliseconds by what took them, the whole first; of a late part, those stages that it came through.

    waiting: the camera (2 ms of exposure), queues and threads. overhead: all stages less engine and registration.
    """
    messages = sorted(run.verdicts, key=lambda message: message["trigger"])
    times = [one["processingTimes"]["stageMs"] for one in messages]
    whole = [one for one in messages if one["reason"] == "score"]
    stage_ms = {stage: [one[stage] for one in times if stage in one] for stage in STAGES}
    measured = {
        PATH: [one["latencyMs"] for one in messages],
        "trigger to gate": [after_ms for _, _, after_ms in run.gate],
        "waiting": [one["latencyMs"] - one["processingTimes"]["processingDuration"] for one in whole],
        **stage_ms,
        "overhead": [_overhead_ms(one["processingTimes"]["stageMs"]) for one in whole],
        "clock lateness": list(lateness_ms(run)),
    }
    return {name: np.array(values) for name, values in measured.items() if values}


def _overhead_ms(stage_ms: dict[str, float]) -> float:
    return sum(stage_ms.values()) - stage_ms["engine"] - stage_ms["registration"]


def lateness_ms(run: Run) -> NDArray[np.float64]:
    """Return how late each trigger was given, after the beat of `agent.line.loop`; the most punctual counts as 0."""
    given = sorted(one["monotonicMs"] - one["latencyMs"] for one in run.verdicts)
    late, due = [], given[0]
    for moment, following in zip(given, [*given[1:], 0.0], strict=True):
        late.append(moment - due)
        due += run.takt_ms
        if due < moment:  # the line does not catch up in a burst
            due = following
    return np.array(late) - min(late)


def percentiles(values: NDArray[np.float64]) -> tuple[float, float, float, float]:
    """Return p50, p99, p99.9 and the maximum; each percentile is a value that came, none between two."""
    p50, p99, p999 = np.percentile(values, [50, 99, 99.9], method="inverted_cdf")
    return float(p50), float(p99), float(p999), float(values.max())


def growth_mib_per_minute(samples: Sequence[Sample], attribute: str) -> float | None:
    """Return how fast a process grows, by least squares; None of a run that is too short to tell."""
    first_s = samples[0].at_s if samples else 0.0
    steady = [one for one in samples if one.at_s - first_s >= SETTLED_S]
    if len(steady) < 5:
        return None
    minutes = [one.at_s / 60 for one in steady]
    return float(np.polyfit(minutes, [getattr(one, attribute) for one in steady], 1)[0])


def cores_used(samples: Sequence[Sample]) -> float | None:
    """Return how many cores both processes kept busy; None of a run that is too short to tell."""
    if len(samples) < 2:
        return None
    return (samples[-1].cpu_s - samples[0].cpu_s) / (samples[-1].at_s - samples[0].at_s)


def _few(triggers: Counter[int]) -> list[int]:
    return sorted(triggers)[:5]
