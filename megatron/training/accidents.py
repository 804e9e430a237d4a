"""Iterations whose loss or gradient cannot be right: they are noted with their samples, and too many end the run."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron.config import CommonError, RunConfig
from megatron.training.state import LossAverage, Progress

ACCIDENTS_FILE = "accidents.jsonl"
LOSS, GRADIENT, SPIKE = "loss not finite", "gradient not finite", "loss spike"
NON_FINITE = (LOSS, GRADIENT)
LEAST_AVERAGED = 10
"""Iterations that a running average must be of to judge a loss by it."""


def non_finite(loss: float, grad_norm: float, scale_can_shrink: bool) -> str | None:
    """What is not finite; None also where that is how the loss scale of fp16 is found."""
    if not math.isfinite(loss):
        return LOSS
    return None if math.isfinite(grad_norm) or scale_can_shrink else GRADIENT


def is_spike(loss: float, average: LossAverage, factor: float) -> bool:
    """Whether a finite loss is more than `factor` (`--rewind_on_spike`) times its running average."""
    return average.count >= LEAST_AVERAGED and factor * average.mean < loss < math.inf


@dataclass(kw_only=True)
class Accidents:
    """Notes each accident, and counts.

    Attributes:
        folder: where `accidents.jsonl` is written; None: the log alone tells.
        is_main: whether this rank writes.
        most_in_a_row: non-finite iterations (`--max_consecutive_skips`).
        say: writes to the log.
    """

    folder: Path | None
    is_main: bool
    most_in_a_row: int
    say: Callable[[str], None]
    _in_a_row: int = 0

    @classmethod
    def of(cls, config: RunConfig, *, is_main: bool, say: Callable[[str], None]) -> "Accidents":
        """Those of a run."""
        return cls(
            folder=Path(config.checkpoint.save) if config.checkpoint.save else None,
            is_main=is_main,
            most_in_a_row=config.training.max_consecutive_skips,
            say=say,
        )

    def note(self, kind: str, progress: Progress, samples: list[str], loss: float, grad_norm: float) -> None:
        """Write one accident down.

        Args:
            kind: what is wrong.
            progress: after the iteration.
            samples: of its global batch, where they are in the data.
            loss: of the batch.
            grad_norm: of its gradient.
        """
        record = {
            "kind": kind,
            "iteration": progress.iteration,
            "consumed_samples": progress.consumed_samples,
            "skipped_samples": progress.skipped_samples,
            "loss": _json(loss),
            "grad_norm": _json(grad_norm),
            "samples": samples,
        }
        where = ""
        if self.folder:
            file = self.folder / ACCIDENTS_FILE
            where = f"; its samples are in {file}"
            if self.is_main:
                _append(file, json.dumps(record))
        self.say(f"iteration {progress.iteration}: {kind} (loss {loss:.4g}, grad norm {grad_norm:.4g}){where}")

    def count(self, non_finite: bool, iteration: int) -> None:
        """Count an iteration that was to change the weights.

        Raises:
            CommonError: it is one too many in a row that could not.
        """
        self._in_a_row = self._in_a_row + 1 if non_finite else 0
        if self._in_a_row < self.most_in_a_row:
            return
        first = iteration - self._in_a_row + 1
        raise CommonError(
            f"loss or gradient were not finite in {self._in_a_row} iterations in a row, {first} to {iteration} "
            "(--max_consecutive_skips); the weights were left as they were before, and this end is not saved. Look at "
            "the samples, lower --lr, train in --bf16, or go on from an older checkpoint by --load_iters"
        )


def _json(number: float) -> float | str:
    """JSON has no numbers that are not finite."""
    return number if math.isfinite(number) else str(number)


def _append(file: Path, line: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        stream.write(line + "\n")
        stream.flush()
        os.fsync(stream.fileno())
