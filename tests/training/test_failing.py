"""One rank's end is everyone's end, at once and with the reason first; under torchrun a run starts again by itself."""

import os
import signal
import threading
from pathlib import Path

import pytest
from tiny_runs import run, same, tensors, words
from torchruns import TWO_RANKS, children, finish, read_until, start
from worlds import World

from megatron.config import CommonError, PeerError, UsageError
from megatron.parallel.processes import lost_peers
from megatron.training.place import Place


def test_an_error_says_where_it_came_up() -> None:
    place = Place(3, 8)
    with pytest.raises(ValueError, match="bad row") as caught, place.told(), place("evaluation"):
        raise ValueError("bad row")
    assert caught.value.__notes__ == ["rank 3 of 8, before the first iteration, evaluation"]
    place = Place(3, 8)
    place.iteration = 17
    with place("batch-generator"):
        pass
    message = "[/third_party/gloo/pair.cc:553] Connection closed by peer [10.0.0.1]:2960. This is typical."
    with pytest.raises(PeerError, match="lost the other ranks: Connection closed") as lost, place.told(), place("save"):
        raise RuntimeError(message)
    assert lost.value.__notes__ == ["rank 3 of 8, in iteration 17, save"]


@pytest.mark.parametrize("error", [UsageError("a"), CommonError("b")])
def test_what_all_ranks_find_has_no_place(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, Place().told():
        raise error
    assert not hasattr(caught.value, "__notes__")


def test_an_error_of_this_rank_is_not_the_others() -> None:
    assert lost_peers(RuntimeError("shape '[2]' is invalid; gloo has no part in it")) is None


def test_a_wait_is_told_once_with_its_place_and_line() -> None:
    place, told, lines = Place(1, 2), threading.Event(), []

    def write(line: str) -> None:
        lines.append(line)
        told.set()

    with place.watched(0.02, write), place("batch-generator"):
        assert told.wait(30)
        told.clear()
        assert not told.wait(0.2)
    assert len(lines) == 1
    assert "rank 1 of 2, before the first iteration, batch-generator, threading.py:" in lines[0]


def test_a_part_that_goes_on_is_not_told() -> None:
    place, lines = Place(), list[str]()
    with place.watched(30.0, lines.append), place("forward-backward"):
        pass
    assert lines == []


@pytest.mark.slow
def test_the_rank_that_failed_speaks_and_the_others_end(course: str) -> None:
    code, output = finish(start("bug", 3, words(course, "--train_iters 9")))
    assert code == 1
    assert "KeyError: 'planted'\nrank 1 of 2, in iteration 3, batch-generator\n" in output.partition("ChildFailed")[0]
    root = output.partition("Root Cause")[2]
    assert "rank      : 1 " in root
    assert "KeyError: 'planted'" in root
    assert "lost the other ranks" not in output


@pytest.mark.slow
def test_a_killed_rank_is_started_again_and_nothing_is_lost(world: World, course: str, tmp_path: Path) -> None:
    flags = [course, "--train_iters 6 --save_interval 2"]
    run(world, 2, *flags, f"--save {tmp_path / 'straight'}")
    argv = words(*flags, f"--save {tmp_path / 'again'} --auto_resume")
    code, output = finish(start("killed", 4, argv, options=[*TWO_RANKS, "--max_restarts", "1"]))
    assert code == 0, output
    assert "going on from iteration 2, 16 consumed samples" in output
    assert same(tensors(tmp_path / "straight"), tensors(tmp_path / "again"))


@pytest.mark.slow
def test_a_rank_that_hangs_is_found(course: str) -> None:
    argv = words(course, "--train_iters 9 --distributed_timeout_minutes 0.3")
    code, output = finish(start("stuck", 3, argv))
    assert code == 1
    assert "still at the same place after 9 s: rank 0 of 2, in iteration 3, forward-backward, " in output
    assert "still at the same place after 9 s: rank 1 of 2, in iteration 3, batch-generator, " in output
    assert "failed: lost the other ranks: Timed out waiting 18000ms" in output
    assert "(rank 0 of 2, in iteration 3, forward-backward)" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "before", "to_ranks", "code"),
    [("SIGTERM", (), False, 1), ("SIGUSR1", ("bash", "-c", "trap '' USR1; exec \"$@\"", "bash"), True, 0)],
    ids=["SIGTERM", "SIGUSR1"],
)
def test_a_signal_to_torchrun_or_to_its_ranks(
    course: str, tmp_path: Path, name: str, before: tuple[str, ...], to_ranks: bool, code: int
) -> None:
    """torchrun passes SIGTERM on, and fails; it ignores what its shell ignores, and is content with content ranks."""
    argv = words(course, f"--train_iters 1000000 --lr_decay_iters 10 --exit_signal_handler --save {tmp_path}")
    process = start("told", 3, argv, before=before)
    read_until(process, "told")
    for pid in [process.pid, *(children(process) if to_ranks else [])]:
        os.kill(pid, getattr(signal, name))
    found, output = finish(process)
    assert found == code, output
    assert f"stopping: {name} was received" in output
    assert "saved checkpoint of iteration" in output
