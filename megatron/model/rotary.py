"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in the half-split form of Hugging Face's Llama."""

import math

import torch
from torch import Tensor

from megatron.config import ModelConfig


class Rotary:
    """Cosines and sines, [t, 1, d] each, in fp32 and, converted once for all layers, in that of the products.

    Sines of the first half are negative, as rotation takes them. `angles` [t, d / 2] are those of pairs of channels.
    """

    def __init__(self, angles: Tensor) -> None:
        cosines, sines = angles[:, None].cos(), angles[:, None].sin()  # [t, 1, d / 2]
        self._tables = {torch.float32: (torch.cat([cosines, cosines], dim=-1), torch.cat([-sines, sines], dim=-1))}

    def tables(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Both in `dtype`."""
        if dtype in self._tables:
            return self._tables[dtype]
        cosines, sines = self._tables[torch.float32]
        converted = cosines.to(dtype), sines.to(dtype)
        if not torch.compiler.is_compiling():  # there it is fused, and a layer that keeps it would need its own graph
            self._tables[dtype] = converted
        return converted


def rotary_tables(positions: Tensor, config: ModelConfig) -> Rotary | None:
    """For `positions` [t]; None for a model that does not rotate."""
    if config.position_embedding_type != "rotary":
        return None
    return Rotary(positions.float()[:, None] * _frequencies(config, positions.device))


def rotate(x: Tensor, rotary: Rotary | None) -> Tensor:
    """Turn each head of x [t, n, d] by the angles of its position."""
    if rotary is None:
        return x
    cosines, sines = rotary.tables(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat([second, first], dim=-1) * sines


def _frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Turns a token of each pair of channels, [d / 2], stretched as the model asks.

    linear: all positions by the same factor (Chen et al. 2023, arXiv:2306.15595); 2 means twice the context.
    llama3: only slow turns, longer than the original context / `rope_low_freq_factor`; fast ones, shorter than it /
    `rope_high_freq_factor`, stay, and between them it goes over smoothly (Llama 3.1).
    """
    assert config.kv_channels
    exponents = torch.arange(0, config.kv_channels, 2, dtype=torch.float32, device=device) / config.kv_channels
    frequencies = 1.0 / config.rope_theta**exponents
    factor = config.rope_scaling_factor
    if config.rope_scaling_type == "linear":
        return frequencies / factor
    assert config.rope_original_max_position_embeddings
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    turns = config.rope_original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - kept) * frequencies / factor + kept * frequencies
