"""A checkpoint is whole or not there, whatever happens while it is written; damage is found, named and passed over."""

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import contents, flip, random_state, run_of, same, save, whole

from megatron.checkpoint import begin_checkpoint, open_checkpoint
from megatron.checkpoint.integrity import check_folder

TRACKER = "latest_checkpointed_iteration.txt"
OLD, NEW = random_state(1), random_state(2)


def loads(folder: Path, state: dict[str, Any], iteration: int | None = None) -> bool:
    """Whether the checkpoint that opens holds this state, of weights and optimizer."""
    checkpoint = open_checkpoint(folder, iteration)
    assert checkpoint.optimizer
    doubled = {f"exp_avg.{name}": 2 * tensor for name, tensor in state.items()}
    return same(contents(checkpoint.weights), state) and same(contents(checkpoint.optimizer), doubled)


@pytest.mark.parametrize("ranks", [1, 3])
def test_what_is_saved_is_loaded(tmp_path: Path, ranks: int) -> None:
    folder = save(tmp_path, 100, NEW, ranks)
    assert loads(tmp_path, NEW)
    assert loads(folder, NEW)
    assert (tmp_path / TRACKER).read_text() == "100\n"
    assert {path.name for path in tmp_path.iterdir()} == {TRACKER, "iter_0000100"}
    checkpoint = open_checkpoint(tmp_path)
    assert (checkpoint.iteration, checkpoint.vocab_size, checkpoint.warnings) == (100, 37, ())
    assert checkpoint.run == json.loads(json.dumps(run_of(100)))
    stored = checkpoint.stored_options()
    assert (stored["rope_theta"], stored["seq_length"], stored["tensor_model_parallel_size"]) == (5000.0, 8, 2)


def test_manifest_lists_every_other_file(tmp_path: Path) -> None:
    folder = save(tmp_path, 100, NEW, ranks=2)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == files - {"manifest.json"}
    check_folder(folder, reads_all=True)
    for name, expected in manifest["files"].items():
        assert expected["size"] == (folder / name).stat().st_size


@pytest.mark.parametrize("meeting", [1, 2, 3])
def test_dying_where_ranks_meet_leaves_the_previous(tmp_path: Path, meeting: int) -> None:
    save(tmp_path, 100, OLD)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 200, NEW, ranks=2, dies_at_meeting=meeting)
    assert loads(tmp_path, OLD)
    save(tmp_path, 200, NEW)
    assert loads(tmp_path, NEW)
    assert {path.name for path in tmp_path.iterdir()} == {TRACKER, "iter_0000100", "iter_0000200"}


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def slices() -> Iterator[Any]:
        yield whole("final_norm.weight", NEW["final_norm.weight"])
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        begin_checkpoint(tmp_path, 100, run_of(100), {"model/a.safetensors": slices()}, ()).complete()
    assert list(tmp_path.iterdir()) == []


class Crash(BaseException):
    """The power goes: nothing after it is done, no clean-up either."""


CHANGES = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync")
"""Functions of `os` through which a save changes the disk."""


def save_until(patch: pytest.MonkeyPatch, count: int, folder: Path, iteration: int) -> bool:
    """Save `NEW`, with a crash at the `count`-th change of the disk; whether the save came to its end."""
    calls = itertools.count(1)

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def change(*args: Any, **options: Any) -> Any:
            if next(calls) >= count:
                raise Crash
            return real(*args, **options)

        return change

    for name in CHANGES:
        patch.setattr(os, name, counted(getattr(os, name)))
    try:
        save(folder, iteration, NEW)
    except Crash:
        return False
    return True


@pytest.mark.parametrize("iteration", [100, 200])
def test_a_crash_at_any_instant_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, iteration: int
) -> None:
    """Also where the only checkpoint there is gets written again."""
    is_done, loaded = False, []
    for count in itertools.count(1):
        folder = tmp_path / str(count)
        save(folder, 100, OLD)
        with monkeypatch.context() as patch:
            is_done = save_until(patch, count, folder, iteration)
        loaded.append("old" if loads(folder, OLD) else "new")
        assert loaded[-1] == "old" or loads(folder, NEW)
        save(folder, iteration, NEW)
        assert loads(folder, NEW)
        assert not list(folder.glob(".*"))
        if is_done:
            break
    assert len(loaded) > 15  # that the crashes did happen, at places before and after the change
    assert loaded == sorted(loaded, reverse=True)
    assert set(loaded) == {"old", "new"}


def test_the_only_copy_survives_a_second_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First between the two renames that replace a checkpoint, then early in the next save."""
    folder = save(tmp_path, 100, OLD)
    folder.rename(tmp_path / ".iter_0000100.old")
    assert loads(tmp_path, OLD)
    with monkeypatch.context() as patch:
        assert not save_until(patch, 4, tmp_path, 200)
    assert loads(tmp_path, OLD)
    assert open_checkpoint(tmp_path).folder == folder


def test_another_toolkits_folder_without_a_tracker_names_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "iter_0000100" / "mp_rank_00").mkdir(parents=True)
    with pytest.raises(ValueError, match="to load iter_0000100 in it, name that folder"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "\n", "-5", "1e3", "200.0", "release 2", "\0", "²", "../iter_0000100", "9" * 300])
def test_a_tracker_of_nonsense_is_quoted(tmp_path: Path, text: str) -> None:
    save(tmp_path, 100, OLD)
    (tmp_path / TRACKER).write_text(text)
    with pytest.raises(ValueError, match=f"{TRACKER} says .*; it should be an iteration's number or 'release'"):
        open_checkpoint(tmp_path)


def test_no_whole_one_is_left(tmp_path: Path) -> None:
    for iteration in (100, 200):
        (save(tmp_path, iteration, NEW) / "run.json").unlink()
    with pytest.raises(ValueError, match=r"no whole checkpoint in .*iter_0000200.*; .*iter_0000100"):
        open_checkpoint(tmp_path)


def test_a_tracker_that_names_a_missing_folder(tmp_path: Path) -> None:
    save(tmp_path, 100, OLD)
    (tmp_path / TRACKER).write_text("300")
    assert loads(tmp_path, OLD)
    assert "iter_0000300 is missing; going back" in open_checkpoint(tmp_path).warnings[0]
    shutil.rmtree(tmp_path / "iter_0000100")
    with pytest.raises(ValueError, match=r"no whole checkpoint in .*iter_0000300 is missing"):
        open_checkpoint(tmp_path)


def test_newest_is_by_number_and_a_chosen_one_is_that_one(tmp_path: Path) -> None:
    save(tmp_path, 9_999_999, OLD)
    save(tmp_path, 10_000_000, NEW)
    (tmp_path / "iter_notes").mkdir()
    (tmp_path / TRACKER).write_text("12000000")
    assert loads(tmp_path, NEW)
    assert loads(tmp_path, OLD, 9_999_999)
    with pytest.raises(ValueError, match="no checkpoint of iteration 5; there are: iter_9999999, iter_10000000"):
        open_checkpoint(tmp_path, 5)
    with pytest.raises(ValueError, match="is of iteration 9999999, not 5"):
        open_checkpoint(tmp_path / "iter_9999999", 5)


def test_without_a_tracker_the_newest_whole_one_is_taken(tmp_path: Path) -> None:
    """As after a crash between the first checkpoint and its tracker."""
    save(tmp_path, 100, OLD)
    flip(save(tmp_path, 200, NEW) / "run.json")
    (tmp_path / TRACKER).unlink()
    assert loads(tmp_path, OLD)
    without, damaged = open_checkpoint(tmp_path).warnings
    assert without == f"{tmp_path} has no {TRACKER}: taking {tmp_path / 'iter_0000100'}"
    assert "iter_0000200 is damaged" in damaged


def test_a_stray_file_of_weights_is_found(tmp_path: Path) -> None:
    """One that the manifest does not know, as after copying two checkpoints into one folder."""
    folder = save(tmp_path, 100, OLD, ranks=2)
    shutil.copyfile(folder / "model" / "rank-00000.safetensors", folder / "model" / "rank-00002.safetensors")
    with pytest.raises(ValueError, match=r"model/rank-00002\.safetensors does not belong to the checkpoint"):
        open_checkpoint(tmp_path)
