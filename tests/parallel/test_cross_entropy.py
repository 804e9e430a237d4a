"""Loss and gradients of the output layer, in chunks and on any ranks, equal those of whole logits on one device."""

from contextlib import AbstractContextManager
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from worlds import World

from megatron.model import Spread, cross_entropy
from megatron.model.cross_entropy import chunks, likeliest, output_loss, token_losses
from megatron.parallel.plan import chunk
from megatron.parallel.tensor import TensorSpread

TOKENS, HIDDEN, VOCAB_SIZE = 24, 16, 101  # no multiple of the ranks
SIZES = {"CHUNK_VALUES": 3 * VOCAB_SIZE, "BLOCK_VALUES": {"cpu": 2 * VOCAB_SIZE}}
"""Few enough for several chunks, and several blocks in each."""


def small_chunks(planted: bool = True) -> AbstractContextManager[object]:
    """Chunks and blocks of these sizes, or of their own."""
    return patch.dict(vars(cross_entropy), SIZES if planted else {})


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden state, weight, labels, and factors some of which are 0."""
    random = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(rows, HIDDEN, generator=random).to(dtype) for rows in (TOKENS, VOCAB_SIZE))
    labels = torch.randint(VOCAB_SIZE, (TOKENS,), generator=random)
    factors = torch.rand(TOKENS, generator=random) * (torch.arange(TOKENS) % 3 > 0)
    return x, weight, labels, factors


def plain(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Loss, gradients of hidden state and weight, token losses and likeliest ids, by PyTorch in fp64."""
    x, weight, labels, factors = inputs(dtype)
    x, weight = (tensor.double().requires_grad_() for tensor in (x, weight))
    losses = F.cross_entropy(x @ weight.t(), labels, reduction="none")
    loss = (losses * factors).sum()
    loss.backward()
    return [loss.detach(), x.grad, weight.grad, losses.detach(), (x @ weight.t()).argmax(-1)]


def spread_of(sequence_parallel: bool) -> Spread:
    """The meaning of products in this world."""
    if dist.get_world_size() == 1:
        return Spread()
    group = dist.group.WORLD
    return TensorSpread(group, sequence_parallel=sequence_parallel, vocab_size=VOCAB_SIZE, key_value_heads=4)


def ours(sequence_parallel: bool, in_chunks: bool, without: bool) -> list[Tensor]:
    """The same, this rank's part of them."""
    spread, rank, size = spread_of(sequence_parallel), dist.get_rank(), dist.get_world_size()
    x, weight, labels, factors = inputs()
    x = spread.own_tokens(x).clone().requires_grad_()
    start, length = chunk(VOCAB_SIZE, size, rank)
    weight = weight[start : start + length].clone().requires_grad_()
    with small_chunks(in_chunks):
        assert (len(chunks(TOKENS, length)) > 1) == in_chunks
        loss = output_loss(spread, x, weight, labels, factors, factors.nonzero()[:, 0] if without else None)
        (2 * loss).backward()
        with torch.no_grad():
            known = [token_losses(spread, x, weight, labels), likeliest(spread, x, weight)]
    return [loss.detach(), x.grad / 2, weight.grad / 2, *known]


@pytest.mark.parametrize("without", [False, True], ids=["all tokens", "without those of factor 0"])
@pytest.mark.parametrize("in_chunks", [False, True])
@pytest.mark.parametrize(("ranks", "sequence_parallel"), [(1, False), (2, False), (2, True), (4, True)])
def test_any_chunks_on_any_ranks_equal_whole_logits(
    world: World, ranks: int, sequence_parallel: bool, in_chunks: bool, without: bool
) -> None:
    losses, hidden, weights, *known = zip(*world(ranks, ours, sequence_parallel, in_chunks, without), strict=True)
    expected = plain()
    for rank in range(ranks):
        found = [losses[rank], torch.cat(hidden) if sequence_parallel else hidden[rank], torch.cat(weights)]
        for value, wanted in zip([*found, *(column[rank] for column in known)], expected, strict=True):
            torch.testing.assert_close(value.double(), wanted.double(), rtol=1e-5, atol=1e-6)


def of_nothing(sequence_parallel: bool) -> list[Tensor]:
    """Loss and gradients where no token has a loss weight."""
    spread = spread_of(sequence_parallel)
    x, weight, labels, factors = inputs()
    start, length = chunk(VOCAB_SIZE, dist.get_world_size(), dist.get_rank())
    x, weight = spread.own_tokens(x).clone().requires_grad_(), weight[start : start + length].clone().requires_grad_()
    loss = output_loss(spread, x, weight, labels, factors * 0, torch.empty(0, dtype=torch.int64))
    loss.backward()
    return [loss.detach(), x.grad, weight.grad]


@pytest.mark.parametrize(("ranks", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_without_a_supervised_token_there_is_no_gradient(world: World, ranks: int, sequence_parallel: bool) -> None:
    for found in world(ranks, of_nothing, sequence_parallel):
        assert all(torch.equal(value, torch.zeros_like(value)) for value in found)


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**10])
@pytest.mark.parametrize("in_chunks", [False, True])
def test_gradients_in_half_precision_are_scaled_before_they_are_rounded(scale: float, in_chunks: bool) -> None:
    """With the small factors alone they are nothing in fp16."""
    x, weight, labels, factors = inputs(torch.float16)
    x.requires_grad_()
    weight.requires_grad_()
    with small_chunks(in_chunks):
        output_loss(Spread(), x, weight, labels, factors * 2.0**-10 * scale).backward()
    if scale < 1:
        assert not x.grad.count_nonzero()
        return
    for found, expected in zip((x.grad, weight.grad), plain(torch.float16)[1:], strict=False):
        torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


def test_the_gradient_of_a_sure_label_is_not_lost_in_rounding() -> None:
    """In bf16 its probability would be 1, and less 1 nothing."""
    x = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[8.0], [0.0]], dtype=torch.bfloat16, requires_grad=True)
    output_loss(Spread(), x, weight, torch.tensor([0]), torch.ones(1)).backward()
    unlikely = torch.sigmoid(torch.tensor(-8.0))
    torch.testing.assert_close(weight.grad.float()[:, 0], torch.stack([-unlikely, unlikely]), rtol=1e-2, atol=0)


def test_chunks_are_few_and_of_nearly_one_size() -> None:
    with small_chunks():
        assert [part.stop - part.start for part in chunks(24, VOCAB_SIZE)] == [3] * 8
        assert [part.stop - part.start for part in chunks(10, VOCAB_SIZE)] == [2, 3, 2, 3]
        assert [part.stop - part.start for part in chunks(3, VOCAB_SIZE * 100)] == [1, 1, 1]
        assert chunks(0, VOCAB_SIZE) == [slice(0, 0)]
