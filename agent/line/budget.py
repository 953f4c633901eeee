"""What is left out so that a verdict is there at its deadline.

Stages that people can do without are declared in `CUTTABLE`, in the order in which they go. Each is left out of a
part where it would not be done in time, judged by its slowest among the last parts; a stage that a verdict needs is not
begun where even its quickest would end too late: the time belongs to the next part.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable

CUTTABLE = ("regions",)
"""`regions`: where a part is unlike good ones. A detector whose graph is run in steps will add its later steps."""

REMEMBERED = 64  # parts that a stage's cost is judged by
FEWEST = 8  # before that nothing is known
DECIDE_NS = 500_000  # from the last stage to the gate: settling, and a thread switch


class Costs:
    """How long each stage took on the last parts. One thread."""

    def __init__(self) -> None:
        self._ns: defaultdict[str, deque[int]] = defaultdict(lambda: deque(maxlen=REMEMBERED))

    def note(self, stage: str, duration_ns: int) -> None:
        """Remember a duration."""
        self._ns[stage].append(duration_ns)

    def forget(self, stages: tuple[str, ...]) -> None:
        """Forget the oldest few of each: what is not done is not measured either, and must be tried again soon."""
        for stage in stages:
            for _ in range(min(FEWEST, len(self._ns[stage]))):
                self._ns[stage].popleft()

    def most_ns(self, stages: tuple[str, ...]) -> int:
        """Return what these stages took at most, all together; 0 while too little is known."""
        return sum(max(self._ns[stage]) for stage in stages if len(self._ns[stage]) >= FEWEST)

    def least_ns(self, stages: tuple[str, ...]) -> int:
        """Return what these stages took at least, all together; 0 while too little is known."""
        return sum(min(self._ns[stage]) for stage in stages if len(self._ns[stage]) >= FEWEST)


class Budget:
    """The time that one part has left."""

    def __init__(
        self,
        deadline_ns: int | None,
        costs: Costs,
        *,
        cuttable: tuple[str, ...] = CUTTABLE,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """deadline_ns: time.monotonic_ns() by which the verdict must be there; None: there is no hurry."""
        self._deadline_ns = deadline_ns
        self._costs = costs
        self._cuttable = cuttable
        self._monotonic_ns = monotonic_ns
        self.cut: list[str] = []  # in the order in which they were left out

    def is_hopeless(self, *stages: str) -> bool:
        """Return True if these stages cannot be done in time, even if they are as quick as they were of late."""
        if self._left_ns() >= self._costs.least_ns(stages):
            return False
        self._costs.forget(stages)
        return True

    def allows(self, stage: str) -> bool:
        """Return whether there is time for a cuttable stage and those that go after it; note it if there is not.

        What goes first is judged together with what goes later: the later one is worth more.
        """
        together = self._cuttable[self._cuttable.index(stage) :]
        if self._left_ns() >= self._costs.most_ns(together):
            return True
        self._costs.forget(together)
        self.cut.append(stage)
        return False

    def _left_ns(self) -> float:
        if self._deadline_ns is None:
            return float("inf")
        return self._deadline_ns - DECIDE_NS - self._monotonic_ns()
