"""Tiny random models of `transformers`, of every family and variant, in its own folders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tiny_llamas import SIZES
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

LLAMA = {**SIZES, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
FALCON = {name: LLAMA[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")} | {
    **{"initializer_range": 0.2, "bias": False, "parallel_attn": True, "alibi": False},
    **{"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64},
}
GROUPED = {"new_decoder_architecture": True, "num_kv_heads": 2}
GPT2 = {
    **{"vocab_size": 103, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2},
    **{"bos_token_id": 1, "eos_token_id": 2},
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama 3": ("llama", {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "llama 3.1": ("llama", {**LLAMA, "rope_parameters": LLAMA3}),
    "llama 3.2, tied": ("llama", {**LLAMA, "rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**LLAMA, "sliding_window": 5}),
    "mistral, window of one": ("mistral", {**LLAMA, "sliding_window": 1}),
    "mistral, no window": ("mistral", {**LLAMA, "sliding_window": None}),
    "qwen2": ("qwen2", LLAMA),
    "qwen2, tied": ("qwen2", {**LLAMA, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**LLAMA, "head_dim": 16}),
    "qwen3, tied, one key/value head": (
        "qwen3",
        {**LLAMA, "head_dim": 16, "tie_word_embeddings": True, "num_key_value_heads": 1},
    ),
    "falcon 7b": ("falcon", {**FALCON, "multi_query": True, "new_decoder_architecture": False}),
    "falcon, one key/value head each": ("falcon", {**FALCON, "multi_query": False, "new_decoder_architecture": False}),
    "falcon 40b": ("falcon", {**FALCON, **GROUPED}),
    "falcon 11b": ("falcon", {**FALCON, **GROUPED, "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 80}),
    "falcon, untied": ("falcon", {**FALCON, **GROUPED, "tie_word_embeddings": False}),
    "gpt2": ("gpt2", GPT2),
    "gpt2, exact gelu": ("gpt2", {**GPT2, "activation_function": "gelu", "n_inner": 40, "layer_norm_epsilon": 1e-3}),
    "gpt2, untied": ("gpt2", {**GPT2, "tie_word_embeddings": False}),
}
"""Variant -> `model_type` and configuration."""


def save_family(folder: Path, variant: str, **changes: Any) -> PreTrainedModel:
    """A model with random weights, norms and biases too, saved in `folder`; `changes` are of its configuration."""
    kind, settings = FAMILIES[variant]
    return save_random(folder, kind, {**settings, **changes}, seed=3)


def save_random(folder: Path, kind: str, settings: Mapping[str, Any], seed: int) -> PreTrainedModel:
    """A model of `model_type` `kind` with random weights, norms and biases too, saved as `transformers` does."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.3)
    model.save_pretrained(folder)
    return model
