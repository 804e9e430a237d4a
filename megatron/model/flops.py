"""The floating-point operations that training needs, by the sizes of the products: what MFU is a share of."""

from typing import Any

import numpy as np

from megatron.config import ModelConfig

Array = np.ndarray[Any, np.dtype[Any]]


def training_flops(config: ModelConfig, vocab_size: int, lengths: Array) -> float:
    """Operations of the forward and backward pass over documents of `lengths` tokens.

    A product with a weight takes 2 operations a weight and token, attention 4 n d for each pair of a token and one that
    it sees (Chowdhery et al. 2022, PaLM, arXiv:2204.02311, appendix B, but only the pairs that causal attention within
    a document, or a sliding window of it, has). The backward pass takes twice as many as the forward pass; recomputed
    ones do not count. The output layer counts for every token, though training leaves out those without loss weight.
    """
    assert config.num_layers and config.hidden_size and config.ffn_hidden_size and config.kv_channels
    assert config.num_attention_heads and config.num_attention_heads_kv
    heads, kv_heads = config.num_attention_heads, config.num_attention_heads_kv
    attention = 2 * (heads + kv_heads) * config.kv_channels
    mlp = (3 if config.glu_activation else 2) * config.ffn_hidden_size
    weights = config.hidden_size * (config.num_layers * (attention + mlp) + vocab_size)
    sizes = lengths.astype(np.float64)
    seen = np.minimum(sizes, config.sliding_window_size or np.inf)
    pairs = float((seen * (seen + 1) / 2 + (sizes - seen) * seen).sum())
    forward = 2 * weights * float(sizes.sum()) + 4 * config.num_layers * heads * config.kv_channels * pairs
    return 3 * forward
