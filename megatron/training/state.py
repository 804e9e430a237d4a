"""What a run changes as it goes, and what its checkpoints therefore hold."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from megatron.config import RunConfig
from megatron.optim.groups import build_optimizer
from megatron.optim.loss_scale import LossScale, build_loss_scale
from megatron.optim.schedule import ParameterSchedule
from megatron.parallel.build import ParallelModel

AVERAGED_ITERATIONS = 50


@dataclass
class LossAverage:
    """Running average of the training loss: the mean of the first `AVERAGED_ITERATIONS`, then an exponential one.

    Attributes:
        count: iterations averaged so far.
        mean: of their losses.
    """

    count: int = 0
    mean: float = 0.0

    def add(self, loss: float) -> None:
        """Take the loss of one more iteration in."""
        self.count += 1
        self.mean += (loss - self.mean) / min(self.count, AVERAGED_ITERATIONS)


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        iteration: the last one.
        consumed_samples: that were trained on; the schedules and the batch size are functions of it.
        skipped_samples: that were passed over by `--rewind_on_spike`; the next batch is the one after both.
        rewinds: how often that happened.
        average_loss: by which it is judged.
        saved_iteration: of the last checkpoint; None before there is one.
    """

    iteration: int = 0
    consumed_samples: int = 0
    skipped_samples: int = 0
    rewinds: int = 0
    average_loss: LossAverage = field(default_factory=LossAverage)
    saved_iteration: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint stores (JSON values)."""
        stored = asdict(self)
        del stored["saved_iteration"]
        return stored

    @classmethod
    def restored(cls, iteration: int, stored: Mapping[str, Any]) -> "Progress":
        """That of the checkpoint of `iteration`, with what it stores; one written by older versions stores less.

        Raises:
            TypeError: it stores other things than numbers.
        """
        counts = [stored["consumed_samples"], stored.get("skipped_samples", 0), stored.get("rewinds", 0)]
        if not all(type(count) is int and count >= 0 for count in counts):
            raise TypeError(f"{counts} are no numbers of samples and rewinds")
        average = LossAverage(**stored.get("average_loss", {}))
        consumed, skipped, rewinds = counts
        return cls(iteration, consumed, skipped, rewinds, average, saved_iteration=iteration)

    @property
    def position(self) -> int:
        """Samples of the data that lie behind: which batch comes next is a function of it and of the batch size."""
        return self.consumed_samples + self.skipped_samples


@dataclass
class TrainingState:
    """Weights, optimizer, schedule, loss scale and progress."""

    model: ParallelModel
    optimizer: torch.optim.Optimizer
    schedule: ParameterSchedule
    loss_scale: LossScale
    progress: Progress = field(default_factory=Progress)

    @classmethod
    def of(cls, config: RunConfig, model: ParallelModel, global_batch_size: int) -> "TrainingState":
        """That of a run before its first step; `global_batch_size` is the full one."""
        return cls(
            model,
            build_optimizer(model.chunks, config.optimizer),
            ParameterSchedule(config.optimizer, config.schedule, config.training, global_batch_size),
            build_loss_scale(config.precision),
        )
