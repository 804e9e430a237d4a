"""The training loop: step, log, evaluate, save, stop."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from megatron.config import CommonError, RunConfig
from megatron.data import Array, GlobalBatches
from megatron.optim.gradients import clip, gradient_norm, parameter_norm, unscale, zero_count
from megatron.optim.groups import set_hyperparameters
from megatron.parallel.device import memory_statistics, synchronize
from megatron.parallel.engine import BatchLoss, Engine
from megatron.parallel.mesh import Mesh
from megatron.training.accidents import NON_FINITE, SPIKE, Accidents, is_spike, non_finite
from megatron.training.batch_size import BatchSize
from megatron.training.evaluate import Evaluator
from megatron.training.log import IntervalMeter, Status, Work, training_line
from megatron.training.place import Place
from megatron.training.restore import Restorer
from megatron.training.saver import Saver
from megatron.training.state import TrainingState
from megatron.training.stop import Stops
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
        accident: what is wrong with its loss or gradient.
        samples: in which that was found, by their places in the data.
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
    accident: str | None = None
    samples: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Trainer:
    """Turns the wheel. `megatron.training.launch` builds it.

    `flops` tells the floating-point operations that documents of so many tokens need, `peak_flops` how many a second a
    device could do, where that is known. Without `--save` there is neither `save` nor `restore`.
    """

    config: RunConfig
    mesh: Mesh
    state: TrainingState
    engine: Engine
    batches: GlobalBatches
    evaluator: Evaluator
    batch_size: BatchSize
    train_iters: int
    flops: Callable[[Array], float]
    peak_flops: float | None
    stops: Stops
    save: Saver | None
    restore: Restorer | None
    accidents: Accidents
    say: Callable[[str], None]
    trackers: Trackers
    timers: Timers
    place: Place = field(default_factory=Place)

    def train(self) -> str | None:
        """Train to the last iteration, or until there is a reason to stop, which is returned; save at the end.

        Raises:
            CommonError: the run cannot go on; a checkpoint that was begun before is whole.
        """
        try:
            return self._train()
        except CommonError:  # of all ranks, which can still meet
            if self.save:
                self.save.finish()
            raise

    def _train(self) -> str | None:
        meter = IntervalMeter(self.mesh.ranks.size(), self.peak_flops)
        options, interval = self.config.training, self.config.checkpoint.save_interval
        reason = self.stops.reason()
        while self.state.progress.iteration < self.train_iters and reason is None:
            start = time.perf_counter()
            report = self.step()
            synchronize(self.mesh.device)
            self.stops.pace.iteration = time.perf_counter() - start
            self._log(report, meter, self.stops.pace.iteration)
            rewound = self._face_accident(report)
            iteration = self.state.progress.iteration
            if not rewound and iteration % options.eval_interval == 0 and iteration < self.train_iters:
                self.evaluator.evaluate("validation", self.state.progress)
            if self.save:
                self.save.finish_if_written()
                self.stops.pace.save = self.save.seconds or self.stops.pace.save
                self.stops.pace.saves = 1 + self.save.is_writing
            reason = self.stops.reason(None if rewound else iteration)
            if interval and iteration % interval == 0:
                self._save()
        if reason:
            self.say(f"stopping: {reason}")
        self._save()
        if self.save:
            self.save.finish()
        return reason

    def step(self) -> StepReport:
        """One iteration: a global batch, its gradients, and, if they are sound, new weights."""
        state, progress = self.state, self.state.progress
        consumed, scale, can_shrink = progress.consumed_samples, state.loss_scale.scale, state.loss_scale.can_shrink
        size = self.batch_size.at(consumed)
        self.place.iteration = progress.iteration + 1
        with self._part("batch-generator", level=1):
            batch = self.batches.batch(progress.position, size)
        progress.iteration += 1
        progress.consumed_samples += size
        report = partial(StepReport, size, state.schedule.learning_rate(progress.consumed_samples), scale)
        if progress.iteration in self.config.training.skip_iters:
            return report(skipped=True)
        state.optimizer.zero_grad()
        with self._part("forward-backward", level=1):
            loss = self.engine.forward_backward(batch.micro_batches, consumed, scale)
        if not loss.weight:
            return report(loss=loss, skipped=True, masked=True)
        spikes = self._spikes(loss.mean)
        with self._part("optimizer", level=1):
            is_wanted = math.isfinite(loss.mean) and not (spikes and progress.saved_iteration is not None)
            norm, zeros, changed = self._update(consumed, scale, is_wanted)
        if changed:
            progress.average_loss.add(loss.mean)
        accident = SPIKE if spikes else non_finite(loss.mean, norm, can_shrink)
        return report(
            loss=loss,
            work=Work(
                tokens=loss.tokens,
                useful_tokens=loss.useful_tokens,
                imbalance=loss.imbalance,
                flops=self.flops(batch.document_lengths),
            ),
            grad_norm=norm,
            num_zeros=zeros,
            skipped=not changed,
            accident=accident,
            samples=self.batches.stream.places(batch.samples) if accident else [],
        )

    def _update(self, consumed: int, scale: float, is_wanted: bool) -> tuple[float, float | None, bool]:
        """Change the weights if that is wanted and the gradient finite: (its norm, its zeros, whether it was done)."""
        state, parts = self.state, self.state.model.parts
        unscale(parts, scale)
        norm = gradient_norm(parts, self.mesh)
        zeros = zero_count(parts, self.mesh) if self.config.logging.log_num_zeros_in_grad else None
        state.loss_scale.update(not math.isfinite(norm))
        changes = is_wanted and math.isfinite(norm)
        if changes:
            clip(parts, norm, self.config.optimizer.clip_grad)
            rate, decay = state.schedule.learning_rate(consumed), state.schedule.weight_decay(consumed)
            set_hyperparameters(state.optimizer, rate, decay)
            state.optimizer.step()
        return norm, zeros, changes

    def _spikes(self, loss: float) -> bool:
        """Whether the loss asks for a rewind, decided by all ranks."""
        factor, average = self.config.training.rewind_on_spike, self.state.progress.average_loss
        return factor is not None and self.mesh.any(is_spike(loss, average, factor))

    def _face_accident(self, report: StepReport) -> bool:
        """Note an accident, and do what follows from it: whether that was to go back to the last checkpoint.

        Raises:
            CommonError: the run cannot go on.
        """
        progress = self.state.progress
        if report.accident:
            assert report.loss and report.grad_norm is not None
            self.accidents.note(report.accident, progress, report.samples, report.loss.mean, report.grad_norm)
        if report.accident or not report.skipped:
            self.accidents.count(report.accident in NON_FINITE, progress.iteration)
        if report.accident != SPIKE:
            return False
        if progress.saved_iteration is None:
            self.say("there is no checkpoint to go back to yet: training goes on")
            return False
        self._rewind()
        return True

    def _rewind(self) -> None:
        """Go back to the last checkpoint, but not in the data."""
        spike = self.state.progress
        most = self.config.training.max_rewinds
        if spike.rewinds >= most:
            raise CommonError(
                f"the loss spiked again in iteration {spike.iteration}, after {spike.rewinds} rewinds (--max_rewinds); "
                f"the last checkpoint is of iteration {spike.saved_iteration}. Look at the samples, or lower --lr"
            )
        assert self.restore
        with self._part("load-checkpoint"):
            self.restore(self.state)
        progress = self.state.progress
        progress.rewinds = spike.rewinds + 1
        progress.skipped_samples = spike.position - progress.consumed_samples
        self.say(
            f"rewind {progress.rewinds} of at most {most}: back to iteration {progress.iteration}, and on after "
            f"{progress.skipped_samples} samples that are passed over"
        )

    @contextmanager
    def _part(self, name: str, level: int = 0) -> Iterator[None]:
        with self.place(name), self.timers(name, level):
            yield

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
        if self.save and progress.iteration not in (0, progress.saved_iteration):
            with self._part("save-checkpoint"):
                self.save(self.state)
            progress.saved_iteration = progress.iteration
