"""A run saved on one layout goes on, on another, as if it had never stopped; with a growing batch, too."""

from pathlib import Path

import pytest
from tiny_runs import finetune, losses, run, same, tensors, words
from worlds import World

TP2 = "--tensor_model_parallel_size 2"
PP2 = "--pipeline_model_parallel_size 2"
INTERLEAVED = f"{PP2} --num_layers_per_virtual_pipeline_stage 1"
LAYERS = "--num_layers 4"

PAIRS = [
    ((4, TP2), (2, PP2)),
    ((2, PP2), (4, f"{TP2} --sequence_parallel")),
    ((4, f"{TP2} {PP2} --sequence_parallel"), (1, "")),
    ((1, ""), (4, f"{PP2} --full_sharding")),
    ((4, INTERLEAVED), (3, "--micro_batch_size 1")),
    ((2, "--packing none"), (4, f"{INTERLEAVED} {TP2} --recompute_granularity selective")),
]
"""(ranks, flags) that save, and that go on."""


@pytest.fixture(scope="module")
def uninterrupted(world: World, course: str) -> list[float]:
    """Losses of the run on one device."""
    return losses(run(world, 1, course, LAYERS, "--train_iters 6"))


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=str)
def test_goes_on_on_another_layout(
    world: World,
    course: str,
    uninterrupted: list[float],
    tmp_path: Path,
    first: tuple[int, str],
    second: tuple[int, str],
) -> None:
    flags = [course, LAYERS, "--train_iters 6"]
    saved = losses(run(world, first[0], *flags, first[1], f"--save {tmp_path} --exit_interval 3"))
    resumed = losses(run(world, second[0], *flags, second[1], f"--load {tmp_path}"))
    assert len(resumed) == 3
    assert saved + resumed == pytest.approx(uninterrupted, rel=1e-5)


def test_the_checkpoint_gives_the_layout(world: World, course: str, tmp_path: Path) -> None:
    """`--use_checkpoint_args` takes parallel sizes; `--load_iters` takes an older checkpoint."""
    architecture = "--model_name llama2 --num_layers 2 --hidden_size 32 --num_attention_heads 4"
    flags = [course, "--train_iters 4"]
    expected = losses(run(world, 4, *flags, f"{TP2} {PP2} --save {tmp_path} --save_interval 2"))
    bare = course.replace(architecture, "").replace("--num_attention_heads_kv 2 --max_position_embeddings 64", "")
    assert "--num_layers" not in bare
    output = run(world, 4, bare, f"--train_iters 4 --load {tmp_path} --load_iters 2 --use_checkpoint_args")
    assert "4 ranks on cpu: 2 tensor x 2 pipeline x 1 data" in output
    assert losses(output) == expected[2:]


def test_a_run_without_an_iteration_is_refused(course: str, tmp_path: Path) -> None:
    code, output = finetune(words(course, f"--train_samples 3 --save {tmp_path}"))
    assert code == 2
    assert "--train_samples 3 is less than the first batch, 8" in output
    assert not list(tmp_path.iterdir())


def test_a_growing_batch_goes_on_growing(world: World, course: str, tmp_path: Path) -> None:
    flags = [course.replace("--global_batch_size 8", "--global_batch_size 20")]
    flags += ["--train_samples 200 --rampup_batch_size 4 8 60"]
    straight = run(world, 1, *flags, f"--save {tmp_path / 'straight'}")
    sizes = [int(part.split()[0]) for part in straight.split("global batch size:")[1:]]
    assert sizes == [4] * 8 + [12] * 3 + [20] * 6
    first = run(world, 1, *flags, f"--save {tmp_path / 'halves'} --exit_interval 9")
    second = run(world, 1, *flags, f"--load {tmp_path / 'halves'} --save {tmp_path / 'halves'}")
    assert losses(first) + losses(second) == losses(straight)
    assert same(tensors(tmp_path / "straight"), tensors(tmp_path / "halves"))
    elsewhere = run(world, 3, *flags, f"--load {tmp_path / 'halves'} --load_iters 9")
    assert losses(elsewhere) == pytest.approx(losses(second), rel=1e-5)
