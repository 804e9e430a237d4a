"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in the half-split form of Hugging Face's Llama."""

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines, [t, d] each."""


def rotary_tables(positions: Tensor, head_size: int, theta: float, scaling_factor: float) -> Rotary:
    """Cosines and sines for `positions` [t], in fp32.

    `scaling_factor` stretches the positions linearly (Chen et al. 2023, arXiv:2306.15595): 2 means twice the context.
    """
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device=positions.device) / head_size
    frequencies = 1.0 / theta**exponents / scaling_factor
    angles = positions.float()[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn each head of x [t, n, d] by the angles of its position."""
    cosines, sines = (table[:, None].to(x.dtype) for table in rotary)
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([-second, first], dim=-1) * sines
