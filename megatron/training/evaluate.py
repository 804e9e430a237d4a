"""Evaluation: the loss and the metrics on data that is not trained on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from megatron.config import LoggingConfig
from megatron.data import Array, GlobalBatches
from megatron.parallel.engine import Engine
from megatron.training.log import evaluation_line
from megatron.training.metrics import Meter
from megatron.training.place import Place
from megatron.training.state import Progress
from megatron.training.stop import Stops
from megatron.training.trackers import Trackers, track_evaluation


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Evaluates on each split there is, "validation" and "test": on each of its datasets, and all together.

    The same samples every time, each once, at most `eval_iters` global batches of a dataset; cut short where the run is
    to stop.
    """

    engine: Engine
    batches: Mapping[str, Mapping[str, GlobalBatches]]
    eval_iters: int
    global_batch_size: int
    meter: Meter
    stops: Stops
    place: Place
    logging: LoggingConfig
    trackers: Trackers
    say: Callable[[str], None]

    def evaluate(self, split: str, progress: Progress) -> float | None:
        """Mean loss a weighted token on `split`, said and tracked; None where there is nothing to evaluate."""
        datasets = self.batches.get(split, {})
        total, samples = np.zeros(self.meter.size), 0
        for name, batches in datasets.items():
            found = self._sums(batches)
            if found is None:
                self.say(f"{split}: the evaluation is cut short, since the run is to stop")
                return None
            if len(datasets) > 1:
                self._report(f"{split} {name}", f"{split} loss of {name}", *found, progress)
            total, samples = total + found[0], samples + found[1]
        return self._report(split, f"{split} loss", total, samples, progress) if datasets else None

    def _sums(self, batches: GlobalBatches) -> tuple[Array, int] | None:
        """What the meter adds up over a dataset, and over how many samples; None where it was cut short."""
        sums, samples = np.zeros(self.meter.size), 0
        for number in range(self.eval_iters):
            if self.stops.reason():
                return None
            batch = batches.batch(number * self.global_batch_size, self.global_batch_size)
            if not len(batch.samples):
                break
            with self.place("evaluation"):
                sums += self.engine.evaluate(batch.micro_batches, self.meter).sums
            samples += len(batch.samples)
        return sums, samples

    def _report(self, curve: str, what: str, sums: Array, samples: int, progress: Progress) -> float | None:
        """Say and track the loss and the metrics; the loss, None where no token has loss weight."""
        figures = self.meter.figures(sums.tolist(), samples)
        if not figures:
            self.say(f"{curve}: no token has loss weight, so there is no loss to report")
            return None
        self.say(evaluation_line(f"{what} at iteration {progress.iteration}", figures))
        track_evaluation(self.trackers, self.logging, curve, figures, progress.iteration, progress.consumed_samples)
        return figures["lm loss"]

    def evaluate_all(self, progress: Progress) -> None:
        """Evaluate on every split."""
        for split in self.batches:
            self.evaluate(split, progress)
