"""Tensor and sequence parallelism (Shoeybi et al. 2019, arXiv:1909.08053; Korthikanti et al. 2022, arXiv:2205.05198).

Two dual pairs of collectives carry everything; each is the other's backward:

    without sequence parallelism     identity  <->  all-reduce
    with it (x is [t / ranks, h])    gather    <->  reduce-scatter

`column` opens a pair and `row` closes it, so between them activations are whole in t and divided in features.
t tokens   h hidden   v vocabulary
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megatron.model import Spread
from megatron.parallel.plan import chunk

# named *_tensor before torch 2.13
all_gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
reduce_scatter = getattr(collectives, "reduce_scatter_single", None) or collectives.reduce_scatter_tensor


class Duals:
    """The pair of collectives that a group of tensor-parallel ranks uses, as plain functions without autograd.

    They return before the collective is done; the first use of the result waits.
    """

    def __init__(self, group: dist.ProcessGroup, sequence_parallel: bool) -> None:
        self.group = group
        self.sequence_parallel = sequence_parallel

    def open(self, x: Tensor) -> Tensor:
        """What a column product reads: x whole in t."""
        if not self.sequence_parallel:
            return x
        return all_gather(x.contiguous(), 0, self.group)

    def close(self, x: Tensor) -> Tensor:
        """The sum over ranks of partial x, this rank's tokens of it under sequence parallelism."""
        if self.sequence_parallel:
            return reduce_scatter(x.contiguous(), "sum", 0, self.group)
        return collectives.all_reduce(x.contiguous(), "sum", self.group)


@torch.library.custom_op("megatron::column_products", mutates_args=())
def column_products(x: Tensor, weights: list[Tensor], group: str, sequence_parallel: bool) -> list[Tensor]:
    """The products of `GatherLinear` as one operation, so that selective recomputation keeps its outputs.

    Were the gather an operation of its own, recomputation would repeat it for nothing.
    """
    whole = all_gather(x.contiguous(), 0, cast(Any, group)) if sequence_parallel else x
    return [F.linear(whole, weight) for weight in weights]


@column_products.register_fake
def _(x: Tensor, weights: list[Tensor], group: str, sequence_parallel: bool) -> list[Tensor]:
    ranks = _ranks(group, sequence_parallel)
    return [x.new_empty(x.shape[0] * ranks, weight.shape[0]) for weight in weights]


@torch.library.custom_op("megatron::row_product", mutates_args=())
def row_product(x: Tensor, weight: Tensor, group: str, sequence_parallel: bool) -> Tensor:
    """The product and sum of `RowLinear` as one operation, so that selective recomputation keeps the sum alone.

    Were they two, it would keep this rank's summand, whole in t, as well.
    """
    partial, ranks = F.linear(x, weight), cast(Any, group)
    total = (
        reduce_scatter(partial, "sum", 0, ranks) if sequence_parallel else collectives.all_reduce(partial, "sum", ranks)
    )
    return collectives.wait_tensor(total)


@row_product.register_fake
def _(x: Tensor, weight: Tensor, group: str, sequence_parallel: bool) -> Tensor:
    return x.new_empty(x.shape[0] // _ranks(group, sequence_parallel), weight.shape[0])


def _ranks(group: str, sequence_parallel: bool) -> int:
    """Over how many ranks tokens are divided outside the products."""
    if not sequence_parallel:
        return 1
    return dist.get_world_size(dist.distributed_c10d._resolve_process_group(cast(Any, group)))


class GatherLinear(torch.autograd.Function):
    """Column products of one x: gathered once, and its gradient reduced while the weight gradients are computed."""

    @staticmethod
    def forward(ctx: FunctionCtx, duals: Duals, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        ctx.duals = duals  # type: ignore[attr-defined]
        return tuple(column_products(x, list(weights), duals.group.group_name, duals.sequence_parallel))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, *weights = ctx.saved_tensors
        whole = ctx.duals.open(x)
        partial = gradients[0] @ weights[0]
        for gradient, weight in zip(gradients[1:], weights[1:], strict=True):
            partial.addmm_(gradient, weight)
        x_gradient = ctx.duals.close(partial)
        weight_gradients = [gradient.t() @ whole for gradient in gradients]
        return None, x_gradient, *weight_gradients


class RowLinear(torch.autograd.Function):
    """A row product: this rank's summand, summed over ranks."""

    @staticmethod
    def forward(ctx: FunctionCtx, duals: Duals, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.duals = duals  # type: ignore[attr-defined]
        return row_product(x, weight, duals.group.group_name, duals.sequence_parallel)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        whole = ctx.duals.open(gradient)
        return None, whole @ weight, whole.t() @ x


class Close(torch.autograd.Function):
    """Sum of partial results over ranks; backward: every rank gets the gradient of all tokens.

    It waits: a compiled layer passes no gradient on to a sum that is still under way (torch 2.13).
    """

    @staticmethod
    def forward(ctx: FunctionCtx, duals: Duals, x: Tensor) -> Tensor:
        ctx.duals = duals  # type: ignore[attr-defined]
        return collectives.wait_tensor(duals.close(x))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None, ctx.duals.open(gradient)


def _own_rows(ids: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """Which ids fall on this rank's rows [start, start + size): their local numbers (0 elsewhere), and the mask."""
    local = ids - start
    mine = (local >= 0) & (local < size)
    return local * mine, mine


class TensorSpread(Spread):
    """The products of the model on one of several tensor-parallel ranks; weights are this rank's parts.

    With `sums_rows_at_once` a row product is one operation with its sum, which is what selective recomputation wants.
    Full recomputation does not: it stops before the last product only if that is an operation by itself.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        sequence_parallel: bool,
        vocab_size: int,
        key_value_heads: int,
        sums_rows_at_once: bool = False,
    ) -> None:
        self.sums_rows_at_once = sums_rows_at_once
        self.duals = Duals(group, sequence_parallel)
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.vocab_start, _ = chunk(vocab_size, self.size, self.rank)
        _, self.vocab_part = chunk(vocab_size, self.size, 0)  # the first ranks have most
        self.key_value_heads = key_value_heads

    def column(self, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return GatherLinear.apply(self.duals, x, *weights)

    def row(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.sums_rows_at_once:
            return RowLinear.apply(self.duals, x, weight)
        return Close.apply(self.duals, F.linear(x, weight))

    def key_value(self, weight: Tensor) -> Tensor:
        """The head this rank's query heads attend to, where heads are fewer than ranks and the weight is kept whole."""
        if self.key_value_heads >= self.size:
            return weight
        return weight.chunk(self.key_value_heads)[self.rank * self.key_value_heads // self.size]

    def embed(self, tokens: Tensor, weight: Tensor) -> Tensor:
        rows, mine = _own_rows(tokens, self.vocab_start, weight.shape[0])
        return Close.apply(self.duals, F.embedding(rows, weight) * mine[:, None])

    def own_tokens(self, x: Tensor) -> Tensor:
        return x.chunk(self.size)[self.rank] if self.duals.sequence_parallel else x

    def open_hidden(self, x: Tensor) -> Tensor:
        return self.duals.open(x)

    def close_hidden(self, gradient: Tensor) -> Tensor:
        return collectives.wait_tensor(self.duals.close(gradient))

    def most_rows(self, weight: Tensor) -> int:
        return self.vocab_part

    def own_labels(self, labels: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
        return _own_rows(labels, self.vocab_start, vocab_size)

    def join_vocabulary(self, log_sums: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        largest = collectives.all_reduce(log_sums, "max", self.group)
        shares = torch.stack([(log_sums - largest).exp(), targets])
        total, target = collectives.all_reduce(shares, "sum", self.group)
        return largest + total.log(), target

    def argmax(self, logits: Tensor) -> Tensor:
        own, columns = logits.max(-1)  # the first of equal ones
        largest = collectives.all_reduce(own.float(), "max", self.group)
        ids = (columns + self.vocab_start).masked_fill(own < largest, torch.iinfo(torch.int64).max)
        return collectives.all_reduce(ids, "min", self.group)

    def hidden_randomness(self) -> AbstractContextManager[None]:
        return self.head_randomness() if self.duals.sequence_parallel else nullcontext()

    def head_randomness(self) -> AbstractContextManager[None]:
        return own_randomness(self.rank)


@contextmanager
def own_randomness(rank: int) -> Iterator[None]:
    """A random state of this rank's own, grown from the one it shares with its group.

    The shared state moves on by one draw, on every rank alike, so recomputation restores both by restoring it.
    """
    seed = int(torch.randint(2**62, ())) + rank
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
