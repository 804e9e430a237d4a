from itertools import count

import pytest

from megatron.config import LoggingConfig
from megatron.training.timers import Timers


def timers(level=2, option="max"):
    """Timers whose clock advances by a second at each reading."""
    ticks = count()
    return Timers(LoggingConfig(timing_log_level=level, timing_log_option=option), clock=lambda: float(next(ticks)))


def two_ranks(mine):
    return [mine, [2 * value for value in mine]]


def run(timer):
    for _ in range(2):
        with timer("step", level=0), timer("forward", level=1):
            pass
        with timer("optimizer", level=2):
            pass


def test_levels_above_the_chosen_one_are_not_timed():
    for level, expected in [(0, ["step"]), (1, ["step", ". forward"]), (2, ["step", ". forward", "optimizer"])]:
        timer = timers(level)
        run(timer)
        assert list(timer.milliseconds(two_ranks)) == expected


def test_times_add_up_nest_and_start_anew():
    timer = timers()
    run(timer)
    assert timer.milliseconds(two_ranks, iterations=2) == {
        "step": [3000.0, 6000.0],
        ". forward": [1000.0, 2000.0],
        "optimizer": [1000.0, 2000.0],
    }
    assert timer.milliseconds(two_ranks) == {}


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("max", f"max time across ranks (ms):\n    step {'.' * 43}: 2000.00"),
        (
            "minmax",
            f"(min, max) time across ranks (ms):\n    step {'.' * 43}: (1000.00, 2000.00)",
        ),
        ("all", "times across ranks (ms):\n  step:\n     rank  0: 1000.00\n     rank  1: 2000.00"),
    ],
)
def test_layouts(option, expected):
    timer = timers(option=option)
    with timer("step"):
        pass
    assert timer.layout(timer.milliseconds(two_ranks)) == expected


def test_time_of_a_part_that_fails_is_kept():
    timer = timers()
    with pytest.raises(KeyError), timer("step"):
        raise KeyError
    assert timer.milliseconds(two_ranks) == {"step": [1000.0, 2000.0]}


def test_the_device_is_waited_for_at_both_ends():
    waits = []
    timer = Timers(LoggingConfig(timing_log_level=1), synchronize=lambda: waits.append(1))
    with timer("step", level=1):
        pass
    with timer("detail", level=2):
        pass
    assert len(waits) == 2
