"""The agent in a process that holds 1.2 million objects more and goes on making them, as an application around it does.

    python benchmarks/deadline_heap.py run STATION.yaml --count 100

Everything after the program's name goes to taktsight-agent. Used by `deadline.py`.
"""

from __future__ import annotations

import threading
import time

OBJECTS = 1_200_000  # lists, which the garbage collector looks at; about 110 MB
AT_ONCE, EVERY_S = 500, 0.01  # half of them in cycles, which nothing but the collector frees


def main() -> None:
    kept = [[number] for number in range(OBJECTS)]
    threading.Thread(target=allocate, name="application", daemon=True).start()
    from agent.__main__ import main as agent

    agent()
    assert len(kept) == OBJECTS  # they lived to the end


def allocate() -> None:
    """Make objects and drop them, for ever."""
    while True:
        made: list[list[object]] = [[] for _ in range(AT_ONCE)]
        for one in made[::2]:
            one.append(one)
        time.sleep(EVERY_S)


if __name__ == "__main__":
    main()
