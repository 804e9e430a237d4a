"""config.json and our architecture: the same model on both sides, or a refusal that names the key."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llamas import SIZES, VARIANTS, edit_config, save_llama
from transformers import LlamaConfig

from megatron.checkpoint import open_checkpoint
from megatron.config import ModelConfig
from megatron.hf.config import hf_config, model_fields

COMPARED = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "vocab_size", "rope_parameters"),
    *("attention_bias", "mlp_bias", "hidden_act", "initializer_range"),
)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_there_and_back(changes: dict[str, Any]) -> None:
    theirs = LlamaConfig(**{**SIZES, **changes})
    model = ModelConfig(**model_fields(theirs.to_dict(), "config.json"))
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    again = LlamaConfig(**hf_config(model, SIZES["vocab_size"], torch.bfloat16, tokens))
    assert {key: getattr(again, key) for key in COMPARED} == {key: getattr(theirs, key) for key in COMPARED}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "opt"}, "model_type is 'opt'; supported are llama, mistral"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 8.0}}, "rotary scaling of type 'yarn'"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "scaling of type 'dynamic'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5 is not supported"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": None, "intermediate_size": None}, "intermediate_size, num_hidden_layers is missing"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, not a positive whole number"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers is 1.5, not a positive whole number"),
        ({"vocab_size": "103"}, "vocab_size is '103', not a positive whole number"),
        ({"head_dim": True}, "head_dim is True, not a positive whole number"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small', not a number"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', not an object"),
        ({"rope_parameters": {"rope_theta": "1e6"}}, "rope_theta is '1e6', not a number"),
        ({"rope_parameters": {"rope_type": "linear", "factor": [2]}}, "factor is [2], not a number"),
    ],
)
def test_what_is_not_computed_here_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_llama(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        open_checkpoint(tmp_path)
    assert "config.json" in str(error.value)


def test_the_number_of_key_value_heads_and_their_size_may_be_left_out(tmp_path: Path) -> None:
    save_llama(tmp_path, num_key_value_heads=4)
    edit_config(tmp_path, num_key_value_heads=None, head_dim=None)
    found = open_checkpoint(tmp_path).model
    assert (found.num_attention_heads_kv, found.kv_channels) == (4, 8)


def test_missing_and_unknown_weights_are_named(tmp_path: Path) -> None:
    save_llama(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    norm = weights.pop("model.layers.1.input_layernorm.weight")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks weights: model.layers.1.input_layernorm.weight"):
        open_checkpoint(tmp_path)
    weights["model.layers.1.input_layernorm.weight"] = norm
    save_file({**weights, "model.layers.1.q_norm.weight": norm.clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{tmp_path} has unknown weights: model.layers.1.q_norm.weight"):
        open_checkpoint(tmp_path)
    save_file({**weights, "model.layers.2.input_layernorm.weight": norm.clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"has unknown weights: model.layers.2.input_layernorm.weight"):
        open_checkpoint(tmp_path)
