"""An export takes nobody else's place, is never half there, and is not made of damaged weights."""

import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_families import save_family
from tiny_llamas import edit_config, save_llama
from transformers import GenerationConfig

from megatron.checkpoint import open_checkpoint
from megatron.checkpoint.export import export, logits_difference, publish
from megatron.checkpoint.reshard import Layout, reshard
from megatron.config import UsageError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A converted checkpoint: the folder that has the tracker."""
    save_llama(tmp_path / "hf")
    reshard(open_checkpoint(tmp_path / "hf"), tmp_path / "weights", Layout())
    return tmp_path / "weights"


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("output", [".", "release", ".."])
def test_the_checkpoint_that_is_read_is_never_replaced(release: Path, output: str) -> None:
    before = files_below(release.parent)
    with pytest.raises(UsageError, match="holds the checkpoint that is read"):
        export(open_checkpoint(release), release / output)
    assert files_below(release.parent) == before


def test_other_files_are_never_replaced(release: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for output in (tmp_path / "mine", tmp_path / "mine" / "notes.txt"):
        with pytest.raises(UsageError, match="is no earlier export"):
            export(open_checkpoint(release), output)
    assert files_below(tmp_path / "mine") == {"notes.txt": b"mine"}


def test_an_earlier_export_and_an_empty_folder_are(release: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for shards in (3, 1):
        publish(export(open_checkpoint(release), tmp_path / "out", shards=shards), tmp_path / "out")
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "weights", "out"}


def test_a_failed_export_leaves_nothing(release: Path, tmp_path: Path) -> None:
    def fail(size: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(open_checkpoint(release), tmp_path / "out", progress=fail)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "weights"}


@pytest.mark.parametrize("shards", [0, -1])
def test_a_number_of_files_that_is_none(release: Path, tmp_path: Path, shards: int) -> None:
    with pytest.raises(UsageError, match=f"--num_output_shards {shards} is not positive"):
        export(open_checkpoint(release), tmp_path / "out", shards=shards)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "weights"}


def test_damaged_weights_are_not_exported(release: Path, tmp_path: Path) -> None:
    file = release / "release" / "model" / "model-tp00-pp00.safetensors"
    data = bytearray(file.read_bytes())
    data[-100] ^= 64
    file.write_bytes(data)
    main: Callable[[list[str]], None] = runpy.run_path(str(ROOT / "tools" / "megatron_to_hf.py"))["main"]
    with pytest.raises(ValueError, match=r"model-tp00-pp00\.safetensors was changed"):
        main(["--input_dir", str(release), "--output_dir", str(tmp_path / "out")])


def test_generation_settings_of_a_tokenizer_from_elsewhere(release: Path, tmp_path: Path) -> None:
    publish(export(open_checkpoint(release), tmp_path / "out"), tmp_path / "out")
    settings = GenerationConfig.from_pretrained(tmp_path / "out")
    theirs = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (settings.bos_token_id, settings.eos_token_id) == (theirs["bos_token_id"], theirs["eos_token_id"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 110}, "model.embed_tokens.weight is [103, 32], but by config.json it should be [110, 32]"),
        ({"num_key_value_heads": 4}, "k_proj.weight is [16, 32], but by config.json it should be [32, 32]"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "contradict each other"),
        ({"rope_theta": 5e5}, "contradict each other"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "its factor is missing"),
    ],
)
def test_a_config_that_contradicts_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_llama(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        open_checkpoint(tmp_path)


def test_a_model_of_somebody_elses_is_no_earlier_export(release: Path, tmp_path: Path) -> None:
    """Not the original, and not an export with something added."""
    before = files_below(tmp_path / "hf")
    with pytest.raises(UsageError, match="is no earlier export"):
        export(open_checkpoint(release), tmp_path / "hf")
    assert files_below(tmp_path / "hf") == before
    publish(export(open_checkpoint(release), tmp_path / "out"), tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="or has other files"):
        export(open_checkpoint(release), tmp_path / "out")


def test_a_context_shorter_than_the_comparison(tmp_path: Path) -> None:
    save_family(tmp_path / "hf", "gpt2", n_positions=16)
    checkpoint = open_checkpoint(tmp_path / "hf")
    assert logits_difference(checkpoint, export(checkpoint, tmp_path / "out")) < 1e-5


def test_settings_of_generation_that_came_along_stay(tmp_path: Path) -> None:
    save_llama(tmp_path / "hf")
    settings = {"eos_token_id": [2, 7], "temperature": 0.6, "do_sample": True}
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(settings))
    folder = export(open_checkpoint(tmp_path / "hf"), tmp_path / "out")
    assert json.loads((folder / "generation_config.json").read_text()) == settings
