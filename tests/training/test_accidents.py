"""A batch whose loss or gradient cannot be right changes nothing, and is noted; a spike is gone back before."""

import json
import math
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from faulty_finetune import with_losses, without_samples
from tiny_runs import finetune, losses, run, same, tensors, words
from worlds import World

from megatron.checkpoint import open_checkpoint
from megatron.optim.gradients import gradient_norm
from megatron.training.accidents import GRADIENT, LOSS, is_spike, non_finite
from megatron.training.state import LossAverage

NAN = float("nan")
REWINDING = "--train_iters 20 --save_interval 5 --rewind_on_spike 2 --hidden_dropout 0.1 --global_batch_size 4"
SPIKE = 48
"""Where iteration 13 begins, with batches of 4."""


def accidents(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "accidents.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("loss", "norm", "can_shrink", "kind"),
    [
        (1.0, 2.0, False, None),
        (NAN, NAN, False, LOSS),
        (math.inf, 2.0, True, LOSS),
        (1.0, math.inf, False, GRADIENT),
        (1.0, math.inf, True, None),
    ],
)
def test_a_search_for_the_loss_scale_is_no_accident(
    loss: float, norm: float, can_shrink: bool, kind: str | None
) -> None:
    assert non_finite(loss, norm, can_shrink) == kind


def test_the_average_is_a_mean_that_becomes_exponential() -> None:
    average = LossAverage()
    for loss in range(50):
        average.add(float(loss))
    assert average.mean == pytest.approx(24.5)
    average.add(74.5)
    assert average.mean == pytest.approx(24.5 + 50 / 50)


def test_a_spike_is_a_multiple_of_enough_iterations() -> None:
    assert not is_spike(100.0, LossAverage(9, 2.0), 3.0)
    found = [is_spike(loss, LossAverage(10, 2.0), 3.0) for loss in (6.0, 6.1, math.inf, NAN)]
    assert found == [False, True, False, False]


@pytest.mark.parametrize(("size", "layout"), [(1, ""), (2, "--pipeline_model_parallel_size 2")])
def test_a_loss_that_is_not_finite_is_as_if_its_batch_were_passed_over(
    world: World, course: str, tmp_path: Path, size: int, layout: str
) -> None:
    flags = words(course, layout, "--train_iters 5")
    run(world, size, *flags, f"--skip_iters 3 --save {tmp_path / 'expected'}")
    results = world(size, with_losses, NAN, [16], [*flags, "--save", str(tmp_path / "found")])
    assert [code for code, _ in results] == [0] * size
    assert same(tensors(tmp_path / "expected"), tensors(tmp_path / "found"))
    (noted,) = accidents(tmp_path / "found")
    assert (noted["kind"], noted["iteration"], noted["consumed_samples"], noted["loss"]) == (LOSS, 3, 24, "nan")
    assert noted["grad_norm"] > 0
    prefix = course.split("--data_path ")[1].split()[0]
    assert len(set(noted["samples"])) == 8
    assert all(place.startswith(f"{prefix} row ") for place in noted["samples"])
    assert "iteration 3: loss not finite (loss nan, " in results[0][1]


def test_too_many_in_a_row_end_the_run_and_leave_its_checkpoints(world: World, course: str, tmp_path: Path) -> None:
    flags = words(course, f"--train_iters 20 --save_interval 2 --max_consecutive_skips 3 --save {tmp_path}")
    bad = [16, 32, 40, 48]
    results = world(2, with_losses, NAN, bad, flags)
    assert [code for code, _ in results] == [1, 1]
    assert "were not finite in 3 iterations in a row, 5 to 7 (--max_consecutive_skips)" in results[0][1]
    assert [noted["iteration"] for noted in accidents(tmp_path)] == [3, 5, 6, 7]
    assert open_checkpoint(tmp_path).iteration == 6
    assert finetune([*flags, "--auto_resume", "--train_iters", "8"])[0] == 2  # the schedule is of 20
    assert finetune([*flags, "--auto_resume"])[0] == 0


def test_a_gradient_that_is_never_finite_ends_the_run_even_in_fp16(course: str, tmp_path: Path) -> None:
    flags = "--fp16 --hysteresis 1 --initial_loss_scale 4 --max_consecutive_skips 2 --init_method_std 1e4 --clip_grad 0"
    code, output = finetune(words(course, f"--train_iters 9 --save {tmp_path}", flags))
    assert code == 1, output
    assert "were not finite in 2 iterations in a row" in output


@pytest.mark.parametrize(("size", "stops"), [(1, [20]), (2, [20]), (1, [10, 20]), (1, [13, 20])])
def test_after_a_rewind_a_run_is_one_that_never_saw_the_window(
    world: World, course: str, tmp_path: Path, size: int, stops: list[int]
) -> None:
    """The window is iterations 11 to 13, since the checkpoint of 10; stopped and resumed before or after, too."""
    expected, found = tmp_path / "expected", tmp_path / "found"
    straight = world(size, without_samples, 40, 12, words(course, REWINDING, f"--save {expected}"))
    output = ""
    for stop in stops:
        flags = words(course, REWINDING, f"--save {found} --auto_resume --exit_interval {stop}")
        results = world(size, with_losses, 10.0, [SPIKE], flags)
        assert [code for code, _ in results] == [0] * size, results[0][1]
        output += results[0][1]
    assert "rewind 1 of at most 3: back to iteration 10, and on after 12 samples that are passed over" in output
    trained = losses(output)
    assert trained[:10] + trained[-10:] == losses(straight[0][1])
    assert same(tensors(expected), tensors(found))
    assert [(noted["kind"], noted["iteration"]) for noted in accidents(found)] == [("loss spike", 13)]
    assert open_checkpoint(found).run["skipped_samples"] == 12


def test_a_spike_that_comes_again_and_again_ends_the_run(course: str, tmp_path: Path) -> None:
    flags = words(course, REWINDING, f"--max_rewinds 2 --save {tmp_path}")
    code, output = with_losses(10.0, range(SPIKE, 1000), flags)
    assert code == 1
    assert "the loss spiked again in iteration 11, after 2 rewinds (--max_rewinds)" in output
    assert "back to iteration 10, and on after 16 samples" in output
    assert open_checkpoint(tmp_path).iteration == 10


@pytest.mark.parametrize("is_finite", [True, False])
def test_without_a_checkpoint_training_goes_on(
    course: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_finite: bool
) -> None:
    """Be the gradient of the spike finite or not, by which its update would be left out."""
    iterations = count(1)

    def norm(*args: Any) -> float:
        return gradient_norm(*args) if next(iterations) != 13 or is_finite else math.inf

    monkeypatch.setattr("megatron.training.trainer.gradient_norm", norm)
    flags = words(course, REWINDING, f"--save_interval 100 --save {tmp_path}")
    code, output = with_losses(10.0, [SPIKE], flags)
    assert code == 0, output
    assert "there is no checkpoint to go back to yet: training goes on" in output
    assert next(iterations) == 21


def test_a_rewind_to_where_the_run_began_takes_from_there_what_the_run_took(
    world: World, course: str, tmp_path: Path
) -> None:
    """Its weights, and not the optimizer state that the run was to leave."""
    run(world, 1, course, REWINDING, f"--exit_interval 10 --save {tmp_path / 'begin'}")
    flags = words(course, REWINDING, f"--save_interval 20 --load {tmp_path / 'begin'} --no_load_optim --save")
    code, _ = without_samples(40, 12, [*flags, str(tmp_path / "expected")])
    assert code == 0
    code, output = with_losses(10.0, [SPIKE], [*flags, str(tmp_path / "found")])
    assert code == 0
    assert "back to iteration 10, and on after 12 samples" in output
    assert same(tensors(tmp_path / "expected"), tensors(tmp_path / "found"))


def test_a_rewind_needs_checkpoints(course: str, tmp_path: Path) -> None:
    for flags in ("", f"--save {tmp_path}", f"--save {tmp_path} --save_interval 5 --no_save_optim"):
        code, output = finetune(words(course, f"--train_iters 2 --rewind_on_spike 2 {flags}"))
        assert code == 2
        assert "--rewind_on_spike" in output
