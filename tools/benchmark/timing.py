"""How long a call or a process takes."""

import os
import resource
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tools.benchmark.report import ROOT


@dataclass(frozen=True)
class Timing:
    """What a process took.

    Attributes:
        clock: seconds from its start to its end.
        processor: seconds of all processors, its children's included.
        output: what it printed.
    """

    clock: float
    processor: float
    output: str


def timed(command: Sequence[str], *, threads: int | None = None) -> Timing:
    """Run a process in the project's folder, with so many threads for PyTorch's products.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    limit = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    began, before = time.perf_counter(), processor_seconds()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | limit)
    timing = Timing(time.perf_counter() - began, processor_seconds() - before, done.stdout)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    return timing


def seconds(work: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def processor_seconds() -> float:
    """What all children that have ended took."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
