"""What keeps a Python process on its beat: a scheduler that lets it go first, a still heap, memory that stays.

Measured (20 Hz, lateness p99): 1.5 ms as it comes, 0.2 ms with SCHED_FIFO; with 1.2 million objects on the heap and the
garbage collector at work 173 ms, 20 ms after `gc.freeze`.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import resource
from dataclasses import dataclass

import cv2

log = logging.getLogger(__name__)

LOCK_NOW, LOCK_LATER = 1, 2  # mlockall(2): MCL_CURRENT, MCL_FUTURE
YOUNG_EVERY, ALL_EVERY = 16, 1024  # parts between two collections
PUBLISH_NICE = 5
PRIORITY = 20  # where nobody asks for another: above ordinary threads, below the kernel's for interrupts (50)


@dataclass(frozen=True, slots=True)
class RealtimeSettings:
    """What station.yaml says; the defaults take what the service manager allows."""

    priority: int | None = (
        None  # 1..99: SCHED_FIFO for the inspect process; 0: as started; None: see `allowed_priority`
    )
    cpus: tuple[int, ...] = ()  # for the inspect process alone; none: as started
    lock_memory: bool = False  # nothing of the inspect process is ever paged out


def go_first(settings: RealtimeSettings) -> list[str]:
    """Give this thread, and every one that it starts from now on, what the settings ask; return what was refused.

    OpenCV keeps to one thread: registration is as quick (3.3 ms with one or two), and waits for nobody.
    """
    cv2.setNumThreads(1)
    refused = []
    if settings.cpus:
        try:
            os.sched_setaffinity(0, settings.cpus)
        except (OSError, ValueError, OverflowError) as error:  # there is no such number
            why = error.strerror if isinstance(error, OSError) else error
            refused.append(f"realtime.cpus {list(settings.cpus)}: {why}: name CPUs of this machine")
    priority = allowed_priority() if settings.priority is None else settings.priority
    if priority:
        try:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
        except OSError as error:
            refused.append(
                f"realtime.priority {priority}: {error.strerror}: raise LimitRTPRIO, or ask for 0 where the kernel "
                "allows none (doctor, real_time)"
            )
    if settings.lock_memory and ctypes.CDLL(None, use_errno=True).mlockall(LOCK_NOW | LOCK_LATER) != 0:
        refused.append(f"realtime.lock_memory: {os.strerror(ctypes.get_errno())}: raise LimitMEMLOCK")
    for line in refused:
        log.warning("%s", line)
    return refused


def allowed_priority() -> int:
    """Return the priority of a station that names none: 20, or less where RLIMIT_RTPRIO is less; 0 by hand.

    A root's shell could have any, but its limit is 0: what runs there is a trial beside other work.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_RTPRIO)
    return PRIORITY if limit == resource.RLIM_INFINITY else min(PRIORITY, limit)


def step_back(settings: RealtimeSettings) -> None:
    """Let this process go last: ordinary scheduling, on CPUs that the inspect process does not have for itself."""
    others = set(range(os.cpu_count() or 1)) - set(settings.cpus)
    try:
        if os.sched_getscheduler(0) != os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        if os.getpriority(os.PRIO_PROCESS, 0) < PUBLISH_NICE:  # one that was started nicer stays so
            os.setpriority(os.PRIO_PROCESS, 0, PUBLISH_NICE)
        if settings.cpus and others:
            os.sched_setaffinity(0, others)
    except OSError as error:  # a container, a cpuset, a filter of system calls
        log.warning("the publish process goes as the inspect process does: %s", error)


class StillHeap:
    """Garbage collection at moments of our own choice. One process has one, and `rested` one thread."""

    def __init__(self) -> None:
        self._parts = 0

    def freeze(self) -> None:
        """Take what is there by now out of every later collection, and collect no more by itself."""
        gc.collect()
        gc.freeze()
        gc.disable()

    def rested(self) -> None:
        """Collect what few parts left behind: after a verdict, before the next frame."""
        self._parts += 1
        if self._parts % ALL_EVERY == 0:
            gc.collect()
        elif self._parts % YOUNG_EVERY == 0:
            gc.collect(0)
