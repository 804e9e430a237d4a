"""The operations that MFU counts, against PyTorch's own counter."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron.config import ModelConfig
from megatron.model import Model, training_flops
from megatron.model.cross_entropy import output_loss

LLAMA = ModelConfig(
    model_name="llama2",
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_attention_heads_kv=2,
    kv_channels=8,
    max_position_embeddings=64,
    use_rms_norm=True,
    glu_activation="swiglu",
    position_embedding_type="rotary",
    tie_embed_logits=False,
    attention_dropout=0.0,
    hidden_dropout=0.0,
)
LENGTH = 40


def products(model: ModelConfig) -> int:
    """Operations of all matrix products of a forward and backward pass over one document, by PyTorch."""
    module, ids = Model(model, 101), torch.arange(LENGTH)
    head = partial(output_loss, module.spread, labels=ids, factors=torch.ones(LENGTH))
    with FlopCounterMode(display=False) as counter:
        module(ids, ids, torch.tensor([0, LENGTH], dtype=torch.int32), LENGTH, head).backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in counts.items() if "mm" in str(operation))


@pytest.mark.parametrize("changes", [{}, {"glu_activation": None}, {"num_attention_heads_kv": 4}], ids=str)
def test_products_are_those_that_run(changes: dict[str, object]) -> None:
    model = replace(LLAMA, **changes)
    attention = 3 * 4 * model.num_layers * model.num_attention_heads * model.kv_channels * LENGTH * (LENGTH + 1) / 2
    assert training_flops(model, 101, np.array([LENGTH])) - attention == products(model)


def test_attention_is_of_the_pairs_that_are_seen() -> None:
    def pairs(lengths: list[int], window: int | None) -> float:
        model = replace(LLAMA, sliding_window_size=window)
        no_pairs = training_flops(model, 101, np.ones(sum(lengths))) - 12 * 2 * 4 * 8 * sum(lengths)
        return (training_flops(model, 101, np.array(lengths)) - no_pairs) / (12 * 2 * 4 * 8)

    assert pairs([5, 3], None) == 15 + 6
    assert pairs([5, 3], 2) == (1 + 2 + 2 + 2 + 2) + (1 + 2 + 2)
    assert pairs([5, 3], 9) == 15 + 6
