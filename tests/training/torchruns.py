"""Real runs under torchrun."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOTS = (HERE.parents[1], HERE.parent, HERE)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(map(str, ROOTS))}
TWO_RANKS = ("--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "--nproc_per_node", "2")
MOST_SECONDS = 150

Run = subprocess.Popen[str]


def start(
    fault: str,
    iteration: int,
    argv: Sequence[str],
    *,
    rank: int = 1,
    options: Sequence[str] = TWO_RANKS,
    before: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Run:
    """Start `finetune.py` under torchrun; a rank meets a fault in an iteration.

    Args:
        fault: a key of `FAULTS`.
        iteration: from 1.
        argv: its flags.
        rank: that meets it.
        options: torchrun's.
        before: the command that runs torchrun, with its arguments.
        environment: further variables.
    """
    command = [*before, sys.executable, "-m", "torch.distributed.run", *options, str(HERE / "faulty_finetune.py")]
    return subprocess.Popen(
        [*command, fault, str(rank), str(iteration), *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**ENVIRONMENT, **(environment or {})},
    )


def finish(run: Run) -> tuple[int, str]:
    """Exit code and further output; a run that does not end is ended."""
    try:
        output, _ = run.communicate(timeout=MOST_SECONDS)
    finally:
        for pid in [*children(run), run.pid] if run.poll() is None else []:
            os.kill(pid, 9)
    return run.returncode, output


def read_until(run: Run, text: str) -> str:
    """The output up to the first line with `text`."""
    assert run.stdout
    lines = []
    for line in run.stdout:
        lines.append(line)
        if text in line:
            break
    return "".join(lines)


def children(run: Run) -> list[int]:
    """Its processes: the ranks."""
    return [int(word) for word in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
