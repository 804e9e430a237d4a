"""Initial weights: a pure function of the seed and the parameter's name, so every layout starts from the same ones."""

import zlib

import torch
from torch import Tensor, nn

from megatron.config import ModelConfig

RESIDUAL_OUTPUTS = ("attention.o.weight", "mlp.down.weight")
"""Products that write into the residual stream; scaled down with depth (GPT-2, Radford et al. 2019)."""


def initial_weight(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    """The whole initial tensor of parameter `name`, fp32, on the CPU."""
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    generator = torch.Generator().manual_seed(seed * 2**32 + zlib.crc32(name.encode()))
    weight = torch.empty(shape)
    if config.init_method_xavier_uniform:
        return nn.init.xavier_uniform_(weight, generator=generator)
    assert config.num_layers
    depth_scale = (2.0 * config.num_layers) ** -0.5 if name.endswith(RESIDUAL_OUTPUTS) else 1.0
    return weight.normal_(0.0, config.init_method_std * depth_scale, generator=generator)
