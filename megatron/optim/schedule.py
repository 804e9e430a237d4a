"""Learning rate and weight decay as pure functions of the samples consumed so far.

All lengths are counted in samples, so a schedule means the same whatever the batch size; iterations given by flags
count `global_batch_size` samples each. A step is taken with the values at the samples consumed *before* it; the log
shows the values at the samples consumed *after* it.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from megatron.config import OptimizerConfig, ScheduleConfig, TrainingConfig, UsageError

FLAGS = {
    "max_learning_rate": "--lr",
    "min_learning_rate": "--min_lr",
    "warmup_samples": "--lr_warmup_iters (or --lr_warmup_samples, --lr_warmup_fraction), in samples,",
    "decay_samples": "--lr_decay_iters (or --lr_decay_samples, --train_iters), in samples,",
    "decay_style": "--lr_decay_style",
    "start_weight_decay": "--start_weight_decay (or --weight_decay)",
    "end_weight_decay": "--end_weight_decay (or --weight_decay)",
    "weight_decay_samples": "--train_iters (or --train_samples), in samples of weight-decay increment,",
    "weight_decay_style": "--weight_decay_incr_style",
}
"""Field of `ScheduleValues` -> the flags it comes from, for messages."""


@dataclass(frozen=True, kw_only=True)
class ScheduleValues:
    """What defines a schedule; lengths in samples. A length without effect (constant style) is 0."""

    max_learning_rate: float
    min_learning_rate: float
    warmup_samples: float
    decay_samples: int
    decay_style: str
    start_weight_decay: float
    end_weight_decay: float
    weight_decay_samples: int
    weight_decay_style: str


class ParameterSchedule:
    """The learning rate and weight decay of a run, with Megatron's rules.

    `global_batch_size` is the full one: with a batch size ramp-up, iterations still count that many samples.
    Raises `UsageError` for lengths or values that contradict each other.
    """

    def __init__(
        self, optimizer: OptimizerConfig, schedule: ScheduleConfig, training: TrainingConfig, global_batch_size: int
    ) -> None:
        self.values = _resolve(optimizer, schedule, training, global_batch_size)

    def learning_rate(self, steps: int) -> float:
        """The learning rate after `steps` consumed samples."""
        values = self.values
        if values.warmup_samples > 0 and steps <= values.warmup_samples:
            return values.max_learning_rate * steps / values.warmup_samples
        if values.decay_style == "constant":
            return values.max_learning_rate
        if steps > values.decay_samples:
            return values.min_learning_rate
        return DECAYS[values.decay_style](values, steps)

    def weight_decay(self, steps: int) -> float:
        """The weight decay after `steps` consumed samples."""
        values = self.values
        if values.weight_decay_style == "constant" or steps > values.weight_decay_samples:
            return values.end_weight_decay
        share = INCREASES[values.weight_decay_style](steps / values.weight_decay_samples)
        return values.start_weight_decay + share * (values.end_weight_decay - values.start_weight_decay)

    def to_dict(self) -> dict[str, Any]:
        """What a checkpoint stores of the schedule (JSON values)."""
        return asdict(self.values)

    def merged_with(self, stored: Mapping[str, Any], override: bool, use_checkpoint: bool) -> "ParameterSchedule":
        """The schedule to resume with, from this one and the `to_dict()` of the checkpoint.

        `override` (--override_opt_param_scheduler) keeps this one; `use_checkpoint`
        (--use_checkpoint_opt_param_scheduler) takes the stored one. With neither they must be the same: `UsageError`
        names the flag and shows both values.
        """
        if override:
            return self
        names = {field.name for field in fields(ScheduleValues)}
        kept = {name: value for name, value in stored.items() if name in names}
        merged = copy.copy(self)
        merged.values = replace(self.values, **kept)
        if not use_checkpoint:
            _check_same(asdict(self.values), asdict(merged.values))
        return merged


def _check_same(typed: dict[str, Any], stored: dict[str, Any]) -> None:
    """Raise `UsageError` for the first value that differs."""
    for name, flag in FLAGS.items():
        if typed[name] != stored[name]:
            raise UsageError(
                f"{flag} is {typed[name]} here but {stored[name]} in the checkpoint; go on with the value given here "
                "by --override_opt_param_scheduler, or with the checkpoint's by --use_checkpoint_opt_param_scheduler"
            )


def _resolve(
    optimizer: OptimizerConfig, schedule: ScheduleConfig, training: TrainingConfig, global_batch_size: int
) -> ScheduleValues:
    """Flags to samples; raises `UsageError`."""
    assert schedule.lr is not None
    train_samples = _train_samples(training, global_batch_size)
    decay_samples = _decay_samples(schedule, training, global_batch_size)
    warmup_samples = _warmup_samples(schedule, training, global_batch_size, decay_samples)
    if warmup_samples >= decay_samples:
        raise UsageError(
            f"the learning rate warms up for {warmup_samples:g} samples, but is to have decayed after {decay_samples}: "
            "lower --lr_warmup_iters (or --lr_warmup_samples, --lr_warmup_fraction) or raise --lr_decay_iters"
        )
    if schedule.min_lr > schedule.lr:
        raise UsageError(f"--min_lr {schedule.min_lr} is above --lr {schedule.lr}; lower --min_lr")
    start, end = _weight_decay_range(optimizer)
    return ScheduleValues(
        max_learning_rate=schedule.lr,
        min_learning_rate=schedule.min_lr,
        warmup_samples=warmup_samples,
        decay_samples=0 if schedule.lr_decay_style == "constant" else decay_samples,
        decay_style=schedule.lr_decay_style,
        start_weight_decay=start,
        end_weight_decay=end,
        weight_decay_samples=0 if optimizer.weight_decay_incr_style == "constant" else train_samples,
        weight_decay_style=optimizer.weight_decay_incr_style,
    )


def _train_samples(training: TrainingConfig, global_batch_size: int) -> int:
    """How many samples the whole run consumes."""
    if training.train_samples is not None:
        return training.train_samples
    assert training.train_iters is not None
    return training.train_iters * global_batch_size


def _decay_samples(schedule: ScheduleConfig, training: TrainingConfig, global_batch_size: int) -> int:
    """After how many samples the learning rate has reached its minimum."""
    if schedule.lr_decay_samples is not None:
        return schedule.lr_decay_samples
    if schedule.lr_decay_iters is not None:
        return schedule.lr_decay_iters * global_batch_size
    return _train_samples(training, global_batch_size)


def _warmup_samples(
    schedule: ScheduleConfig, training: TrainingConfig, global_batch_size: int, decay_samples: int
) -> float:
    """For how many samples the learning rate rises."""
    if schedule.lr_warmup_fraction is not None:
        return schedule.lr_warmup_fraction * decay_samples
    return schedule.lr_warmup_samples or schedule.lr_warmup_iters * global_batch_size


def _weight_decay_range(optimizer: OptimizerConfig) -> tuple[float, float]:
    """(first, last) weight decay."""
    if optimizer.weight_decay_incr_style == "constant":
        return optimizer.weight_decay, optimizer.weight_decay
    start, end = optimizer.start_weight_decay, optimizer.end_weight_decay
    assert start is not None and end is not None
    if not 0 <= start <= end:
        raise UsageError(f"--start_weight_decay {start} must be between 0 and --end_weight_decay {end}")
    return start, end


def _linear(values: ScheduleValues, steps: int) -> float:
    return _between(values, 1.0 - _decay_share(values, steps))


def _cosine(values: ScheduleValues, steps: int) -> float:
    return _between(values, 0.5 * (1.0 + math.cos(math.pi * _decay_share(values, steps))))


def _inverse_square_root(values: ScheduleValues, steps: int) -> float:
    rate = values.max_learning_rate * math.sqrt(max(values.warmup_samples, 1) / max(steps, 1))
    return max(values.min_learning_rate, rate)


def _decay_share(values: ScheduleValues, steps: int) -> float:
    """How much of the way from the end of the warmup to the end of the decay is done, 0 to 1."""
    return (steps - values.warmup_samples) / (values.decay_samples - values.warmup_samples)


def _between(values: ScheduleValues, share: float) -> float:
    return values.min_learning_rate + share * (values.max_learning_rate - values.min_learning_rate)


DECAYS: dict[str, Callable[[ScheduleValues, int], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "inverse-square-root": _inverse_square_root,
}
"""`--lr_decay_style` -> learning rate between warmup and the end of the decay."""

INCREASES: dict[str, Callable[[float], float]] = {
    "linear": lambda share: share,
    "cosine": lambda share: 0.5 * (1.0 - math.cos(math.pi * share)),
}
"""`--weight_decay_incr_style` -> share of the increase reached after a share of the run."""
