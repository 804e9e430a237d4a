import math

import pytest
import torch

from megatron.config import OptimizerConfig, ScheduleConfig, TrainingConfig, UsageError
from megatron.optim.schedule import ParameterSchedule

BATCH = 64


def schedule(*, optimizer=None, training=None, **options):
    options = {"lr": 2e-5, "min_lr": 2e-6, "lr_decay_style": "cosine", "lr_warmup_iters": 650} | options
    return ParameterSchedule(
        OptimizerConfig(**(optimizer or {})),
        ScheduleConfig(**options),
        TrainingConfig(**({"train_iters": 6500} | (training or {}))),
        BATCH,
    )


def test_tutorial_log_line():
    """Warmup over 650 iterations to 2e-5: after the first iteration the log says 3.077E-08."""
    tutorial = schedule()
    assert tutorial.learning_rate(0) == 0.0
    assert f"{tutorial.learning_rate(64):.3E}" == "3.077E-08"


@pytest.mark.parametrize(
    ("style", "iteration", "expected"),
    [
        ("constant", 325, 1e-5),
        ("constant", 650, 2e-5),
        ("constant", 9000, 2e-5),
        ("linear", 650, 2e-5),
        ("linear", 3575, 1.1e-5),
        ("linear", 6500, 2e-6),
        ("linear", 7000, 2e-6),
        ("cosine", 650, 2e-5),
        ("cosine", 3575, 1.1e-5),
        ("cosine", 650 + 1950, 2e-6 + 1.8e-5 * 0.75),  # a third of the way: (1 + cos 60 degrees) / 2
        ("cosine", 6500, 2e-6),
        ("inverse-square-root", 2600, 1e-5),
        ("inverse-square-root", 6500, 2e-5 * math.sqrt(0.1)),
        ("inverse-square-root", 6501, 2e-6),
    ],
)
def test_styles_by_hand(style, iteration, expected):
    assert schedule(lr_decay_style=style).learning_rate(iteration * BATCH) == pytest.approx(expected, rel=1e-12)


def test_inverse_square_root_without_warmup_starts_at_the_maximum():
    rates = schedule(lr_decay_style="inverse-square-root", lr_warmup_iters=0)
    assert rates.learning_rate(0) == 2e-5
    assert rates.learning_rate(4) == 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"lr_warmup_iters": 1000},
        {"lr_warmup_iters": 0, "lr_warmup_samples": 64_000},
        {"lr_warmup_iters": 0, "lr_warmup_fraction": 0.2, "lr_decay_iters": 5000},
    ],
)
def test_warmup_can_be_given_in_three_ways(options):
    rates = schedule(**options)
    assert rates.learning_rate(32_000) == pytest.approx(1e-5)
    assert rates.learning_rate(64_000) == pytest.approx(2e-5)


def test_decay_length_defaults_to_the_run_and_can_be_set():
    assert schedule().values.decay_samples == 6500 * BATCH
    assert schedule(lr_decay_iters=1000).values.decay_samples == 1000 * BATCH
    assert schedule(lr_decay_samples=100_000).values.decay_samples == 100_000
    by_samples = schedule(training={"train_iters": None, "train_samples": 90_000})
    assert by_samples.values.decay_samples == 90_000


def test_cosine_equals_torch():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2e-5)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100, eta_min=2e-6)
    ours = schedule(lr_warmup_iters=0, lr_decay_iters=100)
    for step in range(100):
        assert ours.learning_rate(step * BATCH) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_warmup_and_decay_to_zero_equal_transformers(style):
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-5)
    theirs = transformers.get_scheduler(style, optimizer, num_warmup_steps=10, num_training_steps=50)
    ours = schedule(min_lr=0.0, lr_decay_style=style, lr_warmup_iters=10, training={"train_iters": 50})
    for step in range(50):
        assert ours.learning_rate(step * BATCH) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-20)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(("style", "quarter"), [("linear", 0.025), ("cosine", 0.1 * 0.5 * (1 - math.cos(math.pi / 4)))])
def test_weight_decay_increases(style, quarter):
    increment = {"weight_decay_incr_style": style, "start_weight_decay": 0.0, "end_weight_decay": 0.1}
    decay = schedule(optimizer=increment)
    samples = 6500 * BATCH
    assert decay.weight_decay(0) == 0.0
    assert decay.weight_decay(samples // 4) == pytest.approx(quarter)
    assert decay.weight_decay(samples // 2) == pytest.approx(0.05)
    assert decay.weight_decay(samples + 1) == 0.1


def test_weight_decay_is_constant_by_default():
    assert schedule(optimizer={"weight_decay": 0.3}).weight_decay(1) == 0.3


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"min_lr": 1.0}, "--min_lr"),
        ({"lr_warmup_iters": 6500}, "--lr_warmup_iters"),
        ({"optimizer": {"weight_decay_incr_style": "linear"}}, "--start_weight_decay"),
        ({"optimizer": {"end_weight_decay": 0.5}}, "--end_weight_decay"),
    ],
)
def test_user_mistakes_name_the_flag(options, flag):
    with pytest.raises(UsageError, match=flag):
        schedule(**options)


def test_resume_with_the_same_values():
    assert (
        schedule().merged_with(schedule().to_dict(), override=False, use_checkpoint=False).values == schedule().values
    )


def test_resume_with_another_learning_rate_needs_a_decision():
    typed, stored = schedule(lr=1e-5), schedule().to_dict()
    with pytest.raises(UsageError, match=r"--lr is 1e-05 here but 2e-05 in the checkpoint.*--override_opt_param"):
        typed.merged_with(stored, override=False, use_checkpoint=False)
    assert typed.merged_with(stored, override=True, use_checkpoint=False).values == typed.values
    assert typed.merged_with(stored, override=False, use_checkpoint=True).values == schedule().values


def test_longer_run_changes_nothing_where_lengths_have_no_effect():
    stored = schedule(lr_decay_style="constant").to_dict()
    longer = schedule(lr_decay_style="constant", training={"train_iters": 9000})
    assert longer.merged_with(stored, override=False, use_checkpoint=False).values == longer.values
