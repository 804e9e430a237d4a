"""Cross entropy of the output layer, without ever holding the logits of all tokens.

Logits are the largest activation by far: a token has 128 thousand of them, and 4 thousand values of a hidden state. So
tokens go through in chunks, and a chunk's gradients are computed at once, while its logits are there: no product is
repeated.

t tokens   c tokens of a chunk   h hidden   v vocabulary, or this rank's part of it
"""

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

if TYPE_CHECKING:
    from megatron.model.spread import Spread

CHUNK_VALUES = 1 << 26
"""Logits of a chunk at most: enough that adding up the weight's gradient over chunks costs little."""

BLOCK_VALUES = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Of how many logits at once the softmax is computed, in fp32; on the CPU those stay in the cache."""


def output_loss(
    spread: "Spread", x: Tensor, weight: Tensor, labels: Tensor, factors: Tensor, supervised: Tensor | None = None
) -> Tensor:
    """Sum over tokens of loss times factor, fp32 [].

    The loss scale and the divisor belong into the factors, so that the gradients of logits have their final size from
    the beginning: in fp16 they would underflow without the scale.

    Args:
        spread: what the products mean.
        x: the last hidden state, as `Spread.column` takes it.
        weight: [v, h], of the output layer.
        labels: int64 [t].
        factors: fp32 [t].
        supervised: which tokens have a factor other than 0, if not all: the others need no logits.
    """
    return OutputLoss.apply(spread, x, weight, labels, factors, supervised)


def token_losses(spread: "Spread", x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Loss of each token, fp32 [t], without gradients. The arguments are those of `output_loss`."""
    x = spread.open_hidden(x)
    parts = chunks(len(x), spread.most_rows(weight))
    return torch.cat([_losses(spread, x[part] @ weight.t(), labels[part])[0] for part in parts])


def likeliest(spread: "Spread", x: Tensor, weight: Tensor) -> Tensor:
    """The likeliest id of each token, int64 [t], the lowest of equal ones."""
    x = spread.open_hidden(x)
    return torch.cat([spread.argmax(x[part] @ weight.t()) for part in chunks(len(x), spread.most_rows(weight))])


def chunks(tokens: int, vocab_size: int) -> list[slice]:
    """The tokens of each chunk, the same on all ranks: as few chunks as there can be, of nearly the same size.

    `vocab_size` is that of the rank that has the largest part of the vocabulary.
    """
    count = max(1, min(tokens, -(-tokens * vocab_size // CHUNK_VALUES)))
    bounds = [tokens * number // count for number in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(bounds)]


class OutputLoss(torch.autograd.Function):
    """See `output_loss`. The backward pass hands on the gradients that the forward pass has computed."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        spread: "Spread",
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        factors: Tensor,
        supervised: Tensor | None,
    ) -> Tensor:
        x = spread.open_hidden(x)
        shape = x.shape
        if supervised is not None:
            x, labels, factors = (tensor[supervised] for tensor in (x, labels, factors))
        parts = chunks(len(x), spread.most_rows(weight))
        total, x_gradient = factors.new_zeros(()), torch.empty_like(x)
        weight_gradient = torch.zeros_like(weight, dtype=weight.dtype if len(parts) == 1 else torch.float32)
        for part in parts:
            logits = x[part] @ weight.t()  # [c, v]
            losses, shares = _losses(spread, logits, labels[part])
            total += losses @ factors[part]
            _become_gradient(spread, logits, labels[part], factors[part], losses, shares)
            torch.mm(logits, weight, out=x_gradient[part])
            _add_product(weight_gradient, logits, x[part])
        del logits
        if supervised is not None:
            x_gradient = x.new_zeros(shape).index_copy_(0, supervised, x_gradient)
        ctx.save_for_backward(spread.close_hidden(x_gradient), weight_gradient.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x_gradient, weight_gradient = ctx.saved_tensors
        weight_gradient.mul_(gradient)  # in place: it is used once
        return None, x_gradient * gradient, weight_gradient, None, None, None


def _add_product(total: Tensor, logits_gradient: Tensor, x: Tensor) -> None:
    """Add the gradient of the weight [v, h], a block at a time."""
    rows = max(1, BLOCK_VALUES[x.device.type] // x.shape[1])
    for block, columns in zip(total.split(rows), logits_gradient.split(rows, dim=1), strict=True):
        block += columns.t() @ x


def _losses(spread: "Spread", logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each token, and log of the share that this rank's part of the vocabulary has of it; both fp32 [c]."""
    columns, mine = spread.own_labels(labels, logits.shape[1])
    targets = logits.gather(1, columns[:, None])[:, 0].float() * mine
    own = torch.cat([_log_sums(block) for block in logits.split(_block_rows(logits))])
    log_sums, targets = spread.join_vocabulary(own, targets)
    return log_sums - targets, own - log_sums


def _log_sums(logits: Tensor) -> Tensor:
    """Log-sum-exp, fp32, by way of the softmax, which is one fused operation: the largest logit less its log."""
    return logits.amax(-1).float() - torch.softmax(logits, -1, dtype=torch.float32).amax(-1).log()


def _become_gradient(
    spread: "Spread", logits: Tensor, labels: Tensor, factors: Tensor, losses: Tensor, shares: Tensor
) -> None:
    """Put the gradient of the sum of losses times factors in the place of the logits.

    It is the probability times the factor; at the label the probability less 1, which is taken from the loss: as a
    difference of nearly equal numbers it would be lost in rounding.
    """
    rows, scales = _block_rows(logits), shares.exp() * factors
    for block, scale in zip(logits.split(rows), scales.split(rows), strict=True):
        block.copy_(torch.softmax(block, -1, dtype=torch.float32).mul_(scale[:, None]))
    columns, mine = (x[:, None] for x in spread.own_labels(labels, logits.shape[1]))
    at_label = (factors * torch.expm1(-losses))[:, None].to(logits.dtype)
    logits.scatter_(1, columns, torch.where(mine, at_label, logits.gather(1, columns)))


def _block_rows(logits: Tensor) -> int:
    """Tokens of a block."""
    return max(1, BLOCK_VALUES[logits.device.type] // logits.shape[1])
