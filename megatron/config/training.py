"""Batches, length and course of training, precision, and recomputation."""

from dataclasses import dataclass

from megatron.config.errors import UsageError
from megatron.config.option import check_values, option


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Training."""

    micro_batch_size: int | None = option(
        None, "Samples in one forward pass of one data-parallel rank.", within="[1, inf)"
    )
    global_batch_size: int | None = option(
        None, "Samples in one iteration; by default --micro_batch_size x data-parallel ranks.", within="[1, inf)"
    )
    rampup_batch_size: tuple[int, ...] | None = option(
        None,
        "START INCREMENT SAMPLES: let the global batch grow from START by INCREMENT at a time, over SAMPLES samples.",
        within="[1, inf)",
        nargs="*",
    )
    train_iters: int | None = option(None, "Number of iterations.", within="[1, inf)")
    train_samples: int | None = option(None, "Number of samples, instead of --train_iters.", within="[1, inf)")
    skip_iters: tuple[int, ...] = option((), "Iterations whose batches are passed over.", within="[1, inf)")
    exit_interval: int | None = option(None, "Save and exit at every multiple of this iteration.", within="[1, inf)")
    exit_duration_in_mins: int | None = option(
        None, "Save and exit so early that it all ends within this many minutes.", within="[1, inf)"
    )
    exit_signal_handler: bool = option(False, "On SIGTERM, SIGINT or SIGUSR1, save and exit.")
    max_consecutive_skips: int = option(
        10, "Fail after so many iterations in a row whose loss or gradient is not finite.", within="[1, inf)"
    )
    rewind_on_spike: float | None = option(
        None,
        "Where the loss is more than so many times its running average, go back to the last checkpoint and on with "
        "the samples after that batch.",
        within="(1, inf)",
    )
    max_rewinds: int = option(3, "Fail where the loss spikes again after so many of them.", within="[0, inf)")
    seed: int = option(1234, "Seed of initial weights, data order and dropout.", within="[0, 4294967295]")
    data_parallel_random_init: bool = option(False, "No effect: data-parallel ranks hold parts of one model.")
    eval_only: bool = option(False, "Evaluate and do not train.")
    eval_iters: int = option(100, "Most global batches of one evaluation.", within="[0, inf)")
    eval_interval: int = option(1000, "Iterations between evaluations on the validation data.", within="[1, inf)")
    calculate_per_token_loss: bool = option(
        True, "Average the loss by micro batch first, as Megatron-LLM does, instead of over the global batch's tokens."
    )

    def __post_init__(self) -> None:
        check_values(self)
        if self.train_iters and self.train_samples:
            raise UsageError("--train_iters and --train_samples exclude each other; give one")
        rampup = self.rampup_batch_size
        if rampup is not None and len(rampup) != 3:
            raise UsageError("--rampup_batch_size takes three numbers: START INCREMENT SAMPLES")
        if rampup and not self.train_samples:
            raise UsageError("--rampup_batch_size needs --train_samples: iterations differ in their samples")


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Mixed precision."""

    fp16: bool = option(False, "Compute in fp16, with loss scaling; weights are kept in fp32.")
    bf16: bool = option(False, "Compute in bf16; weights are kept in fp32.")
    loss_scale: float | None = option(
        None, "Constant loss scale; by default fp16 has a dynamic one.", within="(0, inf)"
    )
    initial_loss_scale: float = option(4294967296, "First dynamic loss scale.", within="(0, inf)")
    min_loss_scale: float = option(1.0, "Least dynamic loss scale.", within="(0, inf)")
    loss_scale_window: float = option(
        1000, "Good iterations in a row after which the loss scale doubles.", within="[1, inf)"
    )
    hysteresis: int = option(2, "Bad iterations after which the loss scale halves.", within="[1, inf)")
    fp32_residual_connection: bool = option(False, "Keep the residual stream in fp32.")
    apply_query_key_layer_scaling: bool = option(
        True,
        "No effect: attention scores are computed in fp32 and cannot overflow.",
        flag="--no_query_key_layer_scaling",
    )
    attention_softmax_in_fp32: bool = option(False, "No effect: it always is.")

    def __post_init__(self) -> None:
        check_values(self)
        if self.fp16 and self.bf16:
            raise UsageError("--fp16 and --bf16 exclude each other; give one")


@dataclass(frozen=True, kw_only=True)
class RecomputeConfig:
    """Activation recomputation."""

    recompute_activations: bool = option(False, "The same as --recompute_granularity selective.")
    recompute_granularity: str | None = option(
        None,
        "selective: keep matrix products and attention outputs of a layer; full: only its input.",
        choices=("full", "selective"),
    )
    recompute_method: str | None = option(
        None,
        "With full. uniform (unless given): keep the input of every --recompute_num_layers layers; "
        "block: recompute the first ones.",
        choices=("uniform", "block"),
    )
    recompute_num_layers: int = option(
        1, "Layers of a unit (uniform), or how many to recompute (block).", within="[1, inf)"
    )

    def __post_init__(self) -> None:
        check_values(self)
        if self.recompute_activations:
            if self.recompute_granularity == "full":
                raise UsageError(
                    "--recompute_activations means --recompute_granularity selective, but full is given; give one"
                )
            object.__setattr__(self, "recompute_granularity", "selective")
        given = {"recompute_method": self.recompute_method, "recompute_num_layers": self.recompute_num_layers != 1}
        for name, is_given in given.items():
            if is_given and self.recompute_granularity != "full":
                raise UsageError(f"--{name} needs --recompute_granularity full")
