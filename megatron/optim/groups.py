"""Parameter groups and the optimizer over them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from megatron.config import OptimizerConfig

FUSED_DEVICES = {"cpu", "cuda"}
"""Where PyTorch's fused AdamW exists; elsewhere its own choice of implementation is taken."""


def parameter_groups(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """At most two groups: matrices, which decay, and biases and norm weights, which do not.

    A group carries `wd_mult` and `lr_mult`, the factors that `set_hyperparameters` applies. Frozen parameters are in
    neither.
    """
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            is_matrix = parameter.ndim > 1 and not name.endswith("bias")
            (decayed if is_matrix else undecayed).append(parameter)
    groups = [
        {"params": decayed, "wd_mult": 1.0, "lr_mult": 1.0},
        {"params": undecayed, "wd_mult": 0.0, "lr_mult": 1.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (decoupled weight decay) or SGD with momentum over `model`'s parameters, plain or DTensor.

    The learning rate is 0 until `set_hyperparameters` gives one.
    """
    groups = parameter_groups(model.named_parameters())
    if config.optimizer == "sgd":  # its fused kernel does not take DTensors
        return torch.optim.SGD(groups, lr=0.0, momentum=config.sgd_momentum)
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    fused = True if devices <= FUSED_DEVICES else None
    return torch.optim.AdamW(
        groups, lr=0.0, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_eps, weight_decay=0.0, fused=fused
    )


def set_hyperparameters(optimizer: torch.optim.Optimizer, learning_rate: float, weight_decay: float) -> None:
    """Set both for the next step, times each group's `lr_mult` and `wd_mult`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_mult"]
        group["weight_decay"] = weight_decay * group["wd_mult"]
