import pytest

from megatron.training.log import IntervalMeter, Status, Work, evaluation_line, main_rank_writer, training_line

EXPECTED = (
    " iteration        1/    6500 | consumed samples:           64 | elapsed time per iteration (ms): 1661.5 |"
    " rate (tokens/sec): 13481.00 | learning rate: 3.077E-08 | global batch size:    64 | lm loss: 1.234567E+00 |"
    " loss scale: 1.0 | grad norm: 2.345 | number of skipped iterations:   0 | number of nan iterations:   0 |"
)


def status(**options):
    tutorial = {
        "iteration": 1,
        "train_iters": 6500,
        "consumed_samples": 64,
        "learning_rate": 2e-5 / 650,
        "global_batch_size": 64,
        "loss_scale": 1.0,
        "grad_norm": 2.345,
    }
    return Status(**(tutorial | options))


def one_step(**options):
    meter = IntervalMeter()
    meter.add(
        {"lm loss": 1.234567}, work=Work(tokens=round(13481 * 1.6615), useful_tokens=13481), seconds=1.6615, **options
    )
    return meter.close()


def test_line_is_the_references_byte_for_byte():
    meter = IntervalMeter(devices=2)
    meter.add({"lm loss": 1.234567}, work=Work(tokens=4 * 13481, useful_tokens=2 * 13481), seconds=2.0)
    interval = meter.close()
    assert interval.tokens_per_second == 13481.0
    line = training_line(status(), interval).replace("(ms): 2000.0", "(ms): 1661.5")
    assert line == f"{EXPECTED} useful tokens/sec/device: 6740.50 | padded share: 50.00% | imbalance: 0.00% |"


def test_optional_fields_have_the_references_places():
    line = training_line(status(num_zeros=3.0, params_norm=1.5), one_step())
    assert "| grad norm: 2.345 | num zeros: 3.0 | params norm: 1.500 | number of skipped" in line
    assert "grad norm" not in training_line(status(grad_norm=None), one_step())


def test_new_fields_go_at_the_end():
    line = training_line(status(), one_step(skipped=True, masked=True))
    assert "number of nan iterations:   0 | number of all-masked iterations:   1 | useful tokens/sec/device:" in line
    assert "MFU" not in line


def test_utilization_is_a_share_of_what_all_devices_could_do():
    meter = IntervalMeter(devices=4, peak_flops=250.0)
    for flops in (300.0, 500.0):
        meter.add({}, work=Work(flops=flops), seconds=1.0)
    assert training_line(status(), meter.close()).endswith("imbalance: 0.00% | MFU: 40.00% |")


def test_losses_are_means_over_the_iterations_that_advanced():
    meter = IntervalMeter()
    meter.add({"lm loss": 2.0}, work=Work(tokens=10), seconds=1.0)
    meter.add({"lm loss": 9.0}, work=Work(tokens=10), seconds=1.0, skipped=True)
    meter.add({"lm loss": float("nan")}, work=Work(tokens=10), seconds=1.0, skipped=True)
    meter.add({"lm loss": 4.0}, work=Work(tokens=30, useful_tokens=25, imbalance=0.4), seconds=2.0)
    interval = meter.close()
    assert interval.losses == {"lm loss": 3.0}
    assert (interval.skipped_iterations, interval.nan_iterations) == (2, 1)
    assert interval.seconds_per_iteration == 1.25
    assert interval.tokens_per_second == 5.0
    assert interval.padded_share == pytest.approx(1 - 25 / 60)
    assert interval.imbalance == 0.1
    assert meter.close().losses == {}


def test_an_interval_without_a_step_has_no_loss_field():
    meter = IntervalMeter()
    meter.add({"lm loss": float("inf")}, work=Work(tokens=10), seconds=1.0, skipped=True)
    line = training_line(status(), meter.close())
    assert "lm loss" not in line
    assert "skipped iterations:   1 | number of nan iterations:   1 |" in line


def test_evaluation_block():
    figures = {"lm loss": 0.0, "lm accuracy": 0.5}
    rule, line, closing = evaluation_line("iteration 50 | validation", figures).split("\n")
    assert line == (
        " iteration 50 | validation | lm loss value: 0.000000E+00 | lm loss PPL: 1.000000E+00 |"
        " lm accuracy value: 5.000000E-01 |"
    )
    assert rule == closing == "-" * len(line)


@pytest.mark.parametrize(("is_main", "expected"), [(True, ["hello\n"]), (False, [])])
def test_only_the_main_rank_speaks(is_main, expected):
    lines = []
    main_rank_writer(is_main, lines.append)("hello")
    assert lines == expected
