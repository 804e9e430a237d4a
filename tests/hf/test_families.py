"""Every family is what `transformers` makes of it: the same logits, and the same files after the way there and back."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, LLAMA3, save_family
from tiny_llamas import edit_config, filled_model, logits
from transformers import AutoConfig, AutoModelForCausalLM

from megatron.checkpoint import open_checkpoint
from megatron.checkpoint.export import export, logits_difference, publish
from megatron.config import ModelConfig

IGNORED = {"_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache"}
"""Keys of config.json that say nothing of the model."""


@pytest.mark.parametrize("variant", FAMILIES)
def test_same_logits(tmp_path: Path, variant: str) -> None:
    """Two documents packed by us equal each alone in `transformers`."""
    theirs = save_family(tmp_path, variant)
    checkpoint = open_checkpoint(tmp_path)
    documents = [torch.randint(checkpoint.vocab_size, (size,)) for size in (13, 20)]
    with torch.no_grad():
        expected = torch.cat([theirs(document[None]).logits[0] for document in documents])
    torch.testing.assert_close(logits(filled_model(checkpoint), *documents), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", FAMILIES)
def test_there_and_back(tmp_path: Path, variant: str) -> None:
    theirs = save_family(tmp_path / "hf", variant)
    checkpoint = open_checkpoint(tmp_path / "hf")
    folder = export(checkpoint, tmp_path / "again")
    assert logits_difference(checkpoint, folder) < 1e-5
    publish(folder, tmp_path / "again")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    config = AutoConfig.from_pretrained(tmp_path / "again")
    known = {key: value for key, value in theirs.config.to_dict().items() if key not in IGNORED}
    again = config.to_dict()
    assert {key: again[key] for key in known if key in KEYS} == {key: known[key] for key in known if key in KEYS}
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "again")) is type(theirs)


KEYS = {
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "vocab_size", "rope_parameters"),
    *("attention_bias", "mlp_bias", "hidden_act", "initializer_range", "sliding_window", "use_sliding_window"),
    *("layer_types", "multi_query", "new_decoder_architecture", "num_kv_heads", "parallel_attn", "alibi", "bias"),
    *("ffn_hidden_size", "layer_norm_epsilon", "activation", "n_embd", "n_layer", "n_head", "n_positions"),
    *("activation_function", "model_type", "scale_attn_weights"),
}
"""Keys that matter."""


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True; only False"),
        ("mistral", {"num_key_value_heads": None}, "num_key_value_heads is missing"),
        ("qwen3", {"attention_bias": True}, "attention_bias is True"),
        ("falcon 7b", {"alibi": True}, "alibi is True"),
        ("falcon 7b", {"parallel_attn": False}, "parallel_attn is False"),
        ("gpt2", {"activation_function": "relu"}, "activation_function is 'relu'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("llama 3.1", {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "its low_freq_factor is missing"),
        ("falcon 40b", {"num_kv_heads": 0}, "num_kv_heads is 0, not a positive whole number"),
        ("falcon 40b", {"num_kv_heads": 1}, "self_attention.query_key_value.weight is [64, 32], but by config.json"),
        ("falcon 40b", {"num_ln_in_parallel_attn": 1}, "lacks weights: transformer.h.0.input_layernorm"),
        ("gpt2", {"model_type": "opt"}, "model_type is 'opt'; supported are llama, mistral"),
        ("gpt2", {"model_type": ["gpt2"]}, "model_type is ['gpt2']"),
        ("gpt2", {"n_layer": 3000}, "config.json: 3000 layers, but 28 weights"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types has 'full_attention'"),
        ("llama", {"rms_norm_eps": 0.0}, "config.json: --layernorm_epsilon 0.0 is not positive"),
        ("llama 3.1", {"rope_parameters": {**LLAMA3, "factor": float("inf")}}, "factor is inf, not a number"),
    ],
)
def test_what_is_not_computed_here_is_refused(
    tmp_path: Path, variant: str, changes: dict[str, Any], message: str
) -> None:
    save_family(tmp_path, variant)
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        open_checkpoint(tmp_path)


def test_names_without_prefix_and_buffers_of_old_files(tmp_path: Path) -> None:
    """As the GPT-2 of the hub has them."""
    theirs = save_family(tmp_path, "gpt2")
    weights = {name.removeprefix("transformer."): tensor for name, tensor in theirs.state_dict().items()}
    weights |= {f"h.{n}.attn.bias": torch.ones(1, 1, 64, 64) for n in range(2)}
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path)
    document = torch.arange(9)
    with torch.no_grad():
        expected = theirs(document[None]).logits[0]
    torch.testing.assert_close(logits(filled_model(checkpoint), document), expected, rtol=1e-5, atol=1e-5)


def test_tensors_that_are_no_weights(tmp_path: Path) -> None:
    """Buffers of other types are passed over, weights of other types are named."""
    save_family(tmp_path, "gpt2")
    weights = load_file(tmp_path / "model.safetensors")
    buffers = {f"transformer.h.{n}.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool) for n in range(2)}
    save_file({**weights, **buffers}, tmp_path / "model.safetensors", {"format": "pt"})
    assert len(open_checkpoint(tmp_path).weights.names()) == 36
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"].to(torch.float8_e4m3fn)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"wte.weight is of torch.float8_e4m3fn; only"):
        open_checkpoint(tmp_path)


def test_a_falcon_with_heads_of_another_size_is_not_exported(tmp_path: Path) -> None:
    save_family(tmp_path, "falcon 7b")
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.run["config"]["model"] |= {"kv_channels": 16}
    with pytest.raises(ValueError, match="Falcon has no kv_channels 16"):
        export(checkpoint, tmp_path / "out")


def test_a_part_of_a_fused_tensor_is_read_alone(tmp_path: Path) -> None:
    save_family(tmp_path, "falcon 40b")
    weights = open_checkpoint(tmp_path).weights
    whole = weights.read("layers.1.attention.q.weight")
    part = (slice(5, 21), slice(3, 7))
    assert torch.equal(weights.read("layers.1.attention.q.weight", part), whole[part])
    assert weights.read("layers.1.attention.k.weight", (slice(4, 4), slice(3, 7))).shape == (0, 4)


def test_a_gpt_that_is_no_gpt2_is_not_exported(tmp_path: Path) -> None:
    save_family(tmp_path, "gpt2")
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.run["config"]["model"] |= {"position_embedding_type": "rotary", "use_rms_norm": True}
    assert isinstance(checkpoint.model, ModelConfig)
    with pytest.raises(ValueError, match="has no use_rms_norm True, position_embedding_type rotary"):
        export(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gpt2"
