"""Any layout in, any layout out, bit for bit; and what `tools/checkpoint_util.py` says to its user."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from tiny_checkpoints import CONFIG, VOCAB_SIZE, contents, flip, random_state, same, save, weight_files

from megatron.checkpoint import open_checkpoint
from megatron.checkpoint.reshard import Layout, reshard
from megatron.config import run_entry
from megatron.hf.rows import to_hf
from megatron.parallel.plan import stage_of, tensor_ranges

ROOT = Path(__file__).resolve().parents[2]
STATE = random_state()
LAYOUTS = [Layout(1, 1), Layout(2, 1), Layout(4, 1), Layout(1, 2), Layout(1, 3), Layout(2, 3), Layout(4, 2)]


def checkpoint_util(*argv: object) -> int:
    """Exit code of `tools/checkpoint_util.py` in this process."""
    spec = importlib.util.spec_from_file_location("checkpoint_util", ROOT / "tools" / "checkpoint_util.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return run_entry(module.main, [str(word) for word in argv])


def sizes(tensor: int, pipeline: int = 1) -> list[object]:
    return ["--target_tensor_parallel_size", tensor, "--target_pipeline_parallel_size", pipeline]


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A checkpoint of three ranks, as training leaves it."""
    save(tmp_path / "trained", 100, STATE, ranks=3)
    return tmp_path / "trained"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_there_and_back_is_the_same_bits(tmp_path: Path, trained: Path, layout: Layout) -> None:
    """Two key/value heads over four ranks included."""
    reshard(open_checkpoint(trained), tmp_path / "cut", layout)
    cut = open_checkpoint(tmp_path / "cut")
    assert same(contents(cut.weights), STATE)
    assert (cut.iteration, cut.vocab_size, cut.model) == (100, VOCAB_SIZE, CONFIG.model)
    stored = cut.stored_options()
    assert stored["tensor_model_parallel_size"] == layout.tensor
    assert stored["pipeline_model_parallel_size"] == layout.pipeline
    reshard(cut, tmp_path / "merged", Layout())
    (file,) = weight_files(open_checkpoint(tmp_path / "merged").folder)
    assert same(load_file(file), {to_hf(name): tensor for name, tensor in STATE.items()})


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_each_file_holds_what_the_plan_gives_its_rank(tmp_path: Path, trained: Path, layout: Layout) -> None:
    folder = reshard(open_checkpoint(trained), tmp_path / "cut", layout)
    names = {f"model-tp{t:02d}-pp{p:02d}.safetensors" for t in range(layout.tensor) for p in range(layout.pipeline)}
    assert {file.name for file in weight_files(folder)} == names
    for file in weight_files(folder):
        tensor, stage = int(file.name[8:10]), int(file.name[13:15])
        held = load_file(file)
        for name, whole in STATE.items():
            if to_hf(name) in held:
                assert stage_of(name, 3, layout.pipeline) == stage
                part = tensor_ranges(name, tuple(whole.shape), CONFIG.model, layout.tensor, tensor)
                assert torch.equal(held[to_hf(name)], whole[part])


def test_torch_reads_every_layout(tmp_path: Path, trained: Path) -> None:
    folder = reshard(open_checkpoint(trained), tmp_path / "cut", Layout(4, 2))
    theirs = {to_hf(name): torch.zeros_like(tensor) for name, tensor in STATE.items()}
    dcp.load(theirs, storage_reader=dcp.HuggingFaceStorageReader(str(folder / "model")))
    assert same(theirs, {to_hf(name): tensor for name, tensor in STATE.items()})


def test_more_ranks_than_rows_of_the_vocabulary(tmp_path: Path, trained: Path) -> None:
    folder = reshard(open_checkpoint(trained), tmp_path / "cut", Layout(4), vocab_size=5)
    assert all(len(tensor) for file in weight_files(folder) for tensor in load_file(file).values())
    weights = open_checkpoint(tmp_path / "cut").weights
    assert torch.equal(weights.read("lm_head.weight"), STATE["lm_head.weight"][:5])


@pytest.mark.parametrize("tensor", [1, 4])
def test_new_rows_are_the_mean_of_the_old(tmp_path: Path, trained: Path, tensor: int) -> None:
    reshard(open_checkpoint(trained), tmp_path / "cut", Layout(tensor), vocab_size=50, dtype=torch.bfloat16)
    cut = open_checkpoint(tmp_path / "cut")
    assert cut.vocab_size == cut.run["vocab_size"] == 50
    for name, old in STATE.items():
        new = cut.weights.read(name)
        assert torch.equal(new[: len(old)], old.to(torch.bfloat16))
        if name in ("embedding.weight", "lm_head.weight"):
            mean = old.mean(0).to(torch.bfloat16).expand(50 - VOCAB_SIZE, -1)
            assert torch.equal(new[VOCAB_SIZE:], mean)
        else:
            assert new.shape == old.shape


def test_tool_says_what_it_did(tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (trained / "tokenizer.model").write_bytes(b"pieces")
    options: list[Any] = ["--true_vocab_size", 40, "--bf16", "--model_type", "llama"]
    assert checkpoint_util("--load_dir", trained, "--save_dir", tmp_path / "cut", *sizes(2, 3), *options) == 0
    output = capsys.readouterr().out
    assert "vocabulary: 37 -> 40 rows (+3)" in output
    assert "note: --bf16 leaves the optimizer state out" in output
    assert "note: the checkpoint is of llama2; --model_type llama is ignored" in output
    assert (tmp_path / "cut" / "tokenizer.model").read_bytes() == b"pieces"
    cut = open_checkpoint(tmp_path / "cut")
    assert cut.model.model_name == "llama2"
    assert {cut.weights.dtype(name) for name in cut.weights.names()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (sizes(3), "--target_tensor_parallel_size 3 does not divide the 4 attention heads"),
        (sizes(1, 4), "--target_pipeline_parallel_size 4 is more than the 3 layers"),
        (sizes(0), "--target_tensor_parallel_size 0 is not positive"),
        (sizes(1, 0), "--target_pipeline_parallel_size 0 is not positive"),
        (["--true_vocab_size", 0], "--true_vocab_size 0 is not positive"),
        (["--model_type", "bert"], "--model_type"),
    ],
)
def test_wrong_usage_writes_nothing(
    tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str], flags: list[object], message: str
) -> None:
    assert checkpoint_util("--load_dir", trained, "--save_dir", tmp_path / "cut", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "cut").exists()


@pytest.mark.parametrize("load", ["trained", "trained/iter_0000100", "trained/../trained"])
def test_the_source_is_never_overwritten(tmp_path: Path, trained: Path, load: str) -> None:
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    assert checkpoint_util("--load_dir", tmp_path / load, "--save_dir", trained, *sizes(2)) == 2
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


def test_damage_is_not_made_to_look_whole(tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = next(weight_files(trained / "iter_0000100"))
    flip(damaged)
    assert checkpoint_util("--load_dir", trained, "--save_dir", tmp_path / "cut") == 1
    assert f"{damaged} was changed" in capsys.readouterr().err
    assert not (tmp_path / "cut").exists()


def test_a_chosen_iteration_keeps_its_number(tmp_path: Path, trained: Path) -> None:
    other = random_state(5)
    save(trained, 200, other)
    assert checkpoint_util("--load_dir", trained, "--save_dir", tmp_path / "cut", "--load_iters", 100) == 0
    assert (tmp_path / "cut" / "latest_checkpointed_iteration.txt").read_text() == "100\n"
    assert same(contents(open_checkpoint(tmp_path / "cut").weights), STATE)


def hugging_face(folder: Path, kind: str, shared_data: Path) -> Path:
    """A copy of the small real model, its weights in files of some kind."""
    source = shared_data / "models" / "stories260K"
    tensors = load_file(source / "model.safetensors")
    folder.mkdir()
    for file in source.glob("*.json"):
        shutil.copyfile(file, folder / file.name)
    shutil.copyfile(source / "tokenizer.model", folder / "tokenizer.model")
    if kind == "safetensors":
        shutil.copyfile(source / "model.safetensors", folder / "model.safetensors")
    elif kind == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        weight_map = {name: f"pytorch_model-{n % 2}.bin" for n, name in enumerate(tensors)}
        for file_name in set(weight_map.values()):
            torch.save({n: t for n, t in tensors.items() if weight_map[n] == file_name}, folder / file_name)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "bin", "indexed bin"])
def test_a_hugging_face_folder_of_any_kind(tmp_path: Path, shared_data: Path, kind: str) -> None:
    source = hugging_face(tmp_path / "hf", kind, shared_data)
    expected = load_file(shared_data / "models" / "stories260K" / "model.safetensors")
    with pytest.raises(ValueError, match="is of iteration 0, not 7"):
        open_checkpoint(source, 7)
    checkpoint = open_checkpoint(source)
    assert (checkpoint.iteration, checkpoint.vocab_size, checkpoint.is_hugging_face) == (0, 512, True)
    assert checkpoint.model.num_attention_heads_kv == 4
    assert {to_hf(n): t for n, t in contents(checkpoint.weights).items()}.keys() <= expected.keys()
    flags = ["--model_type", "llama", *sizes(4, 2)]
    assert checkpoint_util("--load_dir", source, "--save_dir", tmp_path / "cut", *flags) == 0
    assert (tmp_path / "cut" / "latest_checkpointed_iteration.txt").read_text() == "release\n"
    cut = open_checkpoint(tmp_path / "cut")
    assert cut.model.model_name == "llama"
    assert cut.tokenizer_folder and (cut.tokenizer_folder / "tokenizer.model").is_file()
    for name, tensor in contents(cut.weights).items():
        assert torch.equal(tensor, expected[to_hf(name)])


def test_an_index_with_a_missing_or_foreign_file(tmp_path: Path, shared_data: Path) -> None:
    source = hugging_face(tmp_path / "hf", "indexed bin", shared_data)
    (source / "pytorch_model-1.bin").unlink()
    with pytest.raises(ValueError, match=r"index\.json names pytorch_model-1\.bin, which is missing"):
        open_checkpoint(source)
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"x": "../secret.bin"}}))
    with pytest.raises(ValueError, match="not a file of that folder"):
        open_checkpoint(source)


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": []}, {"weight_map": {"x": 5}}, {"weight_map": {"x": ["pytorch_model-0.bin"]}}]
)
def test_an_index_without_its_table(tmp_path: Path, shared_data: Path, index: dict[str, Any]) -> None:
    source = hugging_face(tmp_path / "hf", "indexed bin", shared_data)
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin\.index\.json has no weight_map from names of weights"):
        open_checkpoint(source)


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("tool", [False, True], ids=["opened", "converted"])
def test_a_malicious_pickle_in_a_model_is_not_run(tmp_path: Path, shared_data: Path, tool: bool) -> None:
    source = hugging_face(tmp_path / "hf", "bin", shared_data)
    weights = torch.load(source / "pytorch_model.bin", weights_only=True)
    torch.save({**weights, "model.norm.weight": Bomb(tmp_path / "exploded")}, source / "pytorch_model.bin")
    if tool:
        assert checkpoint_util("--load_dir", source, "--save_dir", tmp_path / "cut") == 1
        assert not (tmp_path / "cut").exists()
    else:
        with pytest.raises(ValueError, match=r"pytorch_model\.bin: not a file of plain tensors"):
            open_checkpoint(source)
    assert not (tmp_path / "exploded").exists()


def test_a_folder_that_lacks_weights(tmp_path: Path, shared_data: Path) -> None:
    source = hugging_face(tmp_path / "hf", "bin", shared_data)
    tensors = torch.load(source / "pytorch_model.bin", weights_only=True)
    del tensors["model.layers.3.mlp.up_proj.weight"]
    torch.save(tensors, source / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"lacks weights: model\.layers\.3\.mlp\.up_proj\.weight"):
        open_checkpoint(source)
