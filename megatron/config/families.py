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
    "use_post_ln": False,
    "parallel_attn": False,
    "parallel_layernorm": False,
    "sliding_window_size": None,
}
LLAMA_DEFAULTS = {"attention_dropout": 0.0, "hidden_dropout": 0.0, "tie_embed_logits": False}

FAMILIES = {
    "llama": Family(LLAMA_LAYER, {**LLAMA_DEFAULTS, "layernorm_epsilon": 1e-6, "max_position_embeddings": 2048}),
    "llama2": Family(LLAMA_LAYER, {**LLAMA_DEFAULTS, "layernorm_epsilon": 1e-5, "max_position_embeddings": 4096}),
    "codellama": Family(
        LLAMA_LAYER,
        {**LLAMA_DEFAULTS, "layernorm_epsilon": 1e-5, "max_position_embeddings": 16384, "rope_theta": 1e6},
    ),
}
"""`--model_name` -> preset, of the families that are available."""
