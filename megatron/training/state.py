"""What a run changes as it goes, and what its checkpoints therefore hold."""

from dataclasses import dataclass, field

import torch

from megatron.optim.loss_scale import LossScale
from megatron.optim.schedule import ParameterSchedule
from megatron.parallel.build import ParallelModel


@dataclass
class Progress:
    """Where a run stands. `consumed_samples` is all there is to know of the data: batches are a function of it."""

    iteration: int = 0
    consumed_samples: int = 0
    saved_iteration: int | None = None


@dataclass
class TrainingState:
    """Weights, optimizer, schedule, loss scale and progress."""

    model: ParallelModel
    optimizer: torch.optim.Optimizer
    schedule: ParameterSchedule
    loss_scale: LossScale
    progress: Progress = field(default_factory=Progress)
