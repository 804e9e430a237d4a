"""The law for every family: norms with biases, fused or few heads, learned positions, windows, parallel attention."""

from typing import Any

import pytest
import test_law
from worlds import World

TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
TP4 = {"tensor_model_parallel_size": 4}
PP2 = {"pipeline_model_parallel_size": 2}
LLAMA3 = {
    **{"rope_scaling_type": "llama3", "rope_scaling_factor": 8.0, "rope_original_max_position_embeddings": 16},
    "tie_embed_logits": True,
}
GPT = {
    **{"model_name": "gpt", "use_bias": True, "num_attention_heads_kv": 4, "hidden_dropout": 0.0},
    **{"attention_dropout": 0.0, "tie_embed_logits": True, "position_embedding_type": "absolute"},
}
FALCON_7B = {"model_name": "falcon", "num_attention_heads_kv": 1, "tie_embed_logits": True}
FALCON_40B = {"model_name": "falcon", "parallel_layernorm": True, "tie_embed_logits": True}

FAMILIES: list[tuple[int, dict[str, Any]]] = [
    (2, {"model_name": "llama3", **LLAMA3, **TP2}),
    (2, {"model_name": "mistral", "sliding_window_size": 5, **TP2}),
    (2, {"model_name": "mistral", "sliding_window_size": 5, **PP2}),
    (2, {"model_name": "qwen2", **TP2}),
    (4, {"model_name": "qwen2", **TP4}),
    (2, {"model_name": "qwen2", **PP2}),
    (2, {"model_name": "qwen3", **TP2}),
    (4, {"model_name": "qwen3", "kv_channels": 6, **TP4}),
    (4, {"model_name": "qwen3", "num_attention_heads_kv": 1, **TP2, **PP2}),
    (2, {**FALCON_7B, **TP2}),
    (2, {**FALCON_7B, "tensor_model_parallel_size": 2}),
    (4, {**FALCON_7B, **TP4, "recompute_granularity": "selective"}),
    (4, {**FALCON_7B, **PP2, **TP2}),
    (4, {**FALCON_40B, **TP4}),
    (2, {**FALCON_40B, **PP2}),
    (2, {**FALCON_40B, "full_sharding": True}),
    (1, {**GPT, "packing": "none"}),
    (2, {**GPT, **TP2}),
    (2, {**GPT, "tensor_model_parallel_size": 2}),
    (4, {**GPT, **PP2, **TP2, "recompute_granularity": "selective"}),
    (2, {**GPT, "use_post_ln": True, **PP2}),
    (2, {**GPT, "use_post_ln": True, "glu_activation": "geglu", **TP2}),
]


@pytest.mark.parametrize(("size", "flags"), FAMILIES, ids=str)
def test_every_family_on_any_layout_equals_one_device(world: World, size: int, flags: dict[str, Any]) -> None:
    test_law.test_any_layout_equals_one_device(world, size, flags)
