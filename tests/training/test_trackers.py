import sys
import types

import pytest

from megatron.config import LoggingConfig
from megatron.training.log import IntervalMeter, Status, Work
from megatron.training.trackers import (
    build_trackers,
    track_evaluation,
    track_interval,
    track_iteration,
    track_memory,
    track_timers,
)

SILENT = [].append


def status(iteration=4):
    return Status(
        iteration=iteration,
        train_iters=10,
        consumed_samples=64 * iteration,
        learning_rate=0.5,
        global_batch_size=64,
        loss_scale=2.0,
        grad_norm=3.0,
        num_zeros=4.0,
        params_norm=5.0,
    )


class Recorder:
    """A tracker that remembers."""

    def __init__(self):
        self.points = {}

    def scalar(self, tag, value, iteration, samples):
        self.points[tag] = (value, iteration, samples)

    def close(self):
        pass


def test_tensorboard_events_read_back(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logging = LoggingConfig(tensorboard_dir=str(tmp_path), log_batch_size_to_tensorboard=True)
    tracker = build_trackers(logging, SILENT, {})
    track_iteration(tracker, logging, status(), {"lm loss": 1.5}, world_size=2)
    tracker.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    expected = {
        "learning_rate": 0.5,
        "batch_size": 64.0,
        "lm loss": 1.5,
        "loss_scale": 2.0,
        "grad_norm": 3.0,
        "num_zeros": 4.0,
        "params_norm": 5.0,
    }
    assert set(events.Tags()["scalars"]) == set(expected) | {f"{tag} vs samples" for tag in expected}
    for tag, value in expected.items():
        for name, step in ((tag, 4), (f"{tag} vs samples", 256)):
            points = [(event.step, event.value) for event in events.Scalars(name)]
            assert points == [(step, value)]


@pytest.mark.parametrize(
    ("options", "present", "absent"),
    [
        ({}, "learning_rate", "batch_size"),
        ({"log_learning_rate_to_tensorboard": False}, "loss_scale", "learning_rate"),
        ({"log_loss_scale_to_tensorboard": False}, "learning_rate", "loss_scale"),
        ({"log_world_size_to_tensorboard": True}, "world_size", "batch_size"),
    ],
)
def test_switches_choose_the_curves(options, present, absent):
    recorder = Recorder()
    track_iteration(recorder, LoggingConfig(**options), status(), {}, world_size=2)
    assert present in recorder.points
    assert absent not in recorder.points


def test_points_come_every_interval():
    recorder, logging = Recorder(), LoggingConfig(tensorboard_log_interval=3)
    track_iteration(recorder, logging, status(4), {}, world_size=1)
    assert not recorder.points
    track_iteration(recorder, logging, status(6), {}, world_size=1)
    assert recorder.points["grad_norm"] == (3.0, 6, 384)


def test_speed_timers_and_memory():
    meter = IntervalMeter()
    meter.add({}, work=Work(tokens=100, useful_tokens=75, imbalance=0.5), seconds=2.0)
    interval = meter.close()
    logging = LoggingConfig(log_timers_to_tensorboard=True, log_memory_to_tensorboard=True)
    recorder = Recorder()
    track_interval(recorder, logging, status(), interval)
    track_timers(recorder, logging, status(), {". forward": [1000.0, 2000.0]})
    track_memory(recorder, logging, status(), {"reserved_bytes.all.current": 7})
    assert {tag: point[0] for tag, point in recorder.points.items()} == {
        "tokens-per-sec": 37.5,
        "tokens-per-sec-per-device": 37.5,
        "padded-share": 0.25,
        "imbalance": 0.5,
        "iteration-time": 2.0,
        "forward-time": 2.0,
        "mem-reserved-bytes": 7,
    }


def test_evaluation_curves():
    recorder = Recorder()
    logging = LoggingConfig(log_validation_ppl_to_tensorboard=True)
    track_evaluation(recorder, logging, "validation", {"lm loss": 0.0, "lm accuracy": 0.5}, 4, 256)
    assert recorder.points == {
        "lm loss validation": (0.0, 4, 256),
        "lm accuracy validation": (0.5, 4, 256),
        "lm loss validation ppl": (1.0, 4, 256),
    }


def test_nothing_asked_for_is_nothing_done():
    build_trackers(LoggingConfig(), SILENT, {}).scalar("lm loss", 1.0, 1, 64)


def test_a_missing_package_is_one_line(tmp_path):
    lines = []
    logging = LoggingConfig(tensorboard_dir=str(tmp_path / "runs"), wandb_logger=True)
    tracker = build_trackers(logging, lines.append, {}, installed=lambda package: False)
    tracker.scalar("lm loss", 1.0, 1, 64)
    assert lines == [
        "--tensorboard_dir has no effect: tensorboard is not installed (pip install tensorboard)",
        "--wandb_logger has no effect: wandb is not installed (pip install wandb)",
    ]
    assert not (tmp_path / "runs").exists()


def test_wandb_gets_every_point(monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((values, step)), finish=lambda: calls.append("finish")
    )
    wandb = types.ModuleType("wandb")
    wandb.login = lambda key: calls.append(("login", key))
    wandb.init = lambda **options: calls.append(options) or run
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    logging = LoggingConfig(wandb_logger=True, wandb_project="p", wandb_name="n", wandb_api_key="k")
    tracker = build_trackers(logging, SILENT, {"lr": 1.0}, installed=lambda package: True)
    tracker.scalar("lm loss", 1.5, 4, 256)
    tracker.close()
    login, options, point, end = calls
    assert login == ("login", "k")
    assert options["project"] == "p"
    assert options["config"] == {"lr": 1.0}
    assert point == ({"lm loss": 1.5, "consumed samples": 256}, 4)
    assert end == "finish"
