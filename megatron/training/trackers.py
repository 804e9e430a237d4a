"""Curves of a run: TensorBoard and, where installed and asked for, Weights & Biases."""

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

from megatron.config import LoggingConfig
from megatron.training.log import Interval, Status, perplexity


class Tracker(Protocol):
    """Somewhere to draw curves."""

    def scalar(self, tag: str, value: float, iteration: int, samples: int) -> None:
        """Add a point to curve `tag`, against both the iteration and the consumed samples."""
        ...

    def close(self) -> None:
        """Write out everything."""
        ...


class TensorBoardTracker:
    """Event files; each curve also as `TAG vs samples`."""

    def __init__(self, folder: str, queue_size: int) -> None:
        module = import_module("torch.utils.tensorboard")
        self._writer = module.SummaryWriter(log_dir=folder, max_queue=queue_size)

    def scalar(self, tag: str, value: float, iteration: int, samples: int) -> None:
        """Add both points."""
        self._writer.add_scalar(tag, value, iteration)
        self._writer.add_scalar(f"{tag} vs samples", value, samples)

    def close(self) -> None:
        """Write out the queue."""
        self._writer.close()


class WandbTracker:
    """Weights & Biases. Curves are drawn by iteration; `consumed samples` is logged beside them as another axis."""

    def __init__(self, logging: LoggingConfig, config: Mapping[str, Any]) -> None:
        self._wandb = import_module("wandb")
        if logging.wandb_api_key:
            self._wandb.login(key=logging.wandb_api_key)
        self._run = self._wandb.init(
            project=logging.wandb_project,
            entity=logging.wandb_entity,
            name=logging.wandb_name,
            id=logging.wandb_id,
            resume=logging.wandb_resume,
            config=dict(config),
        )

    def scalar(self, tag: str, value: float, iteration: int, samples: int) -> None:
        """Add the point."""
        self._run.log({tag: value, "consumed samples": samples}, step=iteration)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class Trackers:
    """Several trackers as one; with none it does nothing."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self._trackers = trackers

    def scalar(self, tag: str, value: float, iteration: int, samples: int) -> None:
        """Add the point everywhere."""
        for tracker in self._trackers:
            tracker.scalar(tag, value, iteration, samples)

    def close(self) -> None:
        """Close all."""
        for tracker in self._trackers:
            tracker.close()


def build_trackers(
    logging: LoggingConfig,
    say: Callable[[str], None],
    config: Mapping[str, Any],
    installed: Callable[[str], bool] = lambda package: find_spec(package) is not None,
) -> Trackers:
    """What the flags ask for, on the one rank that draws; a package that is missing is one line through `say`.

    `config` is shown beside the curves; it must hold no secret.
    """
    wanted: list[tuple[str, str, bool, Callable[[], Tracker]]] = [
        (
            "--tensorboard_dir",
            "tensorboard",
            bool(logging.tensorboard_dir),
            lambda: TensorBoardTracker(str(logging.tensorboard_dir), logging.tensorboard_queue_size),
        ),
        ("--wandb_logger", "wandb", logging.wandb_logger, lambda: WandbTracker(logging, config)),
    ]
    trackers = []
    for flag, package, is_wanted, build in wanted:
        if is_wanted and installed(package):
            trackers.append(build())
        elif is_wanted:
            say(f"{flag} has no effect: {package} is not installed (pip install {package})")
    return Trackers(trackers)


def track_iteration(
    tracker: Tracker, logging: LoggingConfig, status: Status, losses: Mapping[str, float], world_size: int
) -> None:
    """Draw one iteration, every `--tensorboard_log_interval` iterations; the switches choose the curves."""
    if status.iteration % logging.tensorboard_log_interval:
        return
    values: dict[str, tuple[bool, float | None]] = {
        "learning_rate": (logging.log_learning_rate_to_tensorboard, status.learning_rate),
        "batch_size": (logging.log_batch_size_to_tensorboard, status.global_batch_size),
        **{name: (True, loss) for name, loss in losses.items()},
        "loss_scale": (logging.log_loss_scale_to_tensorboard, status.loss_scale),
        "world_size": (logging.log_world_size_to_tensorboard, world_size),
        "grad_norm": (True, status.grad_norm),
        "num_zeros": (True, status.num_zeros),
        "params_norm": (True, status.params_norm),
    }
    for tag, (is_wanted, value) in values.items():
        if is_wanted and value is not None:
            tracker.scalar(tag, value, status.iteration, status.consumed_samples)


def track_interval(tracker: Tracker, logging: LoggingConfig, status: Status, interval: Interval) -> None:
    """Draw speed and waste at a log line."""
    curves = {
        "tokens-per-sec": interval.tokens_per_second,
        "tokens-per-sec-per-device": interval.tokens_per_second_per_device,
        "padded-share": interval.padded_share,
        "imbalance": interval.imbalance,
        "mfu": interval.model_flops_utilization,
    }
    for tag, value in curves.items():
        if value is not None:
            tracker.scalar(tag, value, status.iteration, status.consumed_samples)
    if logging.log_timers_to_tensorboard:
        tracker.scalar("iteration-time", interval.seconds_per_iteration, status.iteration, status.consumed_samples)


def track_timers(
    tracker: Tracker, logging: LoggingConfig, status: Status, milliseconds: Mapping[str, list[float]]
) -> None:
    """Draw the slowest rank's timers, in seconds, with `--log_timers_to_tensorboard`."""
    if logging.log_timers_to_tensorboard:
        for name, ranks in milliseconds.items():
            tag = f"{name.lstrip('. ')}-time"
            tracker.scalar(tag, max(ranks) / 1000.0, status.iteration, status.consumed_samples)


def track_memory(tracker: Tracker, logging: LoggingConfig, status: Status, statistics: Mapping[str, float]) -> None:
    """Draw `torch.cuda.memory_stats()` with `--log_memory_to_tensorboard`; empty on devices that keep none."""
    curves = {
        "mem-reserved-bytes": "reserved_bytes.all.current",
        "mem-allocated-bytes": "allocated_bytes.all.current",
        "mem-allocated-count": "allocation.all.current",
    }
    if logging.log_memory_to_tensorboard:
        for tag, key in curves.items():
            if key in statistics:
                tracker.scalar(tag, statistics[key], status.iteration, status.consumed_samples)


def track_evaluation(
    tracker: Tracker,
    logging: LoggingConfig,
    split: str,
    values: Mapping[str, float],
    iteration: int,
    samples: int,
) -> None:
    """Draw an evaluation: each of `values` ("lm loss", metrics) as `NAME SPLIT`, `split` being "validation" or "test".

    With `--log_validation_ppl_to_tensorboard` the loss's perplexity too, as `lm loss SPLIT ppl`.
    """
    for name, value in values.items():
        tracker.scalar(f"{name} {split}", value, iteration, samples)
    if logging.log_validation_ppl_to_tensorboard and "lm loss" in values:
        tracker.scalar(f"lm loss {split} ppl", perplexity(values["lm loss"]), iteration, samples)
