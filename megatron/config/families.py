"""Model families: what each requires of the architecture and what it advises."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """A preset.

    Attributes:
        requires: fields that must have these values; a flag that says otherwise is an error.
        advises: defaults of the family; a flag or a checkpoint may say otherwise.
    """

    requires: Mapping[str, Any]
    advises: Mapping[str, Any]


LLAMA_LAYER = {
    "use_rms_norm": True,
    "glu_activation": "swiglu",
    "position_embedding_type": "rotary",
    "use_bias": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "use_post_ln": False,
    "parallel_attn": False,
    "parallel_layernorm": False,
    "sliding_window_size": None,
}
WINDOWED_LAYER = {name: value for name, value in LLAMA_LAYER.items() if name != "sliding_window_size"}
NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
LLAMA_DEFAULTS = {**NO_DROPOUT, "tie_embed_logits": False}
FALCON_LAYER = {
    "use_rms_norm": False,
    "glu_activation": None,
    "activation": "gelu",
    "position_embedding_type": "rotary",
    "use_bias": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "use_post_ln": False,
    "parallel_attn": True,
    "sliding_window_size": None,
}

FAMILIES = {
    "llama": Family(LLAMA_LAYER, {**LLAMA_DEFAULTS, "layernorm_epsilon": 1e-6, "max_position_embeddings": 2048}),
    "llama2": Family(LLAMA_LAYER, {**LLAMA_DEFAULTS, "layernorm_epsilon": 1e-5, "max_position_embeddings": 4096}),
    "codellama": Family(
        LLAMA_LAYER,
        {**LLAMA_DEFAULTS, "layernorm_epsilon": 1e-5, "max_position_embeddings": 16384, "rope_theta": 1e6},
    ),
    "llama3": Family(
        LLAMA_LAYER,
        {**LLAMA_DEFAULTS, "layernorm_epsilon": 1e-5, "max_position_embeddings": 8192, "rope_theta": 5e5},
    ),
    "mistral": Family(
        WINDOWED_LAYER,
        {
            **LLAMA_DEFAULTS,
            "layernorm_epsilon": 1e-5,
            "max_position_embeddings": 32768,
            "sliding_window_size": 4096,
        },
    ),
    "qwen2": Family(
        {**LLAMA_LAYER, "add_qkv_bias": True},
        {**LLAMA_DEFAULTS, "layernorm_epsilon": 1e-6, "max_position_embeddings": 32768, "rope_theta": 1e6},
    ),
    "qwen3": Family(
        {**LLAMA_LAYER, "qk_layernorm": True},
        {**LLAMA_DEFAULTS, "layernorm_epsilon": 1e-6, "max_position_embeddings": 40960, "rope_theta": 1e6},
    ),
    "falcon": Family(FALCON_LAYER, {**NO_DROPOUT, "layernorm_epsilon": 1e-5, "max_position_embeddings": 2048}),
    "gpt": Family({}, {}),
}
"""`--model_name` -> preset. `gpt` is whatever the flags say."""
