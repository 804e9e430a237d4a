"""Logits are those of `transformers`, for weights in every form that `--load` takes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llamas import LINEAR, VARIANTS, edit_config, filled_model, logits, save_llama
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from megatron.checkpoint import open_checkpoint


def assert_same_logits(folder: Path, theirs: LlamaForCausalLM) -> None:
    """Two documents packed by us equal each alone in `transformers`."""
    checkpoint = open_checkpoint(folder)
    documents = [torch.randint(checkpoint.vocab_size, (size,)) for size in (13, 20)]
    with torch.no_grad():
        expected = torch.cat([theirs(document[None]).logits[0] for document in documents])
    torch.testing.assert_close(logits(filled_model(checkpoint), *documents), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_variants(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert_same_logits(tmp_path, save_llama(tmp_path, **changes))


def test_a_real_model(shared_data: Path) -> None:
    folder = shared_data / "models" / "stories260K"
    assert_same_logits(folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())


def test_settings_where_transformers_4_wrote_them(tmp_path: Path) -> None:
    model = save_llama(tmp_path, rope_parameters={**LINEAR, "rope_theta": 5e5})
    edit_config(tmp_path, rope_parameters=None, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    assert_same_logits(tmp_path, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tied_model_with_a_copy_of_its_embedding(tmp_path: Path, dtype: torch.dtype) -> None:
    """A true copy only: with other values `transformers` 5 computes with it, 4 does not."""
    model = save_llama(tmp_path, tie_word_embeddings=True)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    embedding = weights["model.embed_tokens.weight"]
    embedding.copy_(embedding.bfloat16())
    model.load_state_dict(weights, strict=False)
    save_file({**weights, "lm_head.weight": embedding.to(dtype, copy=True)}, path, {"format": "pt"})
    assert_same_logits(tmp_path, model)
    save_file({**weights, "lm_head.weight": embedding.to(dtype) + 1}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"says tie_word_embeddings, but lm_head.weight is not model.embed_tokens"):
        open_checkpoint(tmp_path)


def test_several_files(tmp_path: Path) -> None:
    model = save_llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_logits(tmp_path, model)


@pytest.mark.parametrize("sharded", [False, True])
def test_bin_files(tmp_path: Path, sharded: bool) -> None:
    model = save_llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    weights = {**model.state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    halves = [dict(list(weights.items())[:9]), dict(list(weights.items())[9:])] if sharded else [weights]
    names = ["a.bin", "b.bin"] if sharded else ["pytorch_model.bin"]
    for name, part in zip(names, halves, strict=True):
        torch.save(part, tmp_path / name)
    if sharded:
        table = {key: name for name, part in zip(names, halves, strict=True) for key in part}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": table}))
    assert_same_logits(tmp_path, model)
