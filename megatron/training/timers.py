"""Timers for parts of a step, by level of detail, reported across ranks.

timers = Timers(LoggingConfig(timing_log_level=2))
with timers("forward-backward", level=1):
    with timers("forward", level=2):
        ...
report = timers.report(gather, iterations=10)
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from megatron.config import LoggingConfig

Gather = Callable[[list[float]], Sequence[Sequence[float]]]
"""One rank's numbers -> every rank's numbers, in rank order."""


@dataclass
class _Total:
    depth: int
    seconds: float = 0.0


class Timers:
    """Named, nestable timers.

    Levels above `--timing_log_level` cost nothing. `synchronize` is called at both ends of a timed part, to wait for
    work that a device still has queued. All ranks must time the same names in the same order.

    Attributes:
        layout: lays out what `milliseconds` returns, by `--timing_log_option`.
    """

    def __init__(
        self,
        logging: LoggingConfig,
        clock: Callable[[], float] = time.perf_counter,
        synchronize: Callable[[], None] | None = None,
    ) -> None:
        self._level = logging.timing_log_level
        self.layout = LAYOUTS[logging.timing_log_option]
        self._clock = clock
        self._synchronize = synchronize
        self._totals: dict[str, _Total] = {}
        self._depth = 0

    @contextmanager
    def __call__(self, name: str, level: int = 0) -> Iterator[None]:
        """Time the body and add it to `name`."""
        if level > self._level:
            yield
            return
        total = self._totals.setdefault(name, _Total(self._depth))
        start = self._now()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            total.seconds += self._now() - start

    def _now(self) -> float:
        if self._synchronize:
            self._synchronize()
        return self._clock()

    def milliseconds(self, gather: Gather, iterations: int = 1) -> dict[str, list[float]]:
        """Name -> milliseconds an iteration on each rank, in the order the timers first ran; the timers start anew.

        Dots before a name say how deep it is nested. Empty if nothing was timed.
        """
        totals, self._totals = self._totals, {}
        mine = [1000.0 * total.seconds / iterations for total in totals.values()]
        ranks = gather(mine)
        names = [". " * total.depth + name for name, total in totals.items()]
        return {name: [float(rank[i]) for rank in ranks] for i, name in enumerate(names)}


def _largest(times: dict[str, list[float]]) -> str:
    lines = [f"    {name + ' ':.<48}: {max(ranks):.2f}" for name, ranks in times.items()]
    return "\n".join(["max time across ranks (ms):", *lines])


def _smallest_largest(times: dict[str, list[float]]) -> str:
    lines = [f"    {name + ' ':.<48}: ({min(ranks):.2f}, {max(ranks):.2f})" for name, ranks in times.items()]
    return "\n".join(["(min, max) time across ranks (ms):", *lines])


def _each(times: dict[str, list[float]]) -> str:
    lines = ["times across ranks (ms):"]
    for name, ranks in times.items():
        lines.append(f"  {name}:")
        lines += [f"     rank {rank:2d}: {milliseconds:.2f}" for rank, milliseconds in enumerate(ranks)]
    return "\n".join(lines)


LAYOUTS = {"max": _largest, "minmax": _smallest_largest, "all": _each}
"""`--timing_log_option` -> layout of the report."""
