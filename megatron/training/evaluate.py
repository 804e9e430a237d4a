"""Evaluation: the loss on data that is not trained on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron.config import LoggingConfig
from megatron.data import InstructionBatches
from megatron.parallel.engine import Engine
from megatron.training.log import evaluation_line
from megatron.training.state import Progress
from megatron.training.trackers import Trackers, track_evaluation


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Evaluates on each split there is: "validation" and "test".

    The same samples every time, each once, at most `eval_iters` global batches of them.
    """

    engine: Engine
    batches: Mapping[str, InstructionBatches]
    eval_iters: int
    global_batch_size: int
    logging: LoggingConfig
    trackers: Trackers
    say: Callable[[str], None]

    def evaluate(self, split: str, progress: Progress) -> float | None:
        """Mean loss a weighted token on `split`, said and tracked; None where there is nothing to evaluate."""
        if split not in self.batches:
            return None
        total = weight = 0.0
        for number in range(self.eval_iters):
            batch = self.batches[split].batch(number * self.global_batch_size, self.global_batch_size)
            if not len(batch.sample_indices):
                break
            loss = self.engine.evaluate(batch.micro_batches)
            total, weight = total + loss.mean * loss.weight, weight + loss.weight
        if not weight:
            self.say(f"{split}: no token has loss weight, so there is no loss to report")
            return None
        losses = {"lm loss": total / weight}
        self.say(evaluation_line(f"{split} loss at iteration {progress.iteration}", losses))
        track_evaluation(self.trackers, self.logging, split, losses, progress.iteration, progress.consumed_samples)
        return total / weight

    def evaluate_all(self, progress: Progress) -> None:
        """Evaluate on every split."""
        for split in self.batches:
            self.evaluate(split, progress)
