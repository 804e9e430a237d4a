"""The optimizer and the learning rate."""

from dataclasses import dataclass

from megatron.config.errors import UsageError
from megatron.config.option import check_values, option


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Optimizer."""

    optimizer: str = option("adam", "adam has decoupled weight decay (AdamW).", choices=("adam", "sgd"))
    adam_beta1: float = option(0.9, "Decay of Adam's first moment.", within="[0, 1)")
    adam_beta2: float = option(0.999, "Decay of Adam's second moment.", within="[0, 1)")
    adam_eps: float = option(1e-8, "Adam's epsilon.", within="[0, inf)")
    sgd_momentum: float = option(0.9, "Momentum of SGD.", within="[0, 1)")
    clip_grad: float = option(1.0, "Largest gradient norm; 0: no clipping.", within="[0, inf)")
    weight_decay: float = option(0.01, "Weight decay of matrices; norms and biases have none.", within="[0, inf)")
    start_weight_decay: float | None = option(None, "First weight decay of a rising one.", within="[0, inf)")
    end_weight_decay: float | None = option(None, "Last weight decay of a rising one.", within="[0, inf)")
    weight_decay_incr_style: str = option(
        "constant", "How weight decay rises.", choices=("constant", "linear", "cosine")
    )

    def __post_init__(self) -> None:
        check_values(self)
        start, end = self.start_weight_decay, self.end_weight_decay
        if self.weight_decay_incr_style != "constant":
            if start is None or end is None:
                raise UsageError(
                    f"--weight_decay_incr_style {self.weight_decay_incr_style} needs --start_weight_decay and "
                    "--end_weight_decay"
                )
            return
        for flag, value in (("--start_weight_decay", start), ("--end_weight_decay", end)):
            if value not in (None, self.weight_decay):
                raise UsageError(
                    f"{flag} {value} differs from --weight_decay {self.weight_decay}, but --weight_decay_incr_style "
                    "is constant; choose linear or cosine"
                )


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate."""

    lr: float | None = option(None, "Largest learning rate.", within="[0, inf)")
    lr_decay_style: str = option(
        "linear", "How it falls.", choices=("constant", "linear", "cosine", "inverse-square-root")
    )
    lr_decay_iters: int | None = option(None, "Iterations until it is at --min_lr; by default all.", within="[1, inf)")
    lr_decay_samples: int | None = option(None, "Samples until it is at --min_lr; by default all.", within="[1, inf)")
    lr_warmup_fraction: float | None = option(
        None, "Share of the decay's length in which it rises from 0.", within="[0, 1]"
    )
    lr_warmup_iters: int = option(0, "Iterations in which it rises from 0.", within="[0, inf)")
    lr_warmup_samples: int = option(0, "Samples in which it rises from 0.", within="[0, inf)")
    min_lr: float = option(0.0, "Least learning rate after the decay.", within="[0, inf)")
    override_opt_param_scheduler: bool = option(False, "On resuming, take the schedule from the flags.")
    use_checkpoint_opt_param_scheduler: bool = option(False, "On resuming, take the schedule from the checkpoint.")

    def __post_init__(self) -> None:
        check_values(self)
        if self.lr_warmup_fraction is not None and (self.lr_warmup_iters or self.lr_warmup_samples):
            raise UsageError(
                "--lr_warmup_fraction excludes --lr_warmup_iters and --lr_warmup_samples; give one of them"
            )
        if self.override_opt_param_scheduler and self.use_checkpoint_opt_param_scheduler:
            raise UsageError(
                "--override_opt_param_scheduler and --use_checkpoint_opt_param_scheduler exclude each other; give one"
            )
