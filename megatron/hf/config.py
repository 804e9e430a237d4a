"""Hugging Face's config.json and our architecture: a table of keys for each `model_type`, read in both directions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from megatron.config import FAMILIES, ModelConfig, UsageError
from megatron.hf.rotary import read_number, read_rotary, write_rotary

Settings = Mapping[str, Any]


def _nothing(*_: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class ModelType:
    """How config.json describes the models of a `model_type`.

    Attributes:
        architecture: its class in `transformers`.
        keys: their key -> our field.
        defaults: keys that files may leave out, as `transformers` fills them in.
        required: keys that they may not.
        fixed: keys that must have these values for a model to be what is computed here.
        read: (config.json, its path) -> our fields that are no plain renaming.
        write: the other way.
    """

    architecture: str
    keys: Mapping[str, str]
    defaults: Settings
    required: tuple[str, ...]
    fixed: Settings = field(default_factory=dict)
    read: Callable[[Settings, object], dict[str, Any]] = _nothing
    write: Callable[[ModelConfig], dict[str, Any]] = _nothing


COMMON_KEYS = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "max_position_embeddings": "max_position_embeddings",
    "tie_word_embeddings": "tie_embed_logits",
    "initializer_range": "init_method_std",
}
LLAMA_KEYS = {
    **COMMON_KEYS,
    "intermediate_size": "ffn_hidden_size",
    "num_key_value_heads": "num_attention_heads_kv",
    "head_dim": "kv_channels",
    "rms_norm_eps": "layernorm_epsilon",
}
LLAMA_DEFAULTS = {"tie_word_embeddings": False, "initializer_range": 0.02, "rms_norm_eps": 1e-6}
LLAMA_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
GROUPED_REQUIRED = (*LLAMA_REQUIRED, "num_key_value_heads", "max_position_embeddings")


def _read_mistral(config: Settings, source: object) -> dict[str, Any]:
    return {**read_rotary(config, source), "sliding_window_size": config.get("sliding_window", 4096)}


def _write_mistral(model: ModelConfig) -> dict[str, Any]:
    return {**write_rotary(model), "sliding_window": model.sliding_window_size}


def _read_falcon(config: Settings, source: object) -> dict[str, Any]:
    """Generations: the old one with one key/value head for all or one each, the new one with groups, and two norms."""
    heads, is_new = config["num_attention_heads"], config.get("new_decoder_architecture", False)
    old = 1 if config.get("multi_query", True) else heads
    norms = config.get("num_ln_in_parallel_attn")
    return {
        **read_rotary(config, source),
        "num_attention_heads_kv": (config.get("num_kv_heads") or heads) if is_new else old,
        "ffn_hidden_size": config.get("ffn_hidden_size") or 4 * config["hidden_size"],
        "parallel_layernorm": is_new and norms in (None, 2),
    }


def _write_falcon(model: ModelConfig) -> dict[str, Any]:
    groups, heads = model.num_attention_heads_kv, model.num_attention_heads
    if heads and model.kv_channels and model.kv_channels * heads != model.hidden_size:
        raise ValueError(f"Hugging Face's Falcon has no kv_channels {model.kv_channels}; it cannot be exported")
    is_new = model.parallel_layernorm or groups not in (1, heads)
    return {
        **write_rotary(model),
        "new_decoder_architecture": is_new,
        "multi_query": is_new or groups == 1,
        "num_kv_heads": groups if is_new else heads,
        "num_ln_in_parallel_attn": (2 if model.parallel_layernorm else 1) if is_new else None,
        "ffn_hidden_size": model.ffn_hidden_size,
    }


GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def _read_gpt2(config: Settings, source: object) -> dict[str, Any]:
    activation = config.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in GPT2_ACTIVATIONS:
        raise ValueError(
            f"{source}: activation_function is {activation!r}; only {', '.join(GPT2_ACTIVATIONS)} are supported"
        )
    return {
        "activation": GPT2_ACTIVATIONS[activation],
        "ffn_hidden_size": config.get("n_inner") or 4 * config["n_embd"],
        "use_rms_norm": False,
        "glu_activation": None,
        "position_embedding_type": "absolute",
        "use_bias": True,
    }


def _write_gpt2(model: ModelConfig) -> dict[str, Any]:
    assert model.num_attention_heads and model.kv_channels
    unlike = {
        "use_rms_norm": model.use_rms_norm,
        "glu_activation": model.glu_activation,
        "use_bias": not model.use_bias,
        "qk_layernorm": model.qk_layernorm,
        "use_post_ln": model.use_post_ln,
        "parallel_attn": model.parallel_attn,
        "sliding_window_size": model.sliding_window_size,
        "position_embedding_type": model.position_embedding_type != "absolute",
        "num_attention_heads_kv": model.num_attention_heads_kv != model.num_attention_heads,
        "kv_channels": model.kv_channels * model.num_attention_heads != model.hidden_size,
    }
    names = [f"{name} {getattr(model, name)}" for name, differs in unlike.items() if differs]
    if names:
        raise ValueError(f"Hugging Face's GPT-2 has no {', '.join(names)}; such a model cannot be exported")
    activation = next(theirs for theirs, ours in GPT2_ACTIVATIONS.items() if ours == model.activation)
    return {"activation_function": activation, "n_inner": model.ffn_hidden_size}


LLAMA = ModelType(
    architecture="LlamaForCausalLM",
    keys=LLAMA_KEYS,
    defaults={**LLAMA_DEFAULTS, "max_position_embeddings": 2048},
    required=LLAMA_REQUIRED,
    fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    read=read_rotary,
    write=write_rotary,
)
QWEN2 = replace(
    LLAMA,
    architecture="Qwen2ForCausalLM",
    defaults=LLAMA_DEFAULTS,
    required=GROUPED_REQUIRED,
    fixed={"hidden_act": "silu", "use_sliding_window": False},
)
MODEL_TYPES = {
    "llama": LLAMA,
    "mistral": replace(
        QWEN2,
        architecture="MistralForCausalLM",
        fixed={"hidden_act": "silu"},
        read=_read_mistral,
        write=_write_mistral,
    ),
    "qwen2": QWEN2,
    "qwen3": replace(
        QWEN2,
        architecture="Qwen3ForCausalLM",
        required=(*GROUPED_REQUIRED, "head_dim"),
        fixed={**QWEN2.fixed, "attention_bias": False},
    ),
    "falcon": ModelType(
        architecture="FalconForCausalLM",
        keys={**COMMON_KEYS, "layer_norm_epsilon": "layernorm_epsilon"},
        defaults={
            "tie_word_embeddings": True,
            "initializer_range": 0.02,
            "layer_norm_epsilon": 1e-5,
            "max_position_embeddings": 2048,
        },
        required=("hidden_size", "num_hidden_layers", "num_attention_heads"),
        fixed={"alibi": False, "bias": False, "parallel_attn": True, "activation": "gelu"},
        read=_read_falcon,
        write=_write_falcon,
    ),
    "gpt2": ModelType(
        architecture="GPT2LMHeadModel",
        keys={
            "n_embd": "hidden_size",
            "n_layer": "num_layers",
            "n_head": "num_attention_heads",
            "n_positions": "max_position_embeddings",
            "tie_word_embeddings": "tie_embed_logits",
            "initializer_range": "init_method_std",
            "layer_norm_epsilon": "layernorm_epsilon",
        },
        defaults={"tie_word_embeddings": True, "initializer_range": 0.02, "layer_norm_epsilon": 1e-5},
        required=("n_embd", "n_layer", "n_head", "n_positions"),
        fixed={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        read=_read_gpt2,
        write=_write_gpt2,
    ),
}
"""`model_type` -> how it is described."""
EXPORTED = {
    **dict.fromkeys(("llama", "llama2", "llama3", "codellama"), "llama"),
    **{name: name for name in ("mistral", "qwen2", "qwen3", "falcon")},
    "gpt": "gpt2",
}
"""`--model_name` -> `model_type`."""
COUNTS = {"num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_attention_heads_kv"} | {
    *("kv_channels", "max_position_embeddings", "sliding_window_size", "rope_original_max_position_embeddings")
}
"""Our fields that are positive whole numbers."""
FURTHER_COUNTS = ("vocab_size", "num_kv_heads", "n_inner", "ffn_hidden_size", "sliding_window")
"""Keys, not in tables, that are, too."""


def model_type(config: Settings, source: object) -> str:
    """The `model_type` of config.json.

    Raises:
        ValueError: it is not one of `MODEL_TYPES`.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        raise ValueError(f"{source}: model_type is {kind!r}; supported are {', '.join(MODEL_TYPES)}")
    return kind


def model_fields(config: Settings, source: object) -> dict[str, Any]:
    """Our architecture fields of the model that `config` describes; `source` is its file, for messages.

    Raises:
        ValueError: a key is missing, or says something this toolkit does not compute.
    """
    kind = model_type(config, source)
    described = MODEL_TYPES[kind]
    for key, value in described.fixed.items():
        if config.get(key) not in (None, value):
            raise ValueError(f"{source}: {key} is {config[key]!r}; only {value!r} is supported")
    missing = [key for key in described.required if config.get(key) is None]
    if missing:
        raise ValueError(f"{source}: {', '.join(missing)} is missing")
    _check_numbers(config, described, source)
    known = {**described.defaults, **{key: value for key, value in config.items() if value is not None}}
    fields = {ours: known[theirs] for theirs, ours in described.keys.items() if theirs in known}
    fields |= described.read(config, source)
    fields.setdefault("num_attention_heads_kv", fields["num_attention_heads"])
    fields.setdefault("kv_channels", fields["hidden_size"] // fields["num_attention_heads"])
    _check_windows(config, fields, source)
    family = _family(kind, fields)
    return {**FAMILIES[family].requires, "model_name": family, **fields}


def architecture(fields: Settings, source: object) -> ModelConfig:
    """The model of `fields`, which come from the file `source`.

    Raises:
        ValueError: they do not make a model.
    """
    try:
        return ModelConfig(**fields)
    except UsageError as error:
        raise ValueError(f"{source}: {error}") from error


def _check_windows(config: Settings, fields: Settings, source: object) -> None:
    """Every layer sees as much as the one window of the model says."""
    kind = "sliding_attention" if fields.get("sliding_window_size") else "full_attention"
    for found in config.get("layer_types") or ():
        if found != kind:
            raise ValueError(f"{source}: layer_types has {found!r}; only layers that are all {kind!r} are supported")


def _family(kind: str, fields: Settings) -> str:
    """The family of a model; Llama's generations differ in their defaults only, which the file gives."""
    if kind == "llama":
        return "llama3" if fields["rope_scaling_type"] == "llama3" else "llama2"
    return next(family for family, exported in EXPORTED.items() if exported == kind)


def _check_numbers(config: Settings, described: ModelType, source: object) -> None:
    counts = [theirs for theirs, ours in described.keys.items() if ours in COUNTS]
    for key in (*counts, *FURTHER_COUNTS):
        if config.get(key) is not None and (type(config[key]) is not int or config[key] < 1):
            raise ValueError(f"{source}: {key} is {config[key]!r}, not a positive whole number")
    for theirs, ours in described.keys.items():
        if ours in ("layernorm_epsilon", "init_method_std"):
            read_number(config, theirs, source)


def vocabulary_size(config: Settings, source: object) -> int:
    """Number of rows of the embedding."""
    if config.get("vocab_size") is None:
        raise ValueError(f"{source}: vocab_size is missing")
    return int(config["vocab_size"])


def hf_config(
    model: ModelConfig, vocab_size: int, dtype: torch.dtype, tokens: Mapping[str, int | None]
) -> dict[str, Any]:
    """config.json of a model, in the words of both transformers 4 and 5.

    `tokens` are `bos_token_id`, `eos_token_id` and `pad_token_id`.

    Raises:
        ValueError: the family's model there cannot be like this one.
    """
    kind = EXPORTED[model.model_name]
    described, name = MODEL_TYPES[kind], str(dtype).removeprefix("torch.")
    return {
        "architectures": [described.architecture],
        "model_type": kind,
        **described.fixed,
        **{theirs: getattr(model, ours) for theirs, ours in described.keys.items()},
        **described.write(model),
        "vocab_size": vocab_size,
        **tokens,
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": name,
        "dtype": name,
    }
