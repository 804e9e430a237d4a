"""Root-mean-square norm on the CPU, where PyTorch computes it by a dozen passes over fp32 copies that it then keeps.

t tokens   h size of what is normalized
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

BLOCK_VALUES = 1 << 17
"""Values computed at once: few enough to stay in the cache."""


class RMSNormByBlock(torch.autograd.Function):
    """x / root mean square of x * weight, in fp32 or better, as weight's type; keeps x as it is.

    Arguments: x [t, h], or more dimensions in the place of t; weight [h]; epsilon, added to the mean square.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        result = torch.empty(x.shape, dtype=weight.dtype)
        reciprocals = torch.empty((*x.shape[:-1], 1), dtype=torch.promote_types(x.dtype, torch.float32))
        for values, reciprocal, out in _blocks(x, reciprocals, result):
            wide = values.to(reciprocal.dtype, copy=True)
            torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(epsilon), out=reciprocal)
            out.copy_(wide.mul_(reciprocal).mul_(weight))
        ctx.save_for_backward(x, weight, reciprocals)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, reciprocals = ctx.saved_tensors
        x_gradient = torch.empty(x.shape, dtype=x.dtype)
        weight_gradient = torch.zeros(weight.shape, dtype=reciprocals.dtype)
        weight = weight.to(reciprocals.dtype)
        for values, upstream, reciprocal, out in _blocks(x, gradient, reciprocals, x_gradient):
            normalized = values.to(weight.dtype, copy=True).mul_(reciprocal)
            wide = upstream.to(weight.dtype, copy=True)
            product = wide * normalized
            weight_gradient += product.sum(0)
            along = product.mul_(weight).mean(-1, keepdim=True)  # of what the norm takes out
            out.copy_(wide.mul_(weight).sub_(normalized.mul_(along)).mul_(reciprocal))
        return x_gradient, weight_gradient, None


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows of each at once; of contiguous tensors, as the results are, views."""
    rows = max(1, BLOCK_VALUES // tensors[0].shape[-1])
    return zip(*(tensor.reshape(-1, tensor.shape[-1]).split(rows) for tensor in tensors), strict=True)
