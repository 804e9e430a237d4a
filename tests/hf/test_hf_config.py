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
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; only 'llama' is supported"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rotary scaling of type 'llama3'"),
        ({"hidden_size": None}, "hidden_size is missing"),
    ],
)
def test_what_is_not_computed_here_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_llama(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        open_checkpoint(tmp_path)
    assert "config.json" in str(error.value)


def test_missing_and_unknown_weights_are_named(tmp_path: Path) -> None:
    save_llama(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    norm = weights.pop("model.layers.1.input_layernorm.weight")
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks weights: model.layers.1.input_layernorm.weight"):
        open_checkpoint(tmp_path)
    save_file({**weights, "model.layers.1.q_norm.weight": norm}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"unknown weight model.layers.1.q_norm.weight"):
        open_checkpoint(tmp_path)
    weights["model.layers.1.input_layernorm.weight"] = norm
    save_file({**weights, "model.layers.2.input_layernorm.weight": norm.clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"has unknown weights: model.layers.2.input_layernorm.weight"):
        open_checkpoint(tmp_path)
