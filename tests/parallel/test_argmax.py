"""The likeliest id of logits that are divided over ranks is the one of whole logits, the lowest of equal ones."""

import pytest
import torch
import torch.distributed as dist
from worlds import World

from megatron.parallel.plan import chunk
from megatron.parallel.tensor import TensorSpread

VOCAB_SIZE = 101  # no multiple of the ranks


def tied_logits() -> list[torch.Tensor]:
    """Logits with many equal maxima, within the part of a rank and across parts."""
    few_values = torch.randint(-3, 0, (200, VOCAB_SIZE), generator=torch.Generator().manual_seed(1))
    ends = torch.full((2, VOCAB_SIZE), -1.0)
    ends[:, -1] = ends[1, 0] = 5.0
    return [few_values.float(), few_values.bfloat16(), ends, torch.zeros(1, VOCAB_SIZE)]


def divided_argmax() -> list[list[int]]:
    rank, size = dist.get_rank(), dist.get_world_size()
    start, length = chunk(VOCAB_SIZE, size, rank)
    group = dist.group.WORLD
    spread = TensorSpread(group, sequence_parallel=False, vocab_size=VOCAB_SIZE, key_value_heads=size)
    return [spread.argmax(logits[:, start : start + length]).tolist() for logits in tied_logits()]


@pytest.mark.parametrize("size", [2, 4])
def test_the_lowest_of_equal_logits_wins_on_any_number_of_ranks(world: World, size: int) -> None:
    expected = [logits.argmax(-1).tolist() for logits in tied_logits()]
    assert expected[2:] == [[VOCAB_SIZE - 1, 0], [0]]
    assert world(size, divided_argmax) == [expected] * size
