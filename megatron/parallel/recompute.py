"""Activation recomputation: store less in the forward pass, compute it again in the backward.

| granularity | kept of a layer                                  | computed again        |
|-------------|--------------------------------------------------|-----------------------|
| none        | everything                                       | nothing               |
| selective   | matrix products and attention outputs            | norms, rotary, SwiGLU |
| full        | the input of each run of `recompute_num_layers`  | all of it             |
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from megatron.config import RecomputeConfig
from megatron.model.layer import RunLayers, run_layers

KEPT_OPERATIONS = {
    "aten::mm",
    "aten::addmm",
    "megatron::column_products",
    "megatron::row_product",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_flash_attention_forward",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::fwd",
}
"""Operations whose outputs selective recomputation keeps: costly to compute again, cheap to store."""


def recomputing(recompute: RecomputeConfig, num_layers: int) -> RunLayers:
    """The function that passes activations through the layers, recomputing as asked."""
    granularity = recompute.recompute_granularity
    if granularity is None:
        return run_layers
    if granularity == "selective":
        return partial(_run_in_spans, spans=[1] * num_layers, recomputed=num_layers, **SELECTIVE)
    size = recompute.recompute_num_layers
    if recompute.recompute_method == "block":
        return partial(_run_in_spans, spans=[1] * num_layers, recomputed=size)
    spans = [min(size, num_layers - start) for start in range(0, num_layers, size)]
    return partial(_run_in_spans, spans=spans, recomputed=len(spans))


def _run_in_spans(
    layers: Iterable[nn.Module], x: Tensor, *context: Any, spans: list[int], recomputed: int, **options: Any
) -> Tensor:
    """Pass x through consecutive spans of layers, the first `recomputed` of them under a checkpoint."""
    remaining = iter(layers)
    for number, size in enumerate(spans):
        span = [next(remaining) for _ in range(size)]
        if number < recomputed and torch.is_grad_enabled():
            x = checkpoint(run_layers, span, x, *context, use_reentrant=False, **options)
        else:
            x = run_layers(span, x, *context)
    return x


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation.name().split(".")[0] in KEPT_OPERATIONS if hasattr(operation, "name") else False
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


SELECTIVE: dict[str, Any] = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)}
"""What makes a checkpoint a selective one."""


def selective(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function under a selective checkpoint."""
    return partial(checkpoint, forward, use_reentrant=False, **SELECTIVE)
