"""Meta's `consolidated.NN.pth` are read as what they are: every tensor of the model, its logits, its configuration."""

import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_checkpoints import LLAMA_SIZES, Bomb, Edit, assert_same_model, in_pairs, tiny_model, unedited
from torch import Tensor
from transformers import PreTrainedModel

from megatron.checkpoint import open_checkpoint

MULTIPLE_OF = 32
LLAMA3 = {"llama3": True, "rope_theta": 5e5, "vocab_size": 104}


META_NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
}
COLUMNS = ("wo.weight", "w2.weight")


def write_meta(
    folder: Path, model: PreTrainedModel, files: int, *, llama3: bool = False, edit: Edit = unedited, **params: Any
) -> None:
    """`consolidated.NN.pth` and `params.json`; a None leaves a key of the latter out; `edit` is given the last file."""
    folder.mkdir(parents=True, exist_ok=True)
    config, whole = model.config, {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for heads, part in ((config.num_attention_heads, "q_proj"), (config.num_key_value_heads, "k_proj")):
            tensor = in_pairs(tensor, heads) if part in name else tensor
        for theirs, metas in META_NAMES.items():
            name = name.replace(theirs, metas)
        whole[name.removeprefix("model.")] = tensor
    for number in range(files):
        shard: dict[str, Tensor] = {"rope.freqs": torch.ones(4)}
        for name, tensor in whole.items():
            by_columns = name.endswith(COLUMNS) or (name.startswith("tok_embeddings") and not llama3)
            parts = tensor.chunk(files, 1 if by_columns else 0) if tensor.ndim == 2 else [tensor] * files
            shard[name] = parts[number].clone()
        if number == files - 1:
            edit(shard)
        torch.save(shard, folder / f"consolidated.{number:02d}.pth")
    known = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "norm_eps": config.rms_norm_eps,
        "multiple_of": MULTIPLE_OF,
        "vocab_size": -1,
    }
    described = {key: value for key, value in {**known, **params}.items() if value is not None}
    (folder / "params.json").write_text(json.dumps(described))


@pytest.mark.parametrize("files", [1, 2, 4])
@pytest.mark.parametrize(
    ("name", "family", "params"),
    [
        ("llama, grouped-query", "llama2", {}),
        ("llama, multi-head", "llama", {"n_kv_heads": None, "rope_theta": None}),
        ("llama, tied", "llama2", {}),
        ("codellama", "codellama", {"rope_theta": 1e6, "vocab_size": None}),
        ("llama 3", "llama3", LLAMA3),
        ("llama 3.1", "llama3", {**LLAMA3, "use_scaled_rope": True}),
    ],
)
def test_the_model_is_the_same(tmp_path: Path, name: str, family: str, params: dict[str, Any], files: int) -> None:
    theirs = tiny_model(name, tmp_path / "hf")
    write_meta(tmp_path / "meta", theirs, files, **params)
    assert_same_model(tmp_path / "meta", theirs, tmp_path / "hf", family)


def test_a_tied_model_with_a_copy_of_its_embedding(tmp_path: Path) -> None:
    """As Meta's Llama 3.2 comes."""

    def copy(shard: dict[str, Tensor]) -> None:
        shard["output.weight"] = shard["tok_embeddings.weight"].clone()

    theirs = tiny_model("llama, tied", tmp_path / "hf")
    write_meta(tmp_path / "meta", theirs, 1, edit=copy)
    assert_same_model(tmp_path / "meta", theirs, tmp_path / "hf", "llama2")


def test_a_number_far_from_the_others_is_a_missing_file(tmp_path: Path) -> None:
    write_meta(tmp_path / "meta", tiny_model("llama, tied", tmp_path / "hf"), 1)
    (tmp_path / "meta" / "consolidated.99999999999.pth").touch()
    with pytest.raises(ValueError, match=r"consolidated.01.pth is missing"):
        open_checkpoint(tmp_path / "meta", family="llama2")


def test_multi_query_and_a_stretched_feed_forward(tmp_path: Path) -> None:
    """170 x 1.3 = 221, in 32s 224."""
    theirs = tiny_model("llama, multi-query", tmp_path / "hf", intermediate_size=224)
    write_meta(tmp_path / "meta", theirs, 1, ffn_dim_multiplier=1.3)
    assert_same_model(tmp_path / "meta", theirs, tmp_path / "hf", "llama2")


@pytest.mark.parametrize(
    ("family", "params", "positions"),
    [
        ("llama", {}, 2048),
        ("llama2", {}, 4096),
        ("llama3", LLAMA3, 8192),
        ("llama3", {**LLAMA3, "use_scaled_rope": True}, 131072),
        ("codellama", {"rope_theta": 1e6}, 16384),
    ],
)
def test_the_family_gives_the_context(tmp_path: Path, family: str, params: dict[str, Any], positions: int) -> None:
    write_meta(tmp_path / "meta", tiny_model("llama, multi-head", tmp_path / "hf"), 2, **params)
    model = open_checkpoint(tmp_path / "meta", family=family).model
    assert (model.model_name, model.max_position_embeddings, model.layernorm_epsilon) == (family, positions, 1e-6)
    assert model.rope_theta == params.get("rope_theta", 1e4)
    assert (model.kv_channels, model.num_attention_heads_kv, model.ffn_hidden_size) == (8, 8, 192)


@pytest.mark.parametrize(
    ("params", "family"),
    [({}, "llama2"), ({"norm_eps": 1e-6}, "llama"), ({"rope_theta": 1e6}, "codellama"), (LLAMA3, "llama3")],
)
def test_a_family_that_nobody_names(tmp_path: Path, params: dict[str, Any], family: str) -> None:
    write_meta(tmp_path / "meta", tiny_model("llama, grouped-query", tmp_path / "hf"), 2, **params)
    checkpoint = open_checkpoint(tmp_path / "meta")
    assert checkpoint.model.model_name == family
    assert f"is taken for {family}, with max_position_embeddings" in checkpoint.warnings[0]


def test_a_factor_of_scaled_rope(tmp_path: Path) -> None:
    """Which params.json of Llama 3.2 leaves out."""
    theirs = tiny_model("llama 3.1", tmp_path / "hf")
    write_meta(tmp_path / "meta", theirs, 1, **LLAMA3, use_scaled_rope=True)
    checkpoint = open_checkpoint(tmp_path / "meta", family="llama3")
    assert checkpoint.model.rope_scaling_factor == 8
    assert "Llama 3.2, which has 32" in checkpoint.warnings[0]
    write_meta(tmp_path / "meta", theirs, 1, **LLAMA3, use_scaled_rope=True, rope_scaling_factor=32)
    checkpoint = open_checkpoint(tmp_path / "meta", family="llama3")
    assert (checkpoint.model.rope_scaling_factor, checkpoint.warnings) == (32, ())


def test_a_part_is_read_alone(tmp_path: Path) -> None:
    write_meta(tmp_path / "meta", tiny_model("llama, grouped-query", tmp_path / "hf"), 4)
    weights = open_checkpoint(tmp_path / "meta").weights
    for name in ("layers.1.attention.q.weight", "layers.2.mlp.down.weight", "embedding.weight"):
        part = (slice(5, 41), slice(3, 37))
        assert torch.equal(weights.read(name, part), weights.read(name)[part])


def test_a_tokenizer_beside_the_weights(tmp_path: Path) -> None:
    """Llama 3's file of that name is of another kind."""
    theirs = tiny_model("llama, grouped-query", tmp_path / "hf")
    for family, params, expected in (("llama2", {}, ["tokenizer.model"]), ("llama3", LLAMA3, [])):
        folder = tmp_path / family
        write_meta(folder, theirs, 1, **params)
        (folder / "tokenizer.model").write_bytes(b"model")
        files = open_checkpoint(folder, family=family).tokenizer_files
        assert [file.name for file in files] == expected


@pytest.mark.parametrize(
    ("params", "family", "message"),
    [
        ({"dim": None}, "llama2", "params.json: dim is missing"),
        ({"norm_eps": None, "multiple_of": None}, "llama2", "params.json: norm_eps, multiple_of is missing"),
        ({"rope_theta": 1e6}, "llama2", "params.json: rope_theta is 1e+06, but llama2 has 10000"),
        ({}, "codellama", "params.json: rope_theta is 10000, but codellama has 1e+06"),
        ({}, "llama3", "params.json: rope_theta is 10000, but llama3 has 500000"),
        ({"rope_theta": 3e4}, None, "params.json: rope_theta is 30000; no family of llama, llama2"),
        ({}, "falcon", "of llama, llama2, codellama, llama3, not of falcon"),
        (
            {"multiple_of": 64, "ffn_dim_multiplier": 1.3},
            "llama2",
            "a feed-forward size of 256, but layers.0.feed_forw",
        ),
        ({"n_heads": 4}, "llama2", "layers.0.attention.wk.weight is [32, 64], but by"),
        ({"n_layers": 5}, "llama2", "the files lack weights: layers.4.attention.wk.weight"),
        ({"n_layers": 3}, "llama2", "the files have unknown weights: layers.3.attention.wk.weight"),
        ({"vocab_size": 100}, "llama2", "vocab_size is 100, but tok_embeddings.weight has 104 rows"),
        ({"n_heads": "8"}, "llama2", "n_heads is '8', not a positive whole number"),
        ({"norm_eps": "small"}, "llama2", "norm_eps is 'small', not a number"),
        ({"moe": {"num_experts": 8}}, "llama2", "moe is {'num_experts': 8}, which is not supported"),
    ],
)
def test_contradictions(tmp_path: Path, params: dict[str, Any], family: str | None, message: str) -> None:
    write_meta(tmp_path / "meta", tiny_model("llama, grouped-query", tmp_path / "hf"), 2, **params)
    with pytest.raises(ValueError, match=re.escape(message)):
        open_checkpoint(tmp_path / "meta", family=family)


def add(name: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.update({name: value})


@pytest.mark.parametrize(
    ("files", "edit", "message"),
    [
        (
            1,
            add("layers.0.attention.wz.weight", torch.ones(2, 2)),
            "consolidated.00.pth: unknown weight layers.0.atten",
        ),
        (2, add("extra.weight", torch.ones(2)), "consolidated.00.pth has no extra.weight, which"),
        (2, add("norm.weight", "text"), "consolidated.01.pth: norm.weight is no tensor"),
        (
            2,
            add("output.weight", torch.ones(3, 64)),
            "consolidated.01.pth: output.weight is [3, 64] torch.float32, but",
        ),
        (2, lambda content: content.pop("norm.weight"), "consolidated.01.pth has no norm.weight, which"),
    ],
)
def test_files_that_are_not_alike(
    tmp_path: Path, files: int, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    write_meta(tmp_path / "meta", tiny_model("llama, grouped-query", tmp_path / "hf"), files, edit=edit)
    with pytest.raises(ValueError, match=re.escape(message)):
        open_checkpoint(tmp_path / "meta", family="llama2")


def test_a_missing_or_truncated_file(tmp_path: Path) -> None:
    folder = tmp_path / "meta"
    write_meta(folder, tiny_model("llama, grouped-query", tmp_path / "hf"), 4)
    path = folder / "consolidated.03.pth"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=re.escape(f"{path} cannot be read as a file of torch.save: ")):
        open_checkpoint(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"is a consolidated\.NN\.pth missing\?"):
        open_checkpoint(folder)
    path.write_bytes(data)
    (folder / "consolidated.01.pth").unlink()
    with pytest.raises(ValueError, match=re.escape("consolidated.01.pth is missing")):
        open_checkpoint(folder)
    (folder / "params.json").unlink()
    with pytest.raises(ValueError, match=re.escape("params.json cannot be read")):
        open_checkpoint(folder)


def test_a_bomb_does_not_go_off(tmp_path: Path) -> None:
    written = tmp_path / "written"
    edit = add("norm.weight", Bomb(written))
    write_meta(tmp_path / "meta", tiny_model("llama, grouped-query", tmp_path / "hf"), 2, edit=edit)
    with pytest.raises(ValueError, match=r"consolidated\.01\.pth holds foreign_checkpoints\.explode, which is neither"):
        open_checkpoint(tmp_path / "meta")
    assert not written.exists()


def test_the_formula_of_the_sizes_above() -> None:
    assert LLAMA_SIZES["intermediate_size"] == -(-int(8 * LLAMA_SIZES["hidden_size"] / 3) // MULTIPLE_OF) * MULTIPLE_OF


@pytest.mark.parametrize("family", ["llama", "llama2"])
def test_the_tool_takes_the_family_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str) -> None:
    theirs = tiny_model("llama, multi-head", tmp_path / "hf")
    write_meta(tmp_path / "meta", theirs, 2)
    tool = runpy.run_path(str(Path(__file__).resolve().parents[2] / "tools" / "hf_to_megatron.py"))["main"]
    tool([family, "--model-path", str(tmp_path / "meta"), "--out", str(tmp_path / "weights")])
    assert "warning" not in capsys.readouterr().out
    checkpoint = open_checkpoint(tmp_path / "weights")
    assert checkpoint.model.model_name == family
    assert checkpoint.model.max_position_embeddings == {"llama": 2048, "llama2": 4096}[family]
    assert_same_model(tmp_path / "weights", theirs, tmp_path / "hf", None)
