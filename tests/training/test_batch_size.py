"""How the global batch grows, against the reference's own loop."""

import pytest

from megatron.config import TrainingConfig, UsageError
from megatron.training.batch_size import BatchSize, batch_size


def reference_sizes(start: int, increment: int, full: int, rampup_samples: int, train_samples: int) -> list[int]:
    """Megatron's `RampupBatchsizeNumMicroBatches` and `update_train_iters`, in few words."""
    per_increment = rampup_samples / ((full - start) // increment)
    sizes, consumed = [], 0
    while True:
        size = full if consumed > rampup_samples else start + int(consumed / per_increment) * increment
        if consumed + size > train_samples:
            return sizes
        sizes.append(size)
        consumed += size


@pytest.mark.parametrize("rampup", [(8, 8, 100), (16, 4, 1000), (4, 28, 30), (32, 1, 50)])
def test_grows_as_the_reference(rampup: tuple[int, int, int]) -> None:
    training = TrainingConfig(micro_batch_size=4, global_batch_size=32, train_samples=2000, rampup_batch_size=rampup)
    sizes = batch_size(training, data_parallel_size=1)
    expected = reference_sizes(rampup[0], rampup[1], 32, rampup[2], 2000) if rampup[0] < 32 else [32] * 62
    found, consumed = [], 0
    for _ in range(sizes.iterations(0, 2000)):
        found.append(sizes.at(consumed))
        consumed += found[-1]
    assert found == expected
    assert all(sizes.iterations(sum(found[:n]), 2000) == len(found) - n for n in range(len(found)))


def test_without_a_rampup_it_is_always_the_same() -> None:
    assert [BatchSize(12).at(consumed) for consumed in (0, 5, 10**9)] == [12] * 3
    assert (BatchSize(12).iterations(0, 40), BatchSize(12).iterations(50, 40)) == (3, 0)
    assert batch_size(TrainingConfig(micro_batch_size=3), data_parallel_size=5).full == 15


def test_a_batch_need_not_divide_unless_means_are_taken() -> None:
    training = TrainingConfig(micro_batch_size=2, global_batch_size=7)
    assert batch_size(training, data_parallel_size=2).full == 7
    averaged = TrainingConfig(micro_batch_size=2, global_batch_size=7, calculate_per_token_loss=False)
    with pytest.raises(UsageError, match=r"--global_batch_size 7 .* multiple of --micro_batch_size 2 x 2"):
        batch_size(averaged, data_parallel_size=2)


def test_a_batch_that_cannot_grow_is_refused() -> None:
    training = TrainingConfig(micro_batch_size=1, global_batch_size=8, train_samples=9, rampup_batch_size=(3, 2, 5))
    with pytest.raises(UsageError, match="--rampup_batch_size 3 2 5 does not grow into --global_batch_size 8"):
        batch_size(training, data_parallel_size=1)
