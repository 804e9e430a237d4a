"""The training log: one line an interval, laid out as scripts that read Megatron's logs expect it.

New fields go at the end of the line only.
"""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass


def main_rank_writer(is_main_rank: bool, write: Callable[[str], object] | None = None) -> Callable[[str], None]:
    """A `say(message)` that writes whole lines on the main rank and is silent on the others.

    `write` receives each line with its newline; by default it is standard output, flushed, so that the log of a killed
    job is whole.
    """

    def to_stdout(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    write_line = write or to_stdout

    def say(message: str) -> None:
        if is_main_rank:
            write_line(message + "\n")

    return say


@dataclass(frozen=True, kw_only=True)
class Status:
    """Where a run stands after an iteration; `None` leaves a field out of the line."""

    iteration: int
    train_iters: int
    consumed_samples: int
    learning_rate: float
    global_batch_size: int
    loss_scale: float
    grad_norm: float | None = None
    num_zeros: float | None = None
    params_norm: float | None = None


@dataclass(frozen=True, kw_only=True)
class Interval:
    """What happened since the last log line.

    Attributes:
        losses: means over the iterations that changed the weights, empty if none did.
        tokens_per_second: of samples, padding left out.
        tokens_per_second_per_device: the same.
        padded_share: share of the computed tokens that are padding.
        imbalance: mean of what the data-parallel rank with most tokens had more than the mean, as a share of that.
        model_flops_utilization: share of the devices' peak, where that is known.
    """

    losses: Mapping[str, float]
    seconds_per_iteration: float
    tokens_per_second: float
    tokens_per_second_per_device: float
    padded_share: float
    imbalance: float
    model_flops_utilization: float | None
    skipped_iterations: int
    nan_iterations: int
    masked_iterations: int


@dataclass(frozen=True, kw_only=True)
class Work:
    """What an iteration computed, over all ranks.

    Attributes:
        tokens: padding included.
        useful_tokens: of samples.
        imbalance: of data-parallel ranks, see `Interval`.
        flops: floating-point operations that the useful tokens need.
    """

    tokens: int = 0
    useful_tokens: int = 0
    imbalance: float = 0.0
    flops: float = 0.0


class IntervalMeter:
    """Adds up iterations until a line is due.

    Args:
        devices: that the run is spread over.
        peak_flops: operations a second that a device could do, where known.
    """

    def __init__(self, devices: int = 1, peak_flops: float | None = None) -> None:
        self._devices = devices
        self._peak_flops = peak_flops
        self._reset()

    def _reset(self) -> None:
        self._losses: dict[str, float] = {}
        self._advanced = 0
        self._skipped = 0
        self._nan = 0
        self._masked = 0
        self._works: list[Work] = []
        self._seconds = 0.0

    def add(
        self,
        losses: Mapping[str, float],
        *,
        work: Work | None,
        seconds: float,
        skipped: bool = False,
        masked: bool = False,
    ) -> None:
        """Count one iteration.

        `losses` by name ("lm loss"); no `work`: no pass was run; `skipped`: the weights were not changed; `masked`:
        because no token of the batch was supervised.
        """
        self._works += [work] if work else []
        self._seconds += seconds
        self._nan += any(not math.isfinite(loss) for loss in losses.values())
        self._masked += masked
        if skipped:
            self._skipped += 1
            return
        self._advanced += 1
        for name, loss in losses.items():
            self._losses[name] = self._losses.get(name, 0.0) + loss

    def close(self) -> Interval:
        """The interval so far; counting starts anew."""
        iterations = max(self._advanced + self._skipped, 1)
        useful, computed = (sum(getattr(work, name) for work in self._works) for name in ("useful_tokens", "tokens"))
        rate, flops = self._rate(useful), self._rate(sum(work.flops for work in self._works))
        interval = Interval(
            losses={name: total / self._advanced for name, total in self._losses.items()},
            seconds_per_iteration=self._seconds / iterations,
            tokens_per_second=rate,
            tokens_per_second_per_device=rate / self._devices,
            padded_share=1 - useful / computed if computed else 0.0,
            imbalance=sum(work.imbalance for work in self._works) / max(len(self._works), 1),
            model_flops_utilization=flops / (self._peak_flops * self._devices) if self._peak_flops else None,
            skipped_iterations=self._skipped,
            nan_iterations=self._nan,
            masked_iterations=self._masked,
        )
        self._reset()
        return interval

    def _rate(self, amount: float) -> float:
        return amount / self._seconds if self._seconds else 0.0


def training_line(status: Status, interval: Interval) -> str:
    """The log line, leading blank included, without newline."""
    parts = [
        f"iteration {status.iteration:8d}/{status.train_iters:8d}",
        f"consumed samples: {status.consumed_samples:12d}",
        f"elapsed time per iteration (ms): {interval.seconds_per_iteration * 1000:.1f}",
        f"rate (tokens/sec): {interval.tokens_per_second:.2f}",
        f"learning rate: {status.learning_rate:.3E}",
        f"global batch size: {status.global_batch_size:5d}",
        *(f"{name}: {loss:.6E}" for name, loss in interval.losses.items()),
        f"loss scale: {status.loss_scale:.1f}",
    ]
    optional = [
        ("grad norm", status.grad_norm, ".3f"),
        ("num zeros", status.num_zeros, ".1f"),
        ("params norm", status.params_norm, ".3f"),
    ]
    parts += [f"{name}: {value:{layout}}" for name, value, layout in optional if value is not None]
    parts += [
        f"number of skipped iterations: {interval.skipped_iterations:3d}",
        f"number of nan iterations: {interval.nan_iterations:3d}",
    ]
    if interval.masked_iterations:
        parts.append(f"number of all-masked iterations: {interval.masked_iterations:3d}")
    parts += [
        f"useful tokens/sec/device: {interval.tokens_per_second_per_device:.2f}",
        f"padded share: {interval.padded_share:.2%}",
        f"imbalance: {interval.imbalance:.2%}",
    ]
    if interval.model_flops_utilization is not None:
        parts.append(f"MFU: {interval.model_flops_utilization:.2%}")
    return "".join(f" {part} |" for part in parts)


def evaluation_line(label: str, figures: Mapping[str, float]) -> str:
    """The block that reports an evaluation: each of `figures` ("lm loss", metrics), between two rules.

    `label` says where the run stands, for example "iteration 50 | validation". The loss's perplexity is beside it.
    """
    parts = [label]
    for name, value in figures.items():
        parts.append(f"{name} value: {value:.6E}")
        if name == "lm loss":
            parts.append(f"{name} PPL: {perplexity(value):.6E}")
    line = "".join(f" {part} |" for part in parts)
    rule = "-" * len(line)
    return f"{rule}\n{line}\n{rule}"


def perplexity(loss: float) -> float:
    """e to the loss (nats a token), bounded so that an untrained model's does not overflow."""
    return math.exp(min(20.0, loss))
