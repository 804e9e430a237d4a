"""Hugging Face's config.json and our architecture: a table of keys, read in both directions."""

from collections.abc import Mapping
from typing import Any

import torch

from megatron.config import ModelConfig

KEYS = {
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_attention_heads_kv",
    "head_dim": "kv_channels",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "layernorm_epsilon",
    "tie_word_embeddings": "tie_embed_logits",
    "initializer_range": "init_method_std",
}
"""Their key -> our field."""
DEFAULTS = {
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
}
"""Keys that files may leave out, as `transformers.LlamaConfig` fills them in."""
REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
FIXED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}
"""Keys that must have these values for a model to be a Llama as it is computed here."""
COUNTS = (*REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings", "vocab_size")
"""Keys that are positive whole numbers."""
DEFAULT_THETA = 10000.0
ROTARY_PLACES = ("rope_scaling", "rope_parameters")
"""Where transformers 4 and 5 write rotary settings; the former has `rope_theta` beside it, the latter in it."""


def model_fields(config: Mapping[str, Any], source: object) -> dict[str, Any]:
    """Our architecture fields of the model that `config` describes; `source` is its file, for messages.

    Raises:
        ValueError: a key is missing, or says something this toolkit does not compute.
    """
    for key, value in FIXED.items():
        if config.get(key, value) != value or (key == "model_type" and key not in config):
            raise ValueError(f"{source}: {key} is {config.get(key)!r}; only {value!r} is supported")
    missing = [key for key in REQUIRED if config.get(key) is None]
    if missing:
        raise ValueError(f"{source}: {', '.join(missing)} is missing")
    for key in COUNTS:
        if config.get(key) is not None and (type(config[key]) is not int or config[key] < 1):
            raise ValueError(f"{source}: {key} is {config[key]!r}, not a positive whole number")
    for key in ("rms_norm_eps", "initializer_range"):
        _number(config, key, source)
    known = {**DEFAULTS, **{key: value for key, value in config.items() if value is not None}}
    fields = {ours: known[theirs] for theirs, ours in KEYS.items() if theirs in known}
    fields.setdefault("num_attention_heads_kv", fields["num_attention_heads"])
    fields.setdefault("kv_channels", fields["hidden_size"] // fields["num_attention_heads"])
    return {**fields, **_rotary(config, source)}


def vocabulary_size(config: Mapping[str, Any], source: object) -> int:
    """Number of rows of the embedding."""
    if config.get("vocab_size") is None:
        raise ValueError(f"{source}: vocab_size is missing")
    return int(config["vocab_size"])


def _rotary(config: Mapping[str, Any], source: object) -> dict[str, float]:
    """Rotary settings, from where transformers 4 or 5 writes them."""
    places = []
    for key in ROTARY_PLACES:
        if config.get(key):
            if not isinstance(config[key], Mapping):
                raise ValueError(f"{source}: {key} is {config[key]!r}, not an object")
            places.append(config[key])
    factors = {_scaling_factor(settings, source) for settings in places}
    thetas = {theta for place in (config, *places) if (theta := _number(place, "rope_theta", source)) is not None}
    if len(factors) > 1 or len(thetas) > 1:
        raise ValueError(f"{source}: rope_theta, {' and '.join(ROTARY_PLACES)} contradict each other")
    return {
        "rope_theta": thetas.pop() if thetas else DEFAULT_THETA,
        "rope_scaling_factor": factors.pop() if factors else 1.0,
    }


def _scaling_factor(settings: Mapping[str, Any], source: object) -> float:
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind not in ("default", "linear"):
        raise ValueError(f"{source}: rotary scaling of type {kind!r} is not supported; only 'default' and 'linear'")
    if settings.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{source}: partial_rotary_factor {settings['partial_rotary_factor']} is not supported")
    if kind == "default":
        return 1.0
    factor = _number(settings, "factor", source)
    if factor is None:
        raise ValueError(f"{source}: rotary scaling is 'linear', but its factor is missing")
    return factor


def _number(settings: Mapping[str, Any], key: str, source: object) -> float | None:
    """The number that a key has; None if it is left out or null."""
    value = settings.get(key)
    if value is None:
        return None
    if type(value) not in (int, float):
        raise ValueError(f"{source}: {key} is {value!r}, not a number")
    return float(value)


def hf_config(
    model: ModelConfig, vocab_size: int, dtype: torch.dtype, tokens: Mapping[str, int | None]
) -> dict[str, Any]:
    """config.json of a model, in the words of both transformers 4 and 5.

    `tokens` are `bos_token_id`, `eos_token_id` and `pad_token_id`.
    """
    is_linear = model.rope_scaling_factor != 1.0
    scaling = {"rope_type": "linear", "factor": model.rope_scaling_factor} if is_linear else None
    name = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["LlamaForCausalLM"],
        **FIXED,
        **{theirs: getattr(model, ours) for theirs, ours in KEYS.items()},
        "vocab_size": vocab_size,
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": model.rope_theta, **(scaling or {"rope_type": "default"})},
        **tokens,
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": name,
        "dtype": name,
    }
