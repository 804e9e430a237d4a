"""A run that `tools/checkpoint_util.py` cuts for another layout goes on as if nobody had touched it."""

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_runs import ROOT, losses, run, same, tensors, words
from worlds import World

from megatron.checkpoint import open_checkpoint

checkpoint_util: Callable[[list[str]], None] = runpy.run_path(str(ROOT / "tools" / "checkpoint_util.py"))["main"]
CUTS = {"there": (2, 1), "back": (1, 1)}
"""Folder -> tensor and pipeline size that the one before it is cut for."""


@pytest.fixture
def six(course: str) -> str:
    """Flags of a run of six iterations."""
    return f"{course} --train_iters 6"


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
def test_goes_on_from_its_shards_bit_for_bit(world: World, six: str, tmp_path: Path, size: int, flags: str) -> None:
    straight, first = tmp_path / "straight", tmp_path / "first"
    expected = losses(run(world, size, six, flags, f"--save {straight}"))
    begun = losses(run(world, size, six, flags, f"--save {first} --exit_interval 3"))
    back = cut(first)
    assert same(tensors(back, 3), tensors(first, 3))
    for source in (tmp_path / "there", back):
        resumed = tmp_path / f"resumed-{source.name}"
        output = run(world, size, six, flags, f"--load {source} --save {resumed}")
        assert begun + losses(output) == expected
        assert same(tensors(resumed, 6), tensors(straight, 6))
        last, wanted = (open_checkpoint(folder, 6).run for folder in (resumed, straight))
        kept = ("consumed_samples", "schedule", "loss_scale", "optimizer_steps", "vocab_size")
        assert {key: last[key] for key in kept} == {key: wanted[key] for key in kept}


def test_goes_on_without_its_optimizer(world: World, six: str, tmp_path: Path) -> None:
    run(world, 1, six, f"--save {tmp_path / 'first'} --exit_interval 3")
    output = run(world, 1, six, f"--load {cut(tmp_path / 'first', '--no_optim')}")
    assert "has no optimizer state: the optimizer starts anew" in output
    assert "going on from iteration 3, 24 consumed samples" in output
    assert len(losses(output)) == 3
