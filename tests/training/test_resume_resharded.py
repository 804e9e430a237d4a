"""A run that `tools/checkpoint_util.py` cuts for another layout goes on as if nobody had touched it."""

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import ARCHITECTURE, COURSE, ROOT, finetune, losses, same, tensors, words, write_rows
from worlds import World

from megatron.checkpoint import open_checkpoint

checkpoint_util: Callable[[list[str]], None] = runpy.run_path(str(ROOT / "tools" / "checkpoint_util.py"))["main"]
CUTS = {"there": (2, 1), "back": (1, 1)}
"""Folder -> tensor and pipeline size that the one before it is cut for."""


@pytest.fixture(scope="module")
def course(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Flags of a run of six iterations."""
    prefix = tmp_path_factory.mktemp("rows") / "rows"
    write_rows(prefix.with_suffix(".jsonl"), 80)
    vocabulary = "--tokenizer_type SentencePieceTokenizer --vocab_extra_ids_list <|im_start|>,<|im_end|>"
    files = f"--input {prefix}.jsonl --output_prefix {prefix} --vocab_file {small_model} --workers 1"
    keys = "--question_key question --answer_key response"
    runpy.run_path(str(ROOT / "instruct" / "preprocess_instruct_data.py"))["main"](words(vocabulary, files, keys))
    return f"{ARCHITECTURE} {COURSE} --vocab_file {small_model} --data_path {prefix} --train_iters 6"


def run(world: World, size: int, *flags: str) -> str:
    """A run on `size` ranks that must succeed; what the main rank said."""
    results = world(size, finetune, words(*flags))
    assert [code for code, _ in results] == [0] * size, results[0][1]
    return results[0][1]


def cut(source: Path, *flags: str) -> Path:
    """The checkpoint cut and merged again."""
    for name, (tensor, pipeline) in CUTS.items():
        sizes = f"--target_tensor_parallel_size {tensor} --target_pipeline_parallel_size {pipeline}"
        checkpoint_util(words(f"--load_dir {source} --save_dir {source.parent / name}", sizes, *flags))
        source = source.parent / name
    return source


@pytest.mark.parametrize(
    ("size", "flags"),
    [
        (1, ""),
        (1, "--optimizer sgd"),
        (1, "--fp16 --initial_loss_scale 1024 --loss_scale_window 2"),
        (2, "--tensor_model_parallel_size 2 --sequence_parallel --hidden_dropout 0.1"),
    ],
)
def test_goes_on_from_its_shards_bit_for_bit(world: World, course: str, tmp_path: Path, size: int, flags: str) -> None:
    straight, first = tmp_path / "straight", tmp_path / "first"
    expected = losses(run(world, size, course, flags, f"--save {straight}"))
    begun = losses(run(world, size, course, flags, f"--save {first} --exit_interval 3"))
    back = cut(first)
    assert same(tensors(back, 3), tensors(first, 3))
    for source in (tmp_path / "there", back):
        resumed = tmp_path / f"resumed-{source.name}"
        output = run(world, size, course, flags, f"--load {source} --save {resumed}")
        assert begun + losses(output) == expected
        assert same(tensors(resumed, 6), tensors(straight, 6))
        last, wanted = (open_checkpoint(folder, 6).run for folder in (resumed, straight))
        kept = ("consumed_samples", "schedule", "loss_scale", "optimizer_steps", "vocab_size")
        assert {key: last[key] for key in kept} == {key: wanted[key] for key in kept}


def test_goes_on_without_its_optimizer(world: World, course: str, tmp_path: Path) -> None:
    run(world, 1, course, f"--save {tmp_path / 'first'} --exit_interval 3")
    output = run(world, 1, course, f"--load {cut(tmp_path / 'first', '--no_optim')}")
    assert "has no optimizer state: the optimizer starts anew" in output
    assert "going on from iteration 3, 24 consumed samples" in output
    assert len(losses(output)) == 3
