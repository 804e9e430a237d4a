"""The training loop: step, log, evaluate, save, stop."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron.config import RunConfig
from megatron.data import Array, InstructionBatches
from megatron.optim.gradients import clip, gradient_norm, parameter_norm, unscale, zero_count
from megatron.optim.groups import set_hyperparameters
from megatron.parallel.device import memory_statistics, synchronize
from megatron.parallel.engine import BatchLoss, Engine
from megatron.parallel.mesh import Mesh
from megatron.training.batch_size import BatchSize
from megatron.training.evaluate import Evaluator
from megatron.training.log import IntervalMeter, Status, Work, training_line
from megatron.training.state import TrainingState
from megatron.training.stop import Stop, agreed_reason
from megatron.training.timers import Timers
from megatron.training.trackers import Trackers, track_interval, track_iteration, track_memory, track_timers


@dataclass(frozen=True)
class StepReport:
    """What one iteration did.

    Attributes:
        batch_size: samples.
        learning_rate: as scheduled after the step.
        loss_scale: that of the step.
        loss: of the global batch; None where no pass was run.
        work: what was computed; None where no pass was run.
        grad_norm: before clipping; None where there was no gradient.
        num_zeros: zeros in the gradient, where asked for.
        skipped: the weights were left alone.
        masked: because no token of the batch had weight.
    """

    batch_size: int
    learning_rate: float
    loss_scale: float
    loss: BatchLoss | None = None
    work: Work | None = None
    grad_norm: float | None = None
    num_zeros: float | None = None
    skipped: bool = False
    masked: bool = False


@dataclass(kw_only=True)
class Trainer:
    """Turns the wheel. `megatron.training.launch` builds it.

    `flops` tells the floating-point operations that documents of so many tokens need, `peak_flops` how many a second a
    device could do, where that is known.
    """

    config: RunConfig
    mesh: Mesh
    state: TrainingState
    engine: Engine
    batches: InstructionBatches
    evaluator: Evaluator
    batch_size: BatchSize
    train_iters: int
    flops: Callable[[Array], float]
    peak_flops: float | None
    stops: Sequence[Stop]
    save: Callable[[TrainingState], None]
    say: Callable[[str], None]
    trackers: Trackers
    timers: Timers

    def train(self) -> str | None:
        """Train to the last iteration, or until there is a reason to stop, which is returned; save at the end."""
        meter = IntervalMeter(self.mesh.ranks.size(), self.peak_flops)
        progress, options = self.state.progress, self.config.training
        reason: str | None = None
        while progress.iteration < self.train_iters and reason is None:
            start = time.perf_counter()
            report = self.step()
            synchronize(self.mesh.device)
            self._log(report, meter, time.perf_counter() - start)
            if progress.iteration % options.eval_interval == 0 and progress.iteration < self.train_iters:
                self.evaluator.evaluate("validation", progress)
            reason = agreed_reason(self.stops, progress.iteration, self.mesh.any)
            interval = self.config.checkpoint.save_interval
            if interval and progress.iteration % interval == 0:
                self._save()
        if reason:
            self.say(f"stopping: {reason}")
        self._save()
        return reason

    def step(self) -> StepReport:
        """One iteration: a global batch, its gradients, and, if they are sound, new weights."""
        progress, scale = self.state.progress, self.state.loss_scale.scale
        consumed = progress.consumed_samples
        size = self.batch_size.at(consumed)
        with self.timers("batch-generator", level=1):
            batch = self.batches.batch(consumed, size)
        progress.iteration += 1
        progress.consumed_samples += size
        learning_rate = self.state.schedule.learning_rate(progress.consumed_samples)
        if progress.iteration in self.config.training.skip_iters:
            return StepReport(size, learning_rate, scale, skipped=True)
        self.state.optimizer.zero_grad()
        with self.timers("forward-backward", level=1):
            loss = self.engine.forward_backward(batch.micro_batches, consumed, scale)
        if not loss.weight:
            return StepReport(size, learning_rate, scale, loss, skipped=True, masked=True)
        with self.timers("optimizer", level=1):
            norm, zeros = self._update(consumed, scale)
        work = Work(
            tokens=loss.tokens,
            useful_tokens=loss.useful_tokens,
            imbalance=loss.imbalance,
            flops=self.flops(batch.input_tokens),
        )
        return StepReport(size, learning_rate, scale, loss, work, norm, zeros, skipped=not math.isfinite(norm))

    def _update(self, consumed: int, scale: float) -> tuple[float, float | None]:
        """Change the weights, unless the gradient is not finite: (gradient norm, zeros in the gradient)."""
        state, parts = self.state, self.state.model.parts
        unscale(parts, scale)
        norm = gradient_norm(parts, self.mesh)
        zeros = zero_count(parts, self.mesh) if self.config.logging.log_num_zeros_in_grad else None
        state.loss_scale.update(not math.isfinite(norm))
        if math.isfinite(norm):
            clip(parts, norm, self.config.optimizer.clip_grad)
            rate, decay = state.schedule.learning_rate(consumed), state.schedule.weight_decay(consumed)
            set_hyperparameters(state.optimizer, rate, decay)
            state.optimizer.step()
        return norm, zeros

    def _log(self, report: StepReport, meter: IntervalMeter, seconds: float) -> None:
        logging, progress = self.config.logging, self.state.progress
        losses = {"lm loss": report.loss.mean} if report.loss and not report.masked else {}
        meter.add(losses, work=report.work, seconds=seconds, skipped=report.skipped, masked=report.masked)
        status = Status(
            iteration=progress.iteration,
            train_iters=self.train_iters,
            consumed_samples=progress.consumed_samples,
            learning_rate=report.learning_rate,
            global_batch_size=report.batch_size,
            loss_scale=report.loss_scale,
            grad_norm=report.grad_norm,
            num_zeros=report.num_zeros,
            params_norm=parameter_norm(self.state.model.parts, self.mesh) if logging.log_params_norm else None,
        )
        track_iteration(self.trackers, logging, status, losses, torch.distributed.get_world_size())
        if progress.iteration % logging.log_interval == 0:
            self._log_interval(status, meter)

    def _log_interval(self, status: Status, meter: IntervalMeter) -> None:
        logging, interval = self.config.logging, meter.close()
        self.say(training_line(status, interval))
        track_interval(self.trackers, logging, status, interval)
        track_memory(self.trackers, logging, status, memory_statistics(self.mesh.device))
        times = self.timers.milliseconds(self.mesh.gather, logging.log_interval)
        track_timers(self.trackers, logging, status, times)
        if times:
            self.say(self.timers.layout(times))

    def _save(self) -> None:
        progress = self.state.progress
        if self.config.checkpoint.save and progress.saved_iteration != progress.iteration:
            with self.timers("save-checkpoint"):
                self.save(self.state)
            progress.saved_iteration = progress.iteration
