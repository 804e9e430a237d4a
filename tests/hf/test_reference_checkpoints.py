"""Megatron-LLM's own checkpoints are read, at any layout: every tensor of the model, its logits, its configuration."""

import re
import runpy
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from foreign_checkpoints import Bomb, PositionEmbeddingType, assert_same_model, tiny_model, write_reference

from megatron.checkpoint import open_checkpoint
from megatron.checkpoint.pickles import Inert, read_pickle
from megatron.config import resolve_run

LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2)]


@pytest.mark.parametrize(("tensor", "pipeline"), LAYOUTS)
@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("llama, grouped-query", "llama2"),
        ("llama, multi-head", "llama"),
        ("llama, tied", "llama2"),
        ("mistral", "mistral"),
        ("falcon 40b", "falcon"),
    ],
)
def test_the_model_is_the_same(tmp_path: Path, name: str, family: str, tensor: int, pipeline: int) -> None:
    theirs = tiny_model(name, tmp_path / "hf")
    write_reference(tmp_path / "reference", theirs, tensor, pipeline, iteration=20, model_name=family)
    assert_same_model(tmp_path / "reference", theirs, tmp_path / "hf", None)


@pytest.mark.parametrize("pipeline", [1, 2])
@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("llama, multi-query", "llama2"),
        ("falcon 7b", "falcon"),
        ("codellama", "codellama"),
        ("linear scaling", "llama2"),
    ],
)
def test_further_variants(tmp_path: Path, name: str, family: str, pipeline: int) -> None:
    theirs = tiny_model(name, tmp_path / "hf")
    write_reference(tmp_path / "reference", theirs, 1, pipeline, iteration=20)
    assert_same_model(tmp_path / "reference", theirs, tmp_path / "hf", family)


SPARSE = {
    "ffn_hidden_size": ...,
    "kv_channels": ...,
    "sliding_window_size": ...,
    "layernorm_epsilon": ...,
    "rope_theta": ...,
    "rope_scaling_factor": ...,
    "use_bias": ...,
    "use_post_ln": ...,
    "position_embedding_type": "rotary",
    "hidden_dropout": ...,
    "attention_dropout": ...,
}
"""Arguments that converted weights leave out."""


@pytest.mark.parametrize("name", ["llama, multi-head", "falcon 7b"])
def test_converted_weights(tmp_path: Path, name: str) -> None:
    """The older spelling, and few arguments."""
    theirs = tiny_model(name, tmp_path / "hf", **({} if "falcon" in name else {"rms_norm_eps": 1e-5}))
    changes = SPARSE if "falcon" not in name else {**SPARSE, "tie_embed_logits": ..., "use_rms_norm": ...}
    more = {"num_attention_heads_kv": ...} if "falcon" not in name else {"glu_activation": ...}
    write_reference(tmp_path / "reference", theirs, as_released=True, **changes, **more)
    assert_same_model(tmp_path / "reference", theirs, tmp_path / "hf", None)
    model = open_checkpoint(tmp_path / "reference").model
    assert model.model_name == ("falcon" if "falcon" in name else "llama2")
    assert (model.rope_theta, model.layernorm_epsilon) == (1e4, 1e-5)


def test_interleaved_stages(tmp_path: Path) -> None:
    theirs = tiny_model("llama, grouped-query", tmp_path / "hf")
    write_reference(tmp_path / "reference", theirs, 2, 2, iteration=20, chunks=2)
    assert_same_model(tmp_path / "reference", theirs, tmp_path / "hf", "llama2")


def test_beside_a_distributed_optimizer(tmp_path: Path) -> None:
    """Whose folders look like those of stages."""
    theirs = tiny_model("llama, grouped-query", tmp_path / "hf")
    folder = write_reference(tmp_path / "reference", theirs, 2, 1, iteration=20)
    for rank in range(2):
        (folder / f"mp_rank_{rank:02d}" / "model_optim_rng.pt").rename(folder / f"mp_rank_{rank:02d}" / "model_rng.pt")
        (folder / f"mp_rank_{rank:02d}_001").mkdir()
        (folder / f"mp_rank_{rank:02d}_001" / "optim.pt").write_bytes(b"")
    assert_same_model(tmp_path / "reference", theirs, tmp_path / "hf", "llama2")


def test_the_folder_and_what_is_known_of_it(tmp_path: Path) -> None:
    theirs = tiny_model("mistral", tmp_path / "hf")
    folder = write_reference(tmp_path / "reference", theirs, 2, 2, iteration=20, rope_theta=1e5, hidden_dropout=0.25)
    write_reference(tmp_path / "reference", theirs, iteration=30)
    (tmp_path / "reference" / "tokenizer.model").write_bytes(b"model")
    assert open_checkpoint(tmp_path / "reference").folder.name == "iter_0000030"
    for checkpoint in (open_checkpoint(tmp_path / "reference", 20), open_checkpoint(folder)):
        model = checkpoint.model
        assert (checkpoint.folder, checkpoint.iteration, model.model_name) == (folder, 0, "mistral")
        assert (model.rope_theta, model.sliding_window_size, model.hidden_dropout) == (1e5, 5, 0.25)
        assert (model.max_position_embeddings, model.tie_embed_logits) == (64, False)
        assert [file.name for file in checkpoint.tokenizer_files] == ["tokenizer.model"]
        options = checkpoint.stored_options()
        sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "seq_length")
        assert [options[name] for name in sizes] == [2, 2, 32]
        assert any("sliding_window_size 5 is taken as Hugging Face counts it" in note for note in checkpoint.warnings)
    with pytest.raises(ValueError, match="is not of iteration 30"):
        open_checkpoint(folder, 30)


def test_a_padded_vocabulary(tmp_path: Path) -> None:
    """Kept whole, unless a tool is told its true size."""
    theirs = tiny_model("llama, grouped-query", tmp_path / "hf", vocab_size=103)
    changes = {"make_vocab_size_divisible_by": 32, "padded_vocab_size": 128}
    write_reference(tmp_path / "reference", theirs, 4, 1, iteration=20, rows=128, **changes)
    checkpoint = open_checkpoint(tmp_path / "reference", family="llama2")
    assert checkpoint.vocab_size == 128
    assert any("all 128 rows of the vocabulary are kept" in note for note in checkpoint.warnings)
    for ours, hf in (("embedding", "model.embed_tokens"), ("lm_head", "lm_head")):
        weight = checkpoint.weights.read(f"{ours}.weight")
        assert torch.equal(weight[:103], theirs.state_dict()[f"{hf}.weight"])
        assert bool((weight[103:] == 7).all())


@pytest.mark.parametrize("pipeline", [1, 2])
def test_the_tools_take_it_in_and_bring_it_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pipeline: int
) -> None:
    """Padding is cut, the layout changed; and what is exported, from either, is what `transformers` wrote."""
    theirs = tiny_model("llama, grouped-query", tmp_path / "hf", vocab_size=103)
    write_reference(
        tmp_path / "reference", theirs, 4, pipeline, iteration=20, rows=128, make_vocab_size_divisible_by=32
    )
    folders = ["--load_dir", str(tmp_path / "reference"), "--save_dir", str(tmp_path / "cut")]
    sizes = ["--target_tensor_parallel_size", "2", "--target_pipeline_parallel_size", "2"]
    run_tool("checkpoint_util", *folders, *sizes, "--true_vocab_size", "103")
    assert "warning: all 128 rows of the vocabulary are kept" in capsys.readouterr().out
    assert_same_model(tmp_path / "cut", theirs, tmp_path / "hf", None)
    run_tool("hf_to_megatron", "llama2", "--model-path", str(tmp_path / "reference"), "--out", str(tmp_path / "whole"))
    run_tool("megatron_to_hf", "--input_dir", str(tmp_path / "cut"), "--output_dir", str(tmp_path / "again"))
    run_tool("megatron_to_hf", "--input_dir", str(tmp_path / "reference"), "--output_dir", str(tmp_path / "padded"))
    assert [open_checkpoint(tmp_path / name).vocab_size for name in ("whole", "again", "padded")] == [128, 103, 128]


def run_tool(name: str, *flags: str) -> None:
    """A script of tools/, as a user calls it."""
    runpy.run_path(str(Path(__file__).resolve().parents[2] / "tools" / f"{name}.py"))["main"](list(flags))


def test_a_run_takes_its_options(tmp_path: Path) -> None:
    write_reference(tmp_path / "reference", tiny_model("codellama", tmp_path / "hf"), 2, 1, iteration=20)
    typed = {"load": str(tmp_path / "reference"), "use_checkpoint_args": True, "data_type": "instruction", "lr": 1e-4}
    typed |= {"micro_batch_size": 1, "train_iters": 4, "tokenizer_type": "SentencePieceTokenizer"}
    config = resolve_run(typed, open_checkpoint(tmp_path / "reference").stored_options())
    assert (config.model.model_name, config.model.rope_theta, config.data.seq_length) == ("codellama", 1e6, 32)
    assert config.parallel.tensor_model_parallel_size == 2


def test_a_part_is_read_alone(tmp_path: Path) -> None:
    write_reference(tmp_path / "reference", tiny_model("llama, grouped-query", tmp_path / "hf"), 4, 2)
    weights = open_checkpoint(tmp_path / "reference").weights
    for name in ("layers.3.attention.q.weight", "layers.1.mlp.up.weight", "layers.2.mlp.down.weight"):
        part = (slice(5, 41), slice(3, 37))
        assert torch.equal(weights.read(name, part), weights.read(name)[part])


@pytest.mark.parametrize(
    ("changes", "family", "message"),
    [
        ({"num_layers": ...}, None, "mp_rank_00/model_optim_rng.pt: args has no num_layers"),
        ({"hidden_size": "64"}, None, "args.hidden_size is '64', not a positive whole number"),
        ({"use_rms_norm": 1}, None, "args.use_rms_norm is 1, neither True nor False"),
        ({"rope_theta": "big"}, None, "args.rope_theta is 'big', not a number"),
        ({"num_attention_heads": 4}, None, "layers.0.attention.query_key_value.weight is [128, 64], but by"),
        ({"num_layers": 5}, None, "the files lack weights: layers.4.attention.dense.weight"),
        ({"num_layers": 3}, None, "the files have unknown weights: layers.3.attention.dense.weight"),
        (
            {"padded_vocab_size": 128},
            None,
            "args.padded_vocab_size is 128, but embedding.word_embeddings.weight of all",
        ),
        ({"tie_embed_logits": True}, None, "args.tie_embed_logits is True, but there is an lm_head"),
        ({"use_rms_norm": False}, None, "args.use_rms_norm is False, but llama2 has True"),
        ({"position_embedding_type": ...}, None, "args.position_embedding_type is 'absolute', but llama2 has 'rotary'"),
        ({"parallel_attn": True}, "llama2", "args.parallel_attn is True, but llama2 has False"),
        ({"model_name": "llama"}, "llama2", "args.model_name is 'llama', not 'llama2'"),
        ({"model_name": "gpt"}, None, "a checkpoint of 'gpt'; supported are llama, llama2, codellama, falcon, mistral"),
        ({"openai_gelu": True}, None, "args.openai_gelu is True; only False is supported"),
        (
            {"tensor_model_parallel_size": 2},
            None,
            "args.tensor_model_parallel_size is 2, but beside it are the files of",
        ),
        (
            {"pipeline_model_parallel_size": 2},
            None,
            "args.pipeline_model_parallel_size is 2, but beside it are the fil",
        ),
    ],
)
def test_contradictions(tmp_path: Path, changes: dict[str, Any], family: str | None, message: str) -> None:
    write_reference(tmp_path / "reference", tiny_model("llama, grouped-query", tmp_path / "hf"), **changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        open_checkpoint(tmp_path / "reference", family=family)


def nested(value: Any, *keys: str) -> Callable[[dict[str, Any]], object]:
    """An edit that sets an entry of nested dictionaries; Ellipsis removes it."""

    def edit(content: dict[str, Any]) -> None:
        *path, last = keys
        for key in path:
            content = content[key]
        content[last] = value
        if value is ...:
            del content[last]

    return edit


ENCODER = ("model", "language_model", "encoder")


@pytest.mark.parametrize(
    ("tensor", "edit", "message"),
    [
        (1, nested(..., "args"), "mp_rank_00/model_optim_rng.pt has no args"),
        (1, nested({"num_layers": 4}, "args"), "mp_rank_00/model_optim_rng.pt has no args"),
        (1, nested(..., "checkpoint_version"), "mp_rank_00/model_optim_rng.pt: checkpoint_version is None; only 3.0"),
        (1, nested(2.0, "checkpoint_version"), "checkpoint_version is 2.0; only 3.0 and later"),
        (1, nested(..., "model"), "mp_rank_00/model_optim_rng.pt has no model"),
        (1, nested(..., "model", "language_model", "embedding"), "have no embedding.word_embeddings.weight"),
        (
            1,
            nested(None, *ENCODER, "layers.1.mlp.dense_4h_to_h.weight"),
            "layers.1.mlp.dense_4h_to_h.weight is no tensor",
        ),
        (
            1,
            nested(torch.ones(2), *ENCODER, "layers.0.norm.weight"),
            "optim_rng.pt: unknown weight layers.0.norm.weight",
        ),
        (
            2,
            nested(torch.ones(2), *ENCODER, "layers.0.norm.weight"),
            "mp_rank_00/model_optim_rng.pt has no layers.0.norm",
        ),
        (
            2,
            nested(torch.ones(3, 64), "model", "language_model", "lm_head"),
            "01/model_optim_rng.pt: lm_head.weight is [3",
        ),
    ],
)
def test_damaged_contents(tmp_path: Path, tensor: int, edit: Callable[[dict[str, Any]], object], message: str) -> None:
    write_reference(tmp_path / "reference", tiny_model("llama, grouped-query", tmp_path / "hf"), tensor, edit=edit)
    with pytest.raises(ValueError, match=re.escape(message)):
        open_checkpoint(tmp_path / "reference")


def test_a_tied_embedding_whose_copy_differs(tmp_path: Path) -> None:
    edit = nested({"weight": torch.ones(104, 64)}, "model", "word_embeddings_for_head")
    write_reference(tmp_path / "reference", tiny_model("llama, tied", tmp_path / "hf"), 1, 2, edit=edit)
    with pytest.raises(ValueError, match=r"word_embeddings_for_head\.weight of the last stage is not embedding\.word"):
        open_checkpoint(tmp_path / "reference")


def test_a_missing_or_truncated_file(tmp_path: Path) -> None:
    folder = write_reference(tmp_path / "reference", tiny_model("llama, grouped-query", tmp_path / "hf"), 2, 2)
    path = folder / "mp_rank_01_000" / "model_optim_rng.pt"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=re.escape(f"{path} cannot be read as a file of torch.save: ")):
        open_checkpoint(tmp_path / "reference")
    path.unlink()
    with pytest.raises(ValueError, match=re.escape(f"{path} is missing")):
        open_checkpoint(tmp_path / "reference")
    path.parent.rmdir()
    with pytest.raises(ValueError, match=re.escape(f"{path} is missing")):
        open_checkpoint(tmp_path / "reference")
    for missing in ("mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_001"):
        (folder / missing / "model_optim_rng.pt").unlink()
    with pytest.raises(ValueError, match=re.escape(f"{folder} has no mp_rank_00/model_optim_rng.pt")):
        open_checkpoint(tmp_path / "reference")


def test_members_of_enumerations_are_read_as_any_python_writes_them(tmp_path: Path) -> None:
    source = tiny_model("llama, grouped-query", tmp_path / "hf")
    by_name = patch.object(
        PositionEmbeddingType, "__reduce_ex__", lambda self, protocol: (getattr, (type(self), self.name))
    )
    with by_name:
        write_reference(tmp_path / "reference", source)
    assert open_checkpoint(tmp_path / "reference").model.position_embedding_type == "rotary"


@pytest.mark.parametrize("place", [("bomb",), (*ENCODER, "final_layernorm.weight")])
def test_a_bomb_does_not_go_off(tmp_path: Path, place: tuple[str, ...]) -> None:
    written = tmp_path / "written"
    edit = nested(Bomb(written), *place)
    write_reference(tmp_path / "reference", tiny_model("llama, grouped-query", tmp_path / "hf"), 2, edit=edit)
    with pytest.raises(
        ValueError, match=r"mp_rank_01/model_optim_rng\.pt holds foreign_checkpoints\.explode, which is"
    ):
        open_checkpoint(tmp_path / "reference")
    assert not written.exists()


def test_what_is_allowed_is_never_built(tmp_path: Path) -> None:
    """Not even what is named among what such files hold; a bomb among the arguments is refused like any other."""
    torch.save({"args": Namespace(a=1, path=Path("/data"))}, tmp_path / "harmless.pt")
    args = read_pickle(tmp_path / "harmless.pt")["args"]
    assert (type(args), args.state["a"], type(args.state["path"])) == (Inert, 1, Inert)
    torch.save({"args": Namespace(a=Bomb(tmp_path / "written"))}, tmp_path / "bomb.pt")
    with pytest.raises(ValueError, match=r"bomb\.pt holds foreign_checkpoints\.explode"):
        read_pickle(tmp_path / "bomb.pt")
    assert not (tmp_path / "written").exists()
