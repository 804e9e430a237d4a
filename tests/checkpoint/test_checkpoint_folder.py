"""A checkpoint exists when it is whole; damage is found, and the newest whole one is taken."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.checkpoint import Slice, begin_checkpoint, open_checkpoint
from megatron.config import ModelConfig
from megatron.hf.rows import parameter_shapes

SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 4,
    "ffn_hidden_size": 6,
    "num_attention_heads": 2,
    "num_attention_heads_kv": 2,
    "kv_channels": 2,
    "tie_embed_logits": False,
    "position_embedding_type": "rotary",
}
MODEL = ModelConfig(**SIZES)
RUN = {"config": {"model": SIZES}, "consumed_samples": 8}


def slices(value: float) -> Iterator[Slice]:
    for name in sorted(parameter_shapes(MODEL, 1)):
        yield Slice.of(name, (3,), (0,), torch.full((3,), value))


def save(folder: Path, iteration: int | None) -> Path:
    """A checkpoint filled with its iteration's number."""
    run = {**RUN, "iteration": iteration}
    files = {"model/x.safetensors": slices(float(iteration or 0))}
    return begin_checkpoint(folder, iteration, run, files, []).complete()


def value(folder: Path, iteration: int | None = None) -> float:
    """What the opened checkpoint is filled with."""
    return float(open_checkpoint(folder, iteration).weights.read("final_norm.weight")[0])


def test_the_newest_or_the_one_asked_for(tmp_path: Path) -> None:
    for iteration in (5, 10, 15):
        save(tmp_path, iteration)
    assert value(tmp_path) == 15
    assert value(tmp_path, 10) == 10
    assert value(tmp_path / "iter_0000005") == 5
    assert open_checkpoint(tmp_path).iteration == 15
    with pytest.raises(ValueError, match="no checkpoint of iteration 7; there are: iter_0000005, iter_0000010"):
        value(tmp_path, 7)


def test_a_release_is_iteration_0(tmp_path: Path) -> None:
    save(tmp_path, None)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "release\n"
    assert open_checkpoint(tmp_path).iteration == 0


def test_saving_again_replaces(tmp_path: Path) -> None:
    save(tmp_path, 5)
    folder = save(tmp_path, 5)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "model", "run.json"]
    assert value(tmp_path) == 5


def test_an_error_while_writing_leaves_the_previous_one(tmp_path: Path) -> None:
    save(tmp_path, 5)

    def breaks() -> Iterator[Slice]:
        yield from slices(10.0)
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        begin_checkpoint(tmp_path, 10, RUN, {"model/x.safetensors": breaks()}, []).complete()
    assert value(tmp_path) == 5
    save(tmp_path, 10)
    assert value(tmp_path) == 10


def test_a_tracker_ahead_of_its_folder_goes_back(tmp_path: Path) -> None:
    save(tmp_path, 5)
    shutil.rmtree(save(tmp_path, 10))
    assert open_checkpoint(tmp_path).iteration == 5


def test_what_is_no_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is no checkpoint"):
        open_checkpoint(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("../../etc\n")
    with pytest.raises(ValueError, match=r"says '\.\./\.\./etc'"):
        open_checkpoint(tmp_path)


def test_an_index_that_leaves_its_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "vocab_size": 3, "hidden_size": 4, "intermediate_size": 4})[:-1]
        + ', "num_hidden_layers": 1, "num_attention_heads": 1}'
    )
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="not a file of that folder"):
        open_checkpoint(tmp_path)
