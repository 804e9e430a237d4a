"""The model room: tokens in, logits or a loss out.

A plain `nn.Module`, written for one device. What each product *is* (columns, rows or vocabulary split) is said through
a `Spread`; the parallel room supplies another one to spread the same code over ranks.
"""

from megatron.model.attention import AttentionKernel, choose_attention_kernel
from megatron.model.flops import training_flops
from megatron.model.spread import Spread
from megatron.model.transformer import Model

__all__ = ["AttentionKernel", "Model", "Spread", "choose_attention_kernel", "training_flops"]
