"""A transformer layer, of every family: the configuration chooses norms, activation, biases and their places.

t tokens of the micro batch   h hidden   n heads   g key/value heads   d head size   f MLP size
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config import ModelConfig
from megatron.model.attention import AttentionKernel, Documents
from megatron.model.rms_norm import RMSNormByBlock
from megatron.model.rotary import Rotary, rotate
from megatron.model.spread import Spread


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019, arXiv:1910.07467), computed in x's precision or better."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return RMSNormByBlock.apply(x, self.weight, self.epsilon)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.epsilon).to(self.weight.dtype)


class LayerNorm(nn.Module):
    """Layer norm (Ba et al. 2016, arXiv:1607.06450), computed in x's precision or better."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.weight.shape, weight, bias, self.epsilon).to(self.weight.dtype)


def hidden_norm(config: ModelConfig) -> RMSNorm | LayerNorm:
    """The family's norm of the hidden state."""
    assert config.hidden_size
    return (RMSNorm if config.use_rms_norm else LayerNorm)(config.hidden_size, config.layernorm_epsilon)


def biased(x: Tensor, bias: Tensor | None) -> Tensor:
    """x with the bias of its product, if that has one."""
    return x if bias is None else x + bias


class Attention(nn.Module):
    """Self-attention; g key/value heads serve n query heads in groups."""

    def __init__(self, config: ModelConfig, spread: Spread, kernel: AttentionKernel) -> None:
        super().__init__()
        h, n, g, d = config.hidden_size, config.num_attention_heads, config.num_attention_heads_kv, config.kv_channels
        assert h and n and g and d
        bias = config.use_bias or config.add_qkv_bias
        self.d, self.window = d, config.sliding_window_size
        self.q = nn.Linear(h, n * d, bias=bias)
        self.k = nn.Linear(h, g * d, bias=bias)
        self.v = nn.Linear(h, g * d, bias=bias)
        self.o = nn.Linear(n * d, h, bias=config.use_bias)
        self.q_norm = RMSNorm(d, config.layernorm_epsilon) if config.qk_layernorm else None
        self.k_norm = RMSNorm(d, config.layernorm_epsilon) if config.qk_layernorm else None
        self.dropout = config.attention_dropout
        self.spread = spread
        self.kernel = kernel

    def forward(self, x: Tensor, rotary: Rotary | None, documents: Documents) -> Tensor:
        weights, biases = zip(*self._products(), strict=True)
        heads = map(biased, self.spread.column(x, *weights), biases)
        q, k, v = (head.unflatten(-1, (-1, self.d)) for head in heads)  # [t, n, d], [t, g, d], [t, g, d]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        dropout = self.dropout if self.training else 0.0
        with self.spread.head_randomness() if dropout else nullcontext():
            out = self.kernel.attend(rotate(q, rotary), rotate(k, rotary), v, documents, dropout, self.window)
        return biased(self.spread.row(out.flatten(-2), self.o.weight), self.o.bias)

    def _products(self) -> list[tuple[Tensor, Tensor | None]]:
        """Weight and bias of q, k and v, as far as this device computes with them."""
        products: list[tuple[Tensor, Tensor | None]] = [(self.q.weight, self.q.bias)]
        for part in (self.k, self.v):
            bias = None if part.bias is None else self.spread.key_value(part.bias)
            products.append((self.spread.key_value(part.weight), bias))
        return products


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "geglu": F.gelu,
    "liglu": lambda x: x,
    "reglu": F.relu,
    "swiglu": F.silu,
}
"""`--activation` or `--glu_activation` -> the function; a GLU (Shazeer 2020, arXiv:2002.05202) multiplies it by up."""


class MLP(nn.Module):
    """Feed-forward network, gated or not."""

    def __init__(self, config: ModelConfig, spread: Spread) -> None:
        super().__init__()
        assert config.hidden_size and config.ffn_hidden_size
        sizes, bias = (config.hidden_size, config.ffn_hidden_size), config.use_bias
        self.gate = nn.Linear(*sizes, bias=bias) if config.glu_activation else None
        self.up = nn.Linear(*sizes, bias=bias)
        self.down = nn.Linear(*sizes[::-1], bias=bias)
        self.activation = ACTIVATIONS[config.glu_activation or config.activation]
        self.spread = spread

    def forward(self, x: Tensor) -> Tensor:
        inner = [self.up] if self.gate is None else [self.gate, self.up]
        products = self.spread.column(x, *(part.weight for part in inner))  # [t, f] each
        first, *rest = (biased(product, part.bias) for product, part in zip(products, inner, strict=True))
        x = self.activation(first)
        for factor in rest:
            x = x * factor
        return biased(self.spread.row(x, self.down.weight), self.down.bias)


class Layer(nn.Module):
    """Attention and MLP, each added to the residual stream.

    use_post_ln              x -> x + attention(x) -> x + mlp(norm(x)) -> norm(x)
    parallel_attn            x -> x + attention(norm(x)) + mlp(norm(x)), one norm, or with parallel_layernorm two
    neither                  x -> x + attention(norm(x)) -> x + mlp(norm(x))
    """

    def __init__(self, config: ModelConfig, number: int, spread: Spread, kernel: AttentionKernel) -> None:
        super().__init__()
        shares_norm = config.parallel_attn and not config.parallel_layernorm
        self.input_norm = None if config.use_post_ln else hidden_norm(config)
        self.attention = Attention(config, spread, kernel)
        self.mlp_norm = None if shares_norm else hidden_norm(config)
        self.mlp = MLP(config, spread)
        self.output_norm = hidden_norm(config) if config.use_post_ln else None
        self.is_parallel = config.parallel_attn
        self.hidden_dropout = layer_dropout(config, number)
        self.spread = spread

    def forward(self, x: Tensor, rotary: Rotary | None, documents: Documents) -> Tensor:
        dropout = self.hidden_dropout if self.training else 0.0
        normed = x if self.input_norm is None else self.input_norm(x)
        attended = self.attention(normed, rotary, documents)
        if self.is_parallel:
            transformed = self.mlp(normed if self.mlp_norm is None else self.mlp_norm(x))
            x = x + self.spread.dropout(attended + transformed, dropout)
        else:
            assert self.mlp_norm is not None
            x = x + self.spread.dropout(attended, dropout)
            x = x + self.spread.dropout(self.mlp(self.mlp_norm(x)), dropout)
        return x if self.output_norm is None else self.output_norm(x)


def layer_dropout(config: ModelConfig, number: int) -> float:
    """Hidden dropout of layer `number`.

    With `lima_dropout` it rises linearly from 0 at the first layer to the full value at the last (Zhou et al. 2023,
    arXiv:2305.11206).
    """
    assert config.num_layers
    if not config.lima_dropout:
        return config.hidden_dropout
    return config.hidden_dropout * number / max(config.num_layers - 1, 1)


RunLayers = Callable[[Iterable[nn.Module], Tensor, Rotary | None, Documents], Tensor]


def run_layers(layers: Iterable[nn.Module], x: Tensor, rotary: Rotary | None, documents: Documents) -> Tensor:
    """Pass x through `layers`. A run that recomputes activations gives the model another function of this signature."""
    for layer in layers:
        x = layer(x, rotary, documents)
    return x
