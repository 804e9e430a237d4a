"""The transformer: token-first, plain, and readable aloud.

t tokens of the micro batch   h hidden   n heads   g key/value heads   d head size   f MLP size   v vocabulary

Activations are [t, h]: the documents of a micro batch lie one after the other, and `cu_seqlens` says where each begins.
A padded batch is the case of equal lengths.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config import ModelConfig
from megatron.model.attention import BY_DOCUMENT, AttentionKernel, Documents
from megatron.model.rotary import Rotary, rotary_tables, rotate
from megatron.model.spread import Spread


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019, arXiv:1910.07467), computed in x's precision or better."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.epsilon).to(self.weight.dtype)


class Attention(nn.Module):
    """Self-attention with rotary positions; g key/value heads serve n query heads in groups."""

    def __init__(self, config: ModelConfig, spread: Spread, kernel: AttentionKernel) -> None:
        super().__init__()
        assert (
            config.hidden_size and config.num_attention_heads and config.num_attention_heads_kv and config.kv_channels
        )
        self.d = config.kv_channels
        self.q = nn.Linear(config.hidden_size, config.num_attention_heads * self.d, bias=False)
        self.k = nn.Linear(config.hidden_size, config.num_attention_heads_kv * self.d, bias=False)
        self.v = nn.Linear(config.hidden_size, config.num_attention_heads_kv * self.d, bias=False)
        self.o = nn.Linear(config.num_attention_heads * self.d, config.hidden_size, bias=False)
        self.dropout = config.attention_dropout
        self.spread = spread
        self.kernel = kernel

    def forward(self, x: Tensor, rotary: Rotary, documents: Documents) -> Tensor:
        k_weight, v_weight = self.spread.key_value(self.k.weight), self.spread.key_value(self.v.weight)
        heads = self.spread.column(x, self.q.weight, k_weight, v_weight)
        q, k, v = (head.unflatten(-1, (-1, self.d)) for head in heads)  # [t, n, d], [t, g, d], [t, g, d]
        with self.spread.head_randomness():
            dropout = self.dropout if self.training else 0.0
            out = self.kernel.attend(rotate(q, rotary), rotate(k, rotary), v, documents, dropout)
        return self.spread.row(out.flatten(-2), self.o.weight)


class MLP(nn.Module):
    """Gated feed-forward network, SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, spread: Spread) -> None:
        super().__init__()
        assert config.hidden_size and config.ffn_hidden_size
        self.gate = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.ffn_hidden_size, bias=False)
        self.down = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)
        self.spread = spread

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.spread.column(x, self.gate.weight, self.up.weight)  # [t, f], [t, f]
        return self.spread.row(F.silu(gate) * up, self.down.weight)


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, config: ModelConfig, number: int, spread: Spread, kernel: AttentionKernel) -> None:
        super().__init__()
        assert config.hidden_size
        self.input_norm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.attention = Attention(config, spread, kernel)
        self.mlp_norm = RMSNorm(config.hidden_size, config.layernorm_epsilon)
        self.mlp = MLP(config, spread)
        self.hidden_dropout = layer_dropout(config, number)
        self.spread = spread

    def forward(self, x: Tensor, rotary: Rotary, documents: Documents) -> Tensor:
        dropout = self.hidden_dropout if self.training else 0.0
        x = x + self.spread.dropout(self.attention(self.input_norm(x), rotary, documents), dropout)
        return x + self.spread.dropout(self.mlp(self.mlp_norm(x)), dropout)


def layer_dropout(config: ModelConfig, number: int) -> float:
    """Hidden dropout of layer `number`.

    With `lima_dropout` it rises linearly from 0 at the first layer to the full value at the last (Zhou et al. 2023,
    arXiv:2305.11206).
    """
    assert config.num_layers
    if not config.lima_dropout:
        return config.hidden_dropout
    return config.hidden_dropout * number / max(config.num_layers - 1, 1)


RunLayers = Callable[[Iterable[nn.Module], Tensor, Rotary, Documents], Tensor]


def run_layers(layers: Iterable[nn.Module], x: Tensor, rotary: Rotary, documents: Documents) -> Tensor:
    """Pass x through `layers`. A run that recomputes activations gives the model another function of this signature."""
    for layer in layers:
        x = layer(x, rotary, documents)
    return x


class Model(nn.Module):
    """A decoder-only language model, or a run of its layers.

    The embedding comes with the first layer, final norm and output layer come with the last; where the output layer is
    the embedding, a part with the last layer but not the first has an embedding of its own. What a part lacks is None.

    Args:
        config: the architecture.
        vocab_size: rows of the embedding, v.
        layers: which layers this is made of; by default all.
        spread: what the products mean; default: one device.
        kernel: how attention is computed.
        float32_residual: keep the residual stream in fp32 whatever the weights are.
    """

    def __init__(
        self,
        config: ModelConfig,
        vocab_size: int,
        *,
        layers: range | None = None,
        spread: Spread | None = None,
        kernel: AttentionKernel = BY_DOCUMENT,
        float32_residual: bool = False,
    ) -> None:
        super().__init__()
        assert config.num_layers and config.hidden_size
        self.config = config
        self.spread = spread or Spread()
        self.float32_residual = float32_residual
        self.run_layers: RunLayers = run_layers
        numbers = range(config.num_layers) if layers is None else layers
        is_last, tied = config.num_layers - 1 in numbers, config.tie_embed_logits
        self.embedding = nn.Embedding(vocab_size, config.hidden_size) if 0 in numbers or (is_last and tied) else None
        self.layers = nn.ModuleDict({str(n): Layer(config, n, self.spread, kernel) for n in numbers})
        self.final_norm = RMSNorm(config.hidden_size, config.layernorm_epsilon) if is_last else None
        self.lm_head = nn.Linear(config.hidden_size, vocab_size, bias=False) if is_last and not tied else None

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        labels: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Logits [t, v] of `tokens` [t], or with `labels` [t] the loss of each token [t] in fp32.

        A part without the last layer returns the hidden state [t, h] instead.

        Args:
            tokens: int64 [t], the documents of the micro batch one after the other.
            positions: int64 [t], position within the document.
            cu_seqlens: int32 [documents + 1], where each document begins; first 0, last t.
            max_seqlen: length of the longest document.
            labels: int64 [t], the id to predict at each position.
            hidden: [t, h], what the part before this one returned, for a part without the first layer.
        """
        config = self.config
        assert config.kv_channels
        documents = Documents(cu_seqlens, max_seqlen)
        rotary = rotary_tables(positions, config.kv_channels, config.rope_theta, config.rope_scaling_factor)
        x = self.run_layers(self.layers.values(), self._embed(tokens) if hidden is None else hidden, rotary, documents)
        if self.final_norm is None:
            return x
        head = self.embedding if self.lm_head is None else self.lm_head
        assert head is not None
        (logits,) = self.spread.column(self.final_norm(x), head.weight)
        return logits if labels is None else self.spread.cross_entropy(logits, labels)

    def _embed(self, tokens: Tensor) -> Tensor:
        assert self.embedding is not None
        x = self.spread.embed(tokens, self.embedding.weight)
        if self.float32_residual:
            x = x.float()
        drops = self.training and not self.config.lima_dropout
        return self.spread.dropout(x, self.config.hidden_dropout if drops else 0.0)
