"""What an export may change of the tokenizer, and in how many files it writes the weights."""

import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_llamas import save_llama
from tiny_tokenizers import byte_level
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from megatron.checkpoint import open_checkpoint
from megatron.checkpoint.reshard import Layout, reshard
from megatron.config import TokenizerConfig, UsageError
from megatron.tokenizer import build_tokenizer

ROOT = Path(__file__).resolve().parents[2]
MARKERS = "<|im_start|>,<|im_end|>"


@pytest.fixture(params=["of Hugging Face", "own"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A Llama with a byte-level tokenizer of 281 tokens and room for three more, in two files."""
    save_llama(tmp_path / "hf", vocab_size=284, bos_token_id=None, eos_token_id=280)
    vocab_file = byte_level(tmp_path / "hf")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps(settings))
    if request.param == "own":
        build_tokenizer(
            TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=str(vocab_file), new_tokens=False)
        ).save(tmp_path / "hf")
    return reshard(open_checkpoint(tmp_path / "hf"), tmp_path / "weights", Layout(2, 1))


def export(checkpoint: Path, *flags: str) -> Path:
    main: Callable[[list[str]], None] = runpy.run_path(str(ROOT / "tools" / "megatron_to_hf.py"))["main"]
    output = checkpoint.parent.parent / "out"
    main(["--input_dir", str(checkpoint), "--output_dir", str(output), *flags])
    return output


def stored(folder: Path, file: str) -> Any:
    return json.loads((folder / file).read_text(encoding="utf-8"))


def test_tokens_are_added_and_named(checkpoint: Path) -> None:
    override = ["bos=<|im_start|>", "eos=<|im_end|>", "pad=<|endoftext|>", "sep=the"]
    plain = AutoTokenizer.from_pretrained(export(checkpoint))
    assert plain.eos_token == "<|endoftext|>"
    folder = export(checkpoint, "--vocab_extra_ids_list", MARKERS, "--override_special_tokens", *override)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.pad_token, tokenizer.sep_token) == ("<|endoftext|>", "the")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (281, 282, 280)
    ids = tokenizer.encode("sum<|im_end|>", add_special_tokens=False)
    assert ids == [*plain.encode("sum", add_special_tokens=False), 282]
    for settings in (AutoConfig.from_pretrained(folder), GenerationConfig.from_pretrained(folder)):
        assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (281, 282, 280)
    assert stored(folder, "special_tokens_map.json")["eos_token"] == "<|im_end|>"
    assert "sep_token_id" not in stored(folder, "config.json")


def test_generation_still_stops_at_the_end_of_the_turn(checkpoint: Path) -> None:
    folder = export(checkpoint, "--vocab_extra_ids_list", MARKERS, "--override_special_tokens", "eos=<|endoftext|>")
    assert stored(folder, "generation_config.json")["eos_token_id"] == [282, 280]
    assert stored(folder, "config.json")["eos_token_id"] == 280


def test_tokens_that_are_there_keep_their_ids(checkpoint: Path) -> None:
    folder = export(checkpoint, "--vocab_extra_ids_list", "<|endoftext|>,the")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 281
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == 280


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--override_special_tokens", "eos"],
            "--override_special_tokens eos is not NAME=TOKEN with a name of bos, eos",
        ),
        (["--override_special_tokens", "end=the"], "--override_special_tokens end=the is not NAME=TOKEN"),
        (
            ["--override_special_tokens", "eos=<|im_end|>"],
            "the tokenizer has no <|im_end|>; see --vocab_extra_ids_list",
        ),
        (["--vocab_extra_ids_list", "<a>,,<b>"], "--vocab_extra_ids_list <a>,,<b> has an empty token"),
        (["--vocab_extra_ids_list", "<a>,<b>,<c>,<d>"], "<d> would be id 284, but the model has 284 rows"),
    ],
)
def test_changes_that_do_not_fit(checkpoint: Path, flags: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        export(checkpoint, *flags)
    assert {path.name for path in checkpoint.parent.parent.iterdir()} <= {"hf", "weights", checkpoint.name}


def test_a_tokenizer_that_cannot_be_changed(tmp_path: Path) -> None:
    save_llama(tmp_path / "hf")
    folder = reshard(open_checkpoint(tmp_path / "hf"), tmp_path / "weights", Layout())
    with pytest.raises(UsageError, match=r"has no tokenizer\.json"):
        export(folder, "--override_special_tokens", "eos=the")
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "weights"}


@pytest.mark.parametrize("count", [1, 4, 20, 21])
def test_number_of_weight_files(checkpoint: Path, count: int) -> None:
    folder = export(checkpoint, "--num_output_shards", str(count))
    files = {path.name for path in folder.glob("*.safetensors")}
    assert len(files) == count
    if count > 1:
        index = stored(folder, "model.safetensors.index.json")
        assert set(index["weight_map"].values()) == files
        assert list(index["weight_map"].values()) == sorted(index["weight_map"].values())
    AutoModelForCausalLM.from_pretrained(folder)
