"""Checkpoints of whole runs: in the background as at once, passed over where damaged, found by the same command."""

import json
import os
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from faulty_finetune import changed_training, with_losses
from tiny_runs import finetune, losses, run, tensors, words
from worlds import World

import megatron.training.saver as saver
from megatron.checkpoint import prune
from megatron.checkpoint.integrity import manifest_bytes, read_manifest
from megatron.checkpoint.safetensors_file import SafetensorsWriter
from megatron.checkpoint.writing import write_bytes
from megatron.config import CommonError
from megatron.parallel.mesh import Mesh
from megatron.training.start import Start, verified
from megatron.training.stop import Pace
from megatron.training.trainer import Trainer

TP2 = "--tensor_model_parallel_size 2"
TRACKER = "latest_checkpointed_iteration.txt"


def contents(save: Path) -> dict[str, Any]:
    """All files below; of run.json all but where it is and how it came there."""
    found: dict[str, Any] = {}
    for path in sorted(save.rglob("*")):
        name = str(path.relative_to(save))
        if path.name == "run.json":
            found[name] = json.loads(path.read_text())
            del found[name]["config"]["checkpoint"]
        elif path.is_file() and path.name != "manifest.json":
            found[name] = path.read_bytes()
    return found


class WrittenLast(Future[Any]):
    """Work in the background that is not begun before it is waited for."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__()
        self.work = work

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self.work()
        return None

    def result(self, timeout: float | None = None) -> Any:
        return self.work()


def finetune_writing_last(argv: list[str]) -> tuple[int, str]:
    """`finetune`, whose checkpoints in the background are written as late as can be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saver, "_started", lambda work, **how: WrittenLast(work))
        return finetune(argv)


@pytest.mark.parametrize("way", [finetune, finetune_writing_last])
@pytest.mark.parametrize(("size", "layout"), [(1, ""), (2, TP2)])
def test_in_the_background_as_at_once(
    world: World, course: str, tmp_path: Path, size: int, layout: str, way: Callable[[list[str]], Any]
) -> None:
    """Byte for byte, though training goes on while the state is written."""
    flags = words(course, layout, "--train_iters 7 --save_interval 3")
    outputs = []
    for function, flag in ((finetune, "plain"), (way, "async_save")):
        save = [f"--save={tmp_path / flag}", *(["--async_save"] if flag == "async_save" else [])]
        results = world(size, function, [*flags, *save])
        assert [code for code, _ in results] == [0] * size, results[0][1]
        outputs.append(results[0][1])
    assert contents(tmp_path / "async_save") == contents(tmp_path / "plain")
    assert losses(outputs[0]) == losses(outputs[1])
    for iteration in (3, 6, 7):
        line = next(line for line in outputs[1].splitlines() if f"saved checkpoint of iteration {iteration} " in line)
        assert " s, of which training waited " in line
        assert f"saving checkpoint of iteration {iteration} in the background" in outputs[1]


def test_a_checkpoint_in_the_background_takes_time_at_a_stop(course: str, tmp_path: Path) -> None:
    """Until it is whole there is one to write besides that of the stop."""
    seen = []

    class Look:
        def __init__(self, pace: Pace) -> None:
            self.pace = pace

        def reason(self, iteration: int | None) -> str | None:
            seen.append((iteration, self.pace.saves))
            return None

    def plant(trainer: Trainer) -> None:
        trainer.stops = replace(trainer.stops, stops=[Look(trainer.stops.pace)])

    with changed_training(plant):
        code, _ = finetune_writing_last(
            words(course, f"--train_iters 4 --save_interval 2 --async_save --save {tmp_path}")
        )
    assert code == 0
    assert seen == [(None, 1), (1, 1), (2, 1), (3, 2), (4, 2)]


def test_a_checkpoint_in_the_background_is_whole_when_accidents_end_the_run(
    course: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was begun before the last of them, which the run does not outlive."""
    monkeypatch.setattr(saver, "_started", lambda work, **how: WrittenLast(work))
    flags = f"--train_iters 9 --save_interval 2 --async_save --max_consecutive_skips 1 --save {tmp_path}"
    code, output = with_losses(float("nan"), [16], words(course, flags))
    assert (code, "(--max_consecutive_skips)" in output) == (1, True), output
    assert {path.name for path in tmp_path.iterdir()} == {TRACKER, "iter_0000002", "accidents.jsonl"}


@pytest.mark.parametrize("save", ["file", "file/below"])
def test_a_folder_that_cannot_be_written_to_is_told_before_training(course: str, tmp_path: Path, save: str) -> None:
    (tmp_path / "file").touch()
    code, output = finetune(words(course, f"--train_iters 2 --save {tmp_path / save}"))
    assert code == 2
    assert f"--save {tmp_path / save}: {tmp_path / 'file'} is not a folder that can be written to" in output


def finetune_failing(argv: list[str], rank: int) -> tuple[int, str]:
    """`finetune`, whose second checkpoint cannot be written by a rank."""
    write = SafetensorsWriter.write

    def fails(self: SafetensorsWriter, tensor: Any) -> None:
        if "iter_0000004" in str(self._file.name) and f"rank-{rank:05d}" in str(self._file.name):
            raise OSError(28, "No space left on device")
        write(self, tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SafetensorsWriter, "write", fails)
        return finetune(argv)


@pytest.mark.parametrize("background", ["--async_save", ""])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_failed_save_ends_the_run_on_every_rank(
    world: World, course: str, tmp_path: Path, background: str, rank: int
) -> None:
    flags = words(course, background, f"--train_iters 100000 --save_interval 2 --save {tmp_path}")
    results = world(2, finetune_failing, flags, rank)
    assert [code for code, _ in results] == [1, 1]
    assert f"rank-{rank:05d}.safetensors could not be written: [Errno 28] No space left on device" in results[rank][1]
    assert "another rank says why" in results[1 - rank][1]
    assert {path.name for path in tmp_path.iterdir()} == {TRACKER, "iter_0000002"}
    assert len(tensors(tmp_path)) > 20


@pytest.mark.parametrize("background", ["--async_save", ""])
def test_old_checkpoints_go(world: World, course: str, tmp_path: Path, background: str) -> None:
    flags = f"--train_iters 11 --save_interval 2 --keep_last 2 --keep_every 4 --save {tmp_path}"
    run(world, 2, course, background, flags)
    kept = {f"iter_{iteration:07d}" for iteration in (4, 8, 10, 11)}
    assert {path.name for path in tmp_path.iterdir()} == {TRACKER, *kept}


def finetune_looking(argv: list[str], folder: str) -> tuple[int, str]:
    """`finetune`; exit code 3 if files of a folder are open when old checkpoints go."""
    seen: list[str] = []

    def look(*args: Any) -> list[str]:
        targets = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()]
        seen.extend(target for target in targets if target.startswith(f"{folder}/"))
        return prune(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saver, "prune", look)
        code, output = finetune(argv)
    return (3, str(seen)) if seen else (code, output)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_the_checkpoint_that_was_loaded_takes_no_room_when_it_has_gone(
    world: World, course: str, tmp_path: Path
) -> None:
    command = words(course, f"--train_iters 4 --keep_last 1 --save {tmp_path} --auto_resume")
    assert finetune([*command, "--exit_interval", "2"])[0] == 0
    ((code, output),) = world(1, finetune_looking, command, str(tmp_path / "iter_0000002"))
    assert (code, "going on from iteration 2" in output) == (0, True), output
    assert not (tmp_path / "iter_0000002").exists()


@pytest.fixture
def trained(world: World, course: str, tmp_path: Path) -> Path:
    """Checkpoints of iterations 2 and 4, of a run on two ranks."""
    run(world, 2, course, TP2, f"--train_iters 4 --save_interval 2 --save {tmp_path / 'trained'}")
    return tmp_path / "trained"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model/rank-00000", "model/rank-00001", "optimizer/rank-00001"])
@pytest.mark.parametrize(("size", "layout"), [(1, ""), (2, TP2), (3, "")])
def test_a_changed_byte_costs_one_checkpoint(
    world: World, course: str, trained: Path, name: str, size: int, layout: str
) -> None:
    """It is found by its checksum only, on whatever rank; all ranks go back alike."""
    flags = [course, layout, f"--train_iters 4 --override_opt_param_scheduler --load {trained}"]
    expected = losses(run(world, size, *flags, "--load_iters 2"))
    damaged = trained / "iter_0000004" / f"{name}.safetensors"
    flip(damaged)
    output = run(world, size, *flags)
    assert losses(output) == expected
    assert len(expected) == 2
    assert f"iter_0000004 is damaged: {damaged} was changed" in output
    assert f"going back to {trained / 'iter_0000002'}" in output


def test_progress_that_was_made_up_is_refused(course: str, tmp_path: Path) -> None:
    """With a manifest that fits."""
    flags = words(course, f"--train_iters 2 --save {tmp_path} --auto_resume")
    assert finetune(flags)[0] == 0
    folder = tmp_path / "iter_0000002"
    description = (folder / "run.json").read_bytes()
    for changed in ({"consumed_samples": "16"}, {"rewinds": -1}, {"schedule": [1]}, {"average_loss": {"mode": 1}}):
        written = write_bytes(folder / "run.json", json.dumps(json.loads(description) | changed).encode())
        manifest = manifest_bytes(read_manifest(folder) | {"run.json": written})
        (folder / "manifest.json").write_bytes(manifest)
        code, output = finetune(flags)
        assert (code, f"failed: {folder / 'run.json'} does not say where a run stood: " in output) == (1, True), output


def test_only_what_is_needed_is_compared(world: World, course: str, trained: Path) -> None:
    flags = [course, f"--train_iters 6 --override_opt_param_scheduler --load {trained}"]
    flip(trained / "iter_0000004" / "optimizer" / "rank-00000.safetensors")
    for choice in ("--finetune", "--no_load_optim", "--no_verify_checkpoint"):
        assert "is damaged" not in run(world, 1, *flags, choice)
    flip(trained / "iter_0000004" / "model" / "rank-00000.safetensors")
    assert "is damaged" not in run(world, 1, *flags, "--no_verify_checkpoint")
    assert "is damaged" in run(world, 1, *flags, "--finetune")


def test_a_checkpoint_of_other_options_is_not_taken_silently(world: World, course: str, trained: Path) -> None:
    """The one before is of another layout, which is the run's by `--use_checkpoint_args`."""
    more = f"--train_iters 6 --override_opt_param_scheduler --load {trained}"
    run(world, 2, course, more, f"--save {trained}")
    flip(trained / "iter_0000006" / "model" / "rank-00000.safetensors")
    results = world(2, finetune, words(course, more, "--use_checkpoint_args"))
    assert [code for code, _ in results] == [1, 1]
    assert f"to go on from {trained / 'iter_0000004'}, move the damaged one away" in results[0][1]
    (trained / "iter_0000006").rename(trained / "away")
    assert "going on from iteration 4" in run(world, 2, course, more, "--use_checkpoint_args")


def test_the_same_command_starts_and_restarts(world: World, course: str, tmp_path: Path) -> None:
    """The first start takes weights only; each later one takes everything from where the last one stopped."""
    run(world, 1, course, f"--train_iters 2 --save {tmp_path / 'weights'}")
    command = [course, f"--train_iters 9 --load {tmp_path / 'weights'} --finetune --no_load_optim --auto_resume"]
    straight = run(world, 2, *command, f"--save {tmp_path / 'straight'}")
    assert f"no checkpoint in {tmp_path / 'straight'} yet, beginning from --load {tmp_path / 'weights'}" in straight
    starts = [run(world, 2, *command, f"--save {tmp_path / 'often'} --exit_interval 3") for _ in range(4)]
    assert [len(losses(output)) for output in starts] == [3, 3, 3, 0]
    assert [loss for output in starts for loss in losses(output)] == losses(straight)
    often, once = (contents(tmp_path / name / "iter_0000009") for name in ("often", "straight"))
    assert often.pop("run.json")["consumed_samples"] == once.pop("run.json")["consumed_samples"]
    assert often == once
    assert "going on from iteration 6" in starts[2]


def test_a_restart_goes_back_but_never_to_nothing(world: World, course: str, tmp_path: Path) -> None:
    command = [course, f"--train_iters 4 --save_interval 2 --save {tmp_path} --auto_resume"]
    straight = run(world, 1, *command)
    assert f"no checkpoint in {tmp_path} yet, beginning with initial weights" in straight
    flip(next(tmp_path.glob("iter_0000004/model/*")))
    again = run(world, 1, *command)
    assert losses(again) == losses(straight)[2:]
    assert "is damaged" not in run(world, 1, *command)
    for path in tmp_path.glob("iter_*/model/*"):
        flip(path)
    code, output = finetune(words(*command))
    assert code == 1
    assert f"no whole checkpoint in {tmp_path}: checkpoint" in output
    assert output.endswith("; to begin anew, move it away\n")


def test_nothing_to_load_is_no_start(course: str, tmp_path: Path) -> None:
    code, output = finetune(words(course, f"--train_iters 2 --load {tmp_path / 'new'} --save {tmp_path / 'new'}"))
    assert code == 1
    assert f"--load {tmp_path / 'new'}: no such folder; --auto_resume begins without one" in output
    assert not list(tmp_path.iterdir())


def test_a_crash_before_the_first_tracker_is_resumed(world: World, course: str, tmp_path: Path) -> None:
    command = [course, f"--train_iters 2 --save {tmp_path} --auto_resume"]
    run(world, 1, *command)
    (tmp_path / TRACKER).unlink()
    output = run(world, 1, *command)
    assert f"{tmp_path} has no {TRACKER}: taking {tmp_path / 'iter_0000002'}" in output
    assert losses(output) == []


def test_ranks_that_see_different_checkpoints_say_so() -> None:
    """As where `--save` is a folder of each machine's own."""
    typed = {"save": "there"}
    mesh = SimpleNamespace(gather=lambda values: [[100.0], [-1.0], [100.0]])
    with pytest.raises(CommonError, match="different checkpoints in there: of iterations none, 100"):
        verified(Start(typed, cast(Any, None), None), cast(Mesh, mesh))
