"""All options of a training run, checked against each other."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron.config.checkpoint import CheckpointConfig
from megatron.config.data import DataConfig, TokenizerConfig
from megatron.config.errors import UsageError
from megatron.config.log import LoggingConfig
from megatron.config.model import ModelConfig
from megatron.config.optimizer import OptimizerConfig, ScheduleConfig
from megatron.config.parallel import KernelConfig, ParallelConfig
from megatron.config.parser import build
from megatron.config.training import PrecisionConfig, RecomputeConfig, TrainingConfig

SECRETS = ("wandb_api_key",)
"""Fields that are never written down."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that was asked for, by group."""

    model: ModelConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    precision: PrecisionConfig
    parallel: ParallelConfig
    recompute: RecomputeConfig
    kernel: KernelConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig

    def __post_init__(self) -> None:
        training = self.training
        if training.micro_batch_size is None:
            raise UsageError("--micro_batch_size is missing: how many samples a rank takes at a time")
        if not training.eval_only and not (training.train_iters or training.train_samples):
            raise UsageError("training needs a length: give --train_iters or --train_samples (or --eval_only)")
        if not training.eval_only and self.schedule.lr is None:
            raise UsageError("training needs a learning rate: give --lr")
        if self.data.packing == "padding_free" and not training.calculate_per_token_loss:
            raise UsageError(
                "--no_calculate_per_token_loss takes a mean over rows of one sample each, which --packing padding_free "
                "does not have; leave one of them out"
            )
        if self.model.use_post_ln and self.precision.fp32_residual_connection:
            raise UsageError(
                "--use_post_ln and --fp32_residual_connection exclude each other: the residual is the norm's output"
            )
        if self.kernel.compile and self.model.lima_dropout and self.model.hidden_dropout:
            raise UsageError(
                "--compile and --lima_dropout exclude each other: layers that differ in dropout could not share what "
                "is compiled; leave one of them out"
            )
        drops = self.model.hidden_dropout or self.model.attention_dropout
        if self.kernel.compile and self.recompute.recompute_granularity == "selective" and drops:
            raise UsageError(
                "--compile does not go with --recompute_granularity selective and dropout, whose random state no graph "
                "holds; give --hidden_dropout 0 and --attention_dropout 0, or leave one of them out"
            )
        if training.rewind_on_spike and not (self.checkpoint.save_interval and self.checkpoint.save_optim):
            raise UsageError(
                "--rewind_on_spike goes back to the last checkpoint: give --save and --save_interval, and leave "
                "--no_save_optim out"
            )
        self._check_units()
        self._check_length()

    def _check_units(self) -> None:
        """Lengths of the schedule are in the unit of the run's length, as in Megatron."""
        unit, other = ("samples", "iters") if self.training.train_samples else ("iters", "samples")
        for name in (f"lr_decay_{other}", f"lr_warmup_{other}"):
            if getattr(self.schedule, name):
                raise UsageError(f"--{name} does not go with --train_{unit}; give it in {unit}")

    @classmethod
    def from_fields(cls, values: Mapping[str, Any]) -> "RunConfig":
        """From field name -> value, of all groups together; missing ones get their defaults."""
        return cls(**dict(zip(GROUPS, build(RUN_GROUPS, values), strict=True)))

    def _check_length(self) -> None:
        length, longest = self.data.seq_length, self.model.max_position_embeddings
        if length and longest and length > longest:
            raise UsageError(
                f"--seq_length {length} is longer than --max_position_embeddings {longest}; lower it, or give the "
                "larger --max_position_embeddings (and perhaps a --rope_scaling_factor)"
            )

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, by group; secrets left out."""
        groups = asdict(self)
        return {name: {k: v for k, v in group.items() if k not in SECRETS} for name, group in groups.items()}


GROUPS: dict[str, type] = {field.name: field.type for field in fields(RunConfig)}  # type: ignore[misc]
"""Name of a group -> its dataclass, in the order of `--help`."""
RUN_GROUPS = tuple(GROUPS.values())
