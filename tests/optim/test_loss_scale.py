import json

import pytest

from megatron.config import PrecisionConfig
from megatron.optim.loss_scale import ConstantLossScale, DynamicLossScale, build_loss_scale


def scaler(**options):
    return DynamicLossScale(**({"initial": 1024.0, "minimum": 1.0, "window": 3, "hysteresis": 2} | options))


def scales_after(scale, outcomes):
    history = []
    for found_non_finite in outcomes:
        scale.update(found_non_finite)
        history.append(scale.scale)
    return history


BAD, GOOD = True, False


def test_shrinks_when_the_hysteresis_is_used_up_and_then_each_time():
    assert scales_after(scaler(), [BAD, BAD, BAD]) == [1024.0, 512.0, 256.0]


def test_a_good_step_does_not_restore_the_hysteresis():
    assert scales_after(scaler(), [BAD, GOOD, BAD]) == [1024.0, 1024.0, 512.0]


def test_grows_after_a_window_of_good_steps_and_restores_the_hysteresis():
    outcomes = [BAD, GOOD, GOOD, GOOD, BAD, BAD]
    assert scales_after(scaler(), outcomes) == [1024.0, 1024.0, 1024.0, 2048.0, 2048.0, 1024.0]


def test_a_bad_step_starts_the_window_anew():
    assert scales_after(scaler(), [GOOD, GOOD, BAD, GOOD, GOOD, GOOD])[-2:] == [1024.0, 2048.0]


def test_never_below_the_minimum():
    assert scales_after(scaler(initial=2.0, hysteresis=1), [BAD, BAD, BAD]) == [1.0, 1.0, 1.0]


def test_state_goes_through_json():
    first = scaler()
    scales_after(first, [BAD, GOOD, GOOD])
    second = scaler()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    rest = [GOOD, BAD, BAD, BAD]
    assert scales_after(second, rest) == scales_after(first, rest)


def test_state_of_a_constant_scale_leaves_a_dynamic_one_at_its_start():
    dynamic = scaler()
    dynamic.load_state_dict(ConstantLossScale().state_dict())
    assert dynamic.state_dict() == scaler().state_dict()


@pytest.mark.parametrize(
    ("options", "kind", "scale"),
    [
        ({}, ConstantLossScale, 1.0),
        ({"bf16": True}, ConstantLossScale, 1.0),
        ({"fp16": True}, DynamicLossScale, 2.0**32),
        ({"fp16": True, "loss_scale": 128.0}, ConstantLossScale, 128.0),
    ],
)
def test_precision_decides(options, kind, scale):
    built = build_loss_scale(PrecisionConfig(**options))
    assert type(built) is kind
    assert built.scale == scale
    built.update(GOOD)
    assert built.scale == scale
