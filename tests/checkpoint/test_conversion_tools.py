"""The conversion tools, as a user calls them."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_llamas import VARIANTS, save_llama
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from megatron.checkpoint import open_checkpoint
from megatron.checkpoint.store import SlicedStore
from megatron.config import UsageError

ROOT = Path(__file__).resolve().parents[2]


def tool(name: str) -> Callable[[list[str]], None]:
    """The main function of a script in tools/."""
    main: Callable[[list[str]], None] = runpy.run_path(str(ROOT / "tools" / f"{name}.py"))["main"]
    return main


hf_to_megatron, checkpoint_util, megatron_to_hf = map(tool, ("hf_to_megatron", "checkpoint_util", "megatron_to_hf"))


def bring_in(source: Path, work: Path, *flags: str) -> Path:
    hf_to_megatron(["llama2", "--model-path", str(source), "--out", str(work / "weights"), *flags])
    return work / "weights"


def reshard(load: Path, save: Path, tensor: int, pipeline: int, *flags: str) -> Path:
    sizes = ["--target_tensor_parallel_size", str(tensor), "--target_pipeline_parallel_size", str(pipeline)]
    checkpoint_util(["--load_dir", str(load), "--save_dir", str(save), "--model_type", "llama2", *sizes, *flags])
    return save


def bring_out(load: Path, output: Path, *flags: str) -> Path:
    megatron_to_hf(["--input_dir", str(load), "--output_dir", str(output), *flags])
    return output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for file in sorted(folder.glob("*.safetensors")) for k, t in load_file(file).items()}


@pytest.mark.parametrize("changes", [VARIANTS["grouped-query"], VARIANTS["tied"], VARIANTS["linear scaling"]])
def test_around_the_whole_way_every_tensor_is_the_same(tmp_path: Path, changes: dict[str, Any]) -> None:
    save_llama(tmp_path / "hf", **changes)
    release = bring_in(tmp_path / "hf", tmp_path)
    sharded = reshard(release, tmp_path / "tp4", 4, 2)
    assert len(list((sharded / "release" / "model").iterdir())) == 8
    merged = reshard(sharded, tmp_path / "tp1", 1, 1)
    for source in (merged, sharded, release):
        output = bring_out(source, tmp_path / "out")
        expected, found = weights(tmp_path / "hf"), weights(output)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
        theirs, ours = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "hf", output))
        assert {key: ours[key] for key in theirs if key in ours and key != "use_cache"} == {
            key: theirs[key] for key in theirs if key in ours and key != "use_cache"
        }


CONFIG_KEYS = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "hidden_act", "rope_parameters"),
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "bos_token_id", "eos_token_id", "pad_token_id", "dtype"),
)


def test_a_real_model_still_tells_its_story(shared_data: Path, tmp_path: Path) -> None:
    source = shared_data / "models" / "stories260K"
    sharded = reshard(bring_in(source, tmp_path), tmp_path / "tp4", 4, 2)
    output = bring_out(reshard(sharded, tmp_path / "tp1", 1, 1), tmp_path / "hf")
    expected, found = weights(source), weights(output)
    assert found.keys() == expected.keys() - {"lm_head.weight"}
    assert all(torch.equal(expected[name], found[name]) for name in found)
    first, second = (AutoConfig.from_pretrained(folder).to_dict() for folder in (source, output))
    assert {key: second[key] for key in CONFIG_KEYS} == {key: first[key] for key in CONFIG_KEYS}
    assert (tmp_path / "weights" / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    options = GenerationConfig(max_new_tokens=40, do_sample=False)
    texts = []
    for folder in (source, output):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        ids = torch.tensor([[1, *tokenizer.encode("Once upon a time", add_special_tokens=False)]])
        texts.append(tokenizer.decode(model.generate(ids, generation_config=options)[0]))
    assert texts[0] == texts[1]
    assert "there was" in texts[0]


def test_precision_and_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_llama(tmp_path / "hf")
    release = bring_in(tmp_path / "hf", tmp_path)
    cast = reshard(release, tmp_path / "cast", 2, 1, "--bf16", "--true_vocab_size", "110")
    assert "vocabulary: 103 -> 110 rows (+7)" in capsys.readouterr().out
    found, old = open_checkpoint(cast), weights(tmp_path / "hf")["model.embed_tokens.weight"]
    assert found.vocab_size == 110
    assert found.weights.dtype("embedding.weight") == torch.bfloat16
    expected = torch.cat([old, old.mean(0, keepdim=True).expand(7, -1)]).bfloat16()
    assert torch.equal(found.weights.read("embedding.weight"), expected)
    cut = reshard(cast, tmp_path / "cut", 1, 1, "--true_vocab_size", "103")
    exported = weights(bring_out(cut, tmp_path / "out"))
    assert all(torch.equal(exported[n], t.bfloat16()) for n, t in weights(tmp_path / "hf").items())
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_several_output_files(tmp_path: Path) -> None:
    save_llama(tmp_path / "hf")
    output = bring_out(bring_in(tmp_path / "hf", tmp_path), tmp_path / "out", "--num_output_shards", "3")
    files = {path.name for path in output.glob("*.safetensors")}
    assert files == {f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)}
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == files
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights(output).values())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    found = AutoModelForCausalLM.from_pretrained(output).state_dict()
    assert all(torch.equal(theirs[name], found[name]) for name in theirs)


def test_an_export_that_computes_something_else_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_llama(tmp_path / "hf")
    release = bring_in(tmp_path / "hf", tmp_path)
    read = SlicedStore.read
    calls = iter(range(1000))
    monkeypatch.setattr(SlicedStore, "read", lambda *args: read(*args) * (1.0 if next(calls) else 1.1))
    with pytest.raises(ValueError, match="computes something else"):
        bring_out(release, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_earlier_export_stays_where_the_new_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_llama(tmp_path / "hf")
    release = bring_in(tmp_path / "hf", tmp_path)
    before = weights(bring_out(release, tmp_path / "out"))
    read = SlicedStore.read
    calls = iter(range(1000))
    with monkeypatch.context() as patch:
        patch.setattr(SlicedStore, "read", lambda *args: read(*args) * (1.0 if next(calls) else 1.1))
        with pytest.raises(ValueError, match="computes something else"):
            bring_out(release, tmp_path / "out")
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(tmp_path / "out").items())
    bring_out(release, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "weights", "out"}


def test_wrong_usage_is_named(tmp_path: Path) -> None:
    save_llama(tmp_path / "hf")
    release = bring_in(tmp_path / "hf", tmp_path)
    with pytest.raises(UsageError, match=r"--size 7: .* has 0.00 billion parameters"):
        bring_in(tmp_path / "hf", tmp_path / "b", "--size", "7")
    assert not (tmp_path / "b").exists()
    with pytest.raises(UsageError, match="--target_tensor_parallel_size 3 does not divide the 4 attention heads"):
        reshard(release, tmp_path / "tp3", 3, 1)
    assert not (tmp_path / "tp3").exists()
    with pytest.raises(UsageError, match="--out is --model-path"):
        hf_to_megatron(["llama2", "--model-path", str(tmp_path / "hf"), "--out", str(tmp_path / "hf")])
    with pytest.raises(UsageError, match="--save_dir is --load_dir"):
        reshard(release, release, 1, 1)
    with pytest.raises(UsageError, match="--output_dir is --input_dir"):
        bring_out(release, release)
    with pytest.raises(UsageError, match="--num_output_shards 0 is not positive"):
        bring_out(release, tmp_path / "out", "--num_output_shards", "0")
    assert not (tmp_path / "out").exists()


def test_a_name_that_the_hub_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="no such folder, and not to be had from the hub"):
        bring_in(Path("nobody/no-such-model"), tmp_path)
