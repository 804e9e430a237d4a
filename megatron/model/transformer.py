"""The language model: token-first, plain, and readable aloud.

t tokens of the micro batch   h hidden   v vocabulary

Activations are [t, h]: the documents of a micro batch lie one after the other, and `cu_seqlens` says where each begins.
A padded batch is the case of equal lengths.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.config import ModelConfig
from megatron.model.attention import BY_DOCUMENT, AttentionKernel, Documents
from megatron.model.layer import Layer, RunLayers, hidden_norm, run_layers
from megatron.model.rotary import rotary_tables
from megatron.model.spread import Spread

Head = Callable[[Tensor, Tensor], Tensor]
"""(last hidden state, as `Spread.column` takes it; weight [v, h] of the output layer) -> the model's result.

See `megatron.model.cross_entropy` for heads that do not hold all logits.
"""


class Embedding(nn.Module):
    """Rows of vectors. They have no values yet: PyTorch's own would draw some, for which it imports its compiler."""

    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, size))


class Model(nn.Module):
    """A decoder-only language model, or a run of its layers.

    The embedding comes with the first layer, final norm and output layer come with the last; where the output layer is
    the embedding, a part with the last layer but not the first has an embedding of its own. What a part lacks is None.
    Values are given afterwards (`megatron.model.initialization`, or a checkpoint).

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
        self.embedding = Embedding(vocab_size, config.hidden_size) if 0 in numbers or (is_last and tied) else None
        self.position_embedding = None
        if 0 in numbers and config.position_embedding_type == "absolute":
            assert config.max_position_embeddings
            self.position_embedding = Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleDict({str(n): Layer(config, n, self.spread, kernel) for n in numbers})
        self.is_last = is_last
        self.final_norm = hidden_norm(config) if is_last and not config.use_post_ln else None
        self.lm_head = nn.Linear(config.hidden_size, vocab_size, bias=False) if is_last and not tied else None

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        head: Head | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """Logits [t, v] of `tokens` [t], or what `head` makes instead.

        A part without the last layer returns the hidden state [t, h] instead.

        Args:
            tokens: int64 [t], the documents of the micro batch one after the other.
            positions: int64 [t], position within the document.
            cu_seqlens: int32 [documents + 1], where each document begins; first 0, last t.
            max_seqlen: length of the longest document.
            head: what to compute of the last hidden state and the output layer's weight.
            hidden: [t, h], what the part before this one returned, for a part without the first layer.
        """
        documents, rotary = Documents(cu_seqlens, max_seqlen), rotary_tables(positions, self.config)
        x = self._embed(tokens, positions) if hidden is None else hidden
        x = self.run_layers(self.layers.values(), x, rotary, documents)
        if not self.is_last:
            return x
        x = x if self.final_norm is None else self.final_norm(x)
        output = self.embedding if self.lm_head is None else self.lm_head
        assert output is not None
        return self._logits(x, output.weight) if head is None else head(x, output.weight)

    def _logits(self, x: Tensor, weight: Tensor) -> Tensor:
        (logits,) = self.spread.column(x, weight)
        return logits

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        assert self.embedding is not None
        x = self.spread.embed(tokens, self.embedding.weight)
        if self.position_embedding is not None:
            x = x + F.embedding(self.spread.own_tokens(positions), self.position_embedding.weight)
        if self.float32_residual:
            x = x.float()
        drops = self.training and not self.config.lima_dropout
        return self.spread.dropout(x, self.config.hidden_dropout if drops else 0.0)
