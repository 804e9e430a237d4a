"""A run that is asked to stop saves and ends well, in training and in evaluation."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from faulty_finetune import with_evaluation_fault, with_fault
from tiny_runs import ROOT, finetune, losses, run, same, tensors, words
from worlds import World

from megatron.config import TrainingConfig
from megatron.training.stop import Pace, StopAfterDuration, StopAtInterval, StopOnSignal, Stops, open_stops


def test_interval() -> None:
    stop = StopAtInterval(10)
    assert [n for n in range(31) if n and stop.reason(n)] == [10, 20, 30]
    assert stop.reason(20) == "iteration 20 is a multiple of --exit_interval 10"
    assert stop.reason(None) is None


def test_duration_leaves_time_for_an_iteration_and_a_checkpoint() -> None:
    now, pace = [100.0], Pace()
    stop = StopAfterDuration(2, pace, 100.0, clock=lambda: now[0])
    now[0] = 219.9
    assert stop.reason(1) is None
    now[0] = 100.0 + 90.0
    pace.iteration, pace.save = 10.0, 19.9
    assert stop.reason(None) is None
    pace.save = 20.0
    assert stop.reason(None) == (
        "1.5 minutes have passed, an iteration takes 10.0 s and saving 20.0 s: --exit_duration_in_mins is 2"
    )
    pace.save, pace.saves = 9.9, 2
    assert stop.reason(2) is None
    pace.save = 10.0
    assert "saving 20.0 s" in (stop.reason(2) or "")


def test_signal_is_noted_and_the_handler_given_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with StopOnSignal() as stop:
        assert stop.reason(1) is None
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
        assert stop.reason(None) == "SIGUSR1 was received"
    assert signal.getsignal(signal.SIGUSR1) is before


@pytest.mark.parametrize(("first", "second", "code"), [("INT", "INT", -2), ("INT", "TERM", -15), ("USR1", "TERM", 0)])
def test_whoever_interrupts_twice_does_not_wait(first: str, second: str, code: int) -> None:
    program = (
        "import runpy\nfrom signal import *\nstop = runpy.run_path('megatron/training/stop.py')\n"  # without torch
        f"with stop['StopOnSignal']():\n raise_signal(SIG{first})\n raise_signal(SIG{second})"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == code


def test_flags_decide_what_is_watched() -> None:
    with open_stops(TrainingConfig(), 0.0, bool) as stops:
        assert stops.stops == []
    training = TrainingConfig(exit_interval=5, exit_duration_in_mins=1, exit_signal_handler=True)
    with open_stops(training, 0.0, bool) as stops:
        assert [type(stop) for stop in stops.stops] == [StopOnSignal, StopAfterDuration, StopAtInterval]


def test_one_rank_stops_all() -> None:
    assert Stops([StopAtInterval(10)]).reason(10) == "iteration 10 is a multiple of --exit_interval 10"
    assert Stops([StopAtInterval(10)]).reason(9) is None
    assert Stops([StopAtInterval(10)], lambda flag: True).reason(9) == "another rank asked to stop"


def test_without_stops_the_other_ranks_are_not_asked() -> None:
    def unexpected(flag: bool) -> bool:
        raise AssertionError("asked")

    assert Stops([], unexpected).reason(1) is None


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_to_one_rank_saves_and_the_run_goes_on_from_there(
    world: World, course: str, tmp_path: Path, name: str
) -> None:
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    flags = [course, "--train_iters 6 --exit_signal_handler"]
    expected = losses(run(world, 2, *flags, f"--save {straight}"))
    argv = words(*flags, f"--save {halves} --auto_resume")
    stopped = world(2, with_fault, name, 1, 3, argv)
    assert [code for code, _ in stopped] == [0, 0]
    assert "stopping: another rank asked to stop" in stopped[0][1]
    assert "saved checkpoint of iteration 3" in stopped[0][1]
    resumed = run(world, 2, " ".join(argv))
    assert losses(stopped[0][1]) + losses(resumed) == expected
    assert same(tensors(straight), tensors(halves))


def test_an_evaluation_is_cut_short(world: World, course: str, tmp_path: Path) -> None:
    flags = "--train_iters 6 --split 60,30,10 --eval_interval 2 --eval_iters 9 --exit_signal_handler"
    argv = words(course, flags, f"--save {tmp_path}")
    for code, _ in (results := world(2, with_evaluation_fault, "SIGTERM", 1, 2, argv)):
        assert code == 0
    output = results[0][1]
    assert "validation: the evaluation is cut short, since the run is to stop" in output
    assert "loss value" not in output
    assert output.rstrip().splitlines()[-1].startswith("saved checkpoint of iteration 2 ")


def test_a_run_without_time_for_an_iteration_saves_nothing(
    course: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron.training.launch.guessed_save_seconds", lambda weight_bytes: 60.0)
    argv = words(course, f"--train_iters 2 --exit_duration_in_mins 1 --save {tmp_path / 'a'}")
    code, output = finetune(argv)
    assert code == 0
    assert "minutes have passed, an iteration takes 0.0 s and saving 60.0 s" in output
    assert losses(output) == []
    assert not (tmp_path / "a").exists()
    code, output = finetune([*argv, "--exit_duration_in_mins", "2"])
    assert (code, len(losses(output))) == (0, 2)
