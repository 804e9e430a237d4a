"""`finetune.py` that meets faults: in this process, or as a script for torchrun, FAULT RANK ITERATION and its flags."""

import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from tiny_runs import ROOT, finetune

from megatron.config import run_entry
from megatron.parallel.engine import BatchLoss
from megatron.training.trainer import Trainer


def fail(error: Exception) -> None:
    raise error


FAULTS: dict[str, Callable[[], object]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "bug": lambda: fail(KeyError("planted")),
    "damaged": lambda: fail(ValueError("planted")),
    "stuck": lambda: threading.Event().wait(),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "SIGUSR1": lambda: os.kill(os.getpid(), signal.SIGUSR1),
    "SIGINT": lambda: os.kill(os.getpid(), signal.SIGINT),
    "told": lambda: print("told", flush=True),
    "cut": lambda: subprocess.run(["ip", "link", "set", os.environ["CABLE"], "down"], check=True),
}
"""Name -> what happens while a batch is read."""


class FaultyBatches:
    """Batches of which the `countdown`-th brings the fault, and which know where the last one began."""

    def __init__(self, batches: Any, fault: Callable[[], object] | None = None, countdown: int = 0) -> None:
        self._batches, self._fault, self._countdown = batches, fault, countdown
        self.stream = batches.stream
        self.position = 0

    def batch(self, position: int, size: int) -> Any:
        self._countdown -= 1
        if self._fault and not self._countdown:
            self._fault()
        self.position = position
        return self._batches.batch(position, size)


@contextmanager
def changed_training(change: Callable[[Trainer], None]) -> Iterator[None]:
    """Let `change` do something to each trainer before it begins."""
    train = Trainer.train

    def changed(self: Trainer) -> str | None:
        change(self)
        return train(self)

    Trainer.train = changed  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trainer.train = train  # type: ignore[method-assign]


@contextmanager
def fault_in(iteration: int, fault: str, rank: int) -> Iterator[None]:
    """Let `rank` meet a fault in `iteration`, in the first start by torchrun."""

    def plant(trainer: Trainer) -> None:
        is_met = int(os.environ.get("RANK", "0")) == rank and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        countdown = iteration - trainer.state.progress.iteration
        trainer.batches = FaultyBatches(trainer.batches, FAULTS[fault] if is_met else None, countdown)  # type: ignore

    with changed_training(plant):
        yield


def with_fault(fault: str, rank: int, iteration: int, argv: list[str]) -> tuple[int, str]:
    """`finetune`, where `rank` meets a fault in `iteration`."""
    with fault_in(iteration, fault, rank):
        return finetune(argv)


def with_evaluation_fault(fault: str, rank: int, batch: int, argv: list[str]) -> tuple[int, str]:
    """`finetune`, where `rank` meets a fault in a batch of a validation."""

    def plant(trainer: Trainer) -> None:
        if int(os.environ.get("RANK", "0")) == rank:
            datasets: Any = trainer.evaluator.batches["validation"]
            datasets.update({name: FaultyBatches(one, FAULTS[fault], batch) for name, one in datasets.items()})

    with changed_training(plant):
        return finetune(argv)


def with_losses(factor: float, positions: Collection[int], argv: list[str]) -> tuple[int, str]:
    """`finetune`, where the loss of batches that begin at some positions of the data is `factor` times what it is."""

    def plant(trainer: Trainer) -> None:
        batches = FaultyBatches(trainer.batches)
        compute = trainer.engine.forward_backward

        def forward_backward(*args: Any) -> BatchLoss:
            loss = compute(*args)
            return replace(loss, mean=loss.mean * factor) if batches.position in positions else loss

        trainer.batches, trainer.engine.forward_backward = batches, forward_backward  # type: ignore[method-assign,assignment]

    with changed_training(plant):
        return finetune(argv)


def without_samples(start: int, count: int, argv: list[str]) -> tuple[int, str]:
    """`finetune` on the data without `count` samples from position `start` on."""

    class Shortened(FaultyBatches):
        def batch(self, position: int, size: int) -> Any:
            return super().batch(position + count * (position >= start), size)

    def plant(trainer: Trainer) -> None:
        trainer.batches = Shortened(trainer.batches)  # type: ignore[assignment]

    with changed_training(plant):
        return finetune(argv)


if __name__ == "__main__":
    main = runpy.run_path(str(ROOT / "finetune.py"))["main"]
    with fault_in(int(sys.argv[3]), sys.argv[1], int(sys.argv[2])):
        sys.exit(run_entry(main, sys.argv[4:]))
