"""How many samples an iteration takes: `--global_batch_size`, which `--rampup_batch_size` may grow into."""

from dataclasses import dataclass

from megatron.config import TrainingConfig, UsageError


@dataclass(frozen=True)
class BatchSize:
    """The global batch size as a function of the samples consumed so far, by Megatron's rule.

    Attributes:
        full: the largest and last.
        start: the first.
        increment: by which it grows, at equal distances.
        rampup_samples: over so many samples; 0: it is always `full`.
    """

    full: int
    start: int = 0
    increment: int = 1
    rampup_samples: int = 0

    def at(self, consumed_samples: int) -> int:
        """Of the iteration that starts after `consumed_samples`."""
        steps = (self.full - self.start) // self.increment
        if consumed_samples >= self.rampup_samples or not steps:
            return self.full
        return self.start + consumed_samples * steps // self.rampup_samples * self.increment

    def iterations(self, consumed_samples: int, train_samples: int) -> int:
        """How many whole iterations there are between the two."""
        count = 0
        while consumed_samples < min(self.rampup_samples, train_samples):
            consumed_samples += self.at(consumed_samples)
            count += consumed_samples <= train_samples
        return count + max(train_samples - consumed_samples, 0) // self.full


def batch_size(training: TrainingConfig, data_parallel_size: int) -> BatchSize:
    """What the flags say; by default one micro batch a data-parallel rank.

    Raises:
        UsageError: the batch does not grow into its full size, or a mean over micro batches cannot be taken of it.
    """
    assert training.micro_batch_size
    unit = training.micro_batch_size * data_parallel_size
    full = training.global_batch_size or unit
    sizes = BatchSize(full)
    if training.rampup_batch_size:
        start, increment, samples = training.rampup_batch_size
        if start > full or (full - start) % increment:
            raise UsageError(
                f"--rampup_batch_size {start} {increment} {samples} does not grow into --global_batch_size {full}: "
                f"their difference, {full - start}, should be a multiple of {increment}"
            )
        sizes = BatchSize(full, start, increment, samples)
    units = (full, *(training.rampup_batch_size or ())[:2])
    if not training.calculate_per_token_loss and any(size % unit for size in units):
        raise UsageError(
            f"with --no_calculate_per_token_loss, --global_batch_size {full} (and --rampup_batch_size) must be a "
            f"multiple of --micro_batch_size {training.micro_batch_size} x {data_parallel_size} data-parallel ranks"
        )
    return sizes
