"""What a run tells of itself."""

from dataclasses import dataclass

from megatron.config.option import check_values, option

METRICS = ("perplexity", "accuracy", "instruct_accuracy", "count_loss_mask", "count_instruct_mask", "all")


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """Logging."""

    log_interval: int = option(100, "Iterations between log lines.", within="[1, inf)")
    log_params_norm: bool = option(False, "Log the norm of the weights.")
    log_num_zeros_in_grad: bool = option(False, "Log how many elements of the gradient are zero.")
    timing_log_level: int = option(0, "0: no timers; 1: parts of a step; 2: their parts.", choices=(0, 1, 2))
    timing_log_option: str = option("minmax", "Over the ranks.", choices=("max", "minmax", "all"))
    tensorboard_dir: str | None = option(None, "Folder for TensorBoard.")
    tensorboard_log_interval: int = option(1, "Iterations between points of the curves.", within="[1, inf)")
    tensorboard_queue_size: int = option(1000, "Points kept before they are written.", within="[1, inf)")
    log_timers_to_tensorboard: bool = option(False, "Curves of the timers.")
    log_batch_size_to_tensorboard: bool = option(False, "Curve of the batch size.")
    log_learning_rate_to_tensorboard: bool = option(True, "Curve of the learning rate.", takes_value=True)
    log_loss_scale_to_tensorboard: bool = option(True, "Curve of the loss scale.", takes_value=True)
    log_validation_ppl_to_tensorboard: bool = option(False, "Curve of the validation perplexity.")
    log_memory_to_tensorboard: bool = option(False, "Curves of GPU memory.")
    log_world_size_to_tensorboard: bool = option(False, "Curve of the number of ranks.")
    wandb_logger: bool = option(False, "Also draw curves at Weights & Biases, where wandb is installed.")
    wandb_project: str | None = option(None, "Project at Weights & Biases.")
    wandb_entity: str | None = option(None, "Team at Weights & Biases.")
    wandb_name: str | None = option(None, "Name of the run at Weights & Biases.")
    wandb_id: str | None = option(None, "Id of the run at Weights & Biases.")
    wandb_resume: str = option("allow", "How Weights & Biases resumes a run.")
    wandb_api_key: str | None = option(None, "Key for Weights & Biases; the variable WANDB_API_KEY is safer.")
    peak_tflops: float | None = option(
        None,
        "Peak teraflops of a device, to log what share of it the model uses; known for common GPUs in bf16 and fp16.",
        within="(0, inf)",
    )
    metrics: tuple[str, ...] = option((), "Metrics of each evaluation, beside the loss.", choices=METRICS, nargs="+")

    def __post_init__(self) -> None:
        check_values(self)
