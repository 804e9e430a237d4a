"""Old checkpoints go when newer ones are whole, and only then; whatever happens meanwhile, what is kept loads."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import flip, random_state, save

from megatron.checkpoint import open_checkpoint, prune

STATE = random_state()


def saved(folder: Path, iterations: Sequence[int]) -> None:
    for iteration in iterations:
        save(folder, iteration, STATE)


def present(folder: Path) -> list[int]:
    """The iterations whose checkpoints are there; nothing else is, besides the tracker."""
    names = sorted(path.name for path in folder.iterdir() if path.name != "latest_checkpointed_iteration.txt")
    return [int(name.removeprefix("iter_")) for name in names]


@pytest.mark.parametrize(
    ("newest", "last", "every", "kept"),
    [
        (60, 1, None, [60]),
        (60, 2, None, [50, 60]),
        (60, 1, 20, [20, 40, 60]),
        (60, 2, 30, [30, 50, 60]),
        (60, 9, None, [10, 20, 30, 40, 50, 60]),
        (30, 1, None, [30, 40, 50, 60]),  # a run that went back to 20 and is at 30 now
    ],
)
def test_the_last_and_every_so_many(tmp_path: Path, newest: int, last: int, every: int | None, kept: list[int]) -> None:
    saved(tmp_path, (10, 20, 30, 40, 50, 60))
    assert prune(tmp_path, newest, last, every) == []
    assert present(tmp_path) == kept


def test_damaged_ones_do_not_count(tmp_path: Path) -> None:
    saved(tmp_path, (10, 20, 30, 40))
    flip(tmp_path / "iter_0000030" / "run.json")
    prune(tmp_path, 40, 2, None)
    assert present(tmp_path) == [20, 30, 40]


def test_what_is_not_ours_is_left(tmp_path: Path) -> None:
    """Weights that a run started from, another toolkit's checkpoints, and what a link leads to."""
    save(tmp_path / "elsewhere", 5, STATE)
    saved(tmp_path / "save", (10, 20))
    shutil.copytree(tmp_path / "save" / "iter_0000010", tmp_path / "save" / "release")
    (tmp_path / "save" / "iter_0000001" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "save" / "iter_0000005").symlink_to(tmp_path / "elsewhere" / "iter_0000005")
    assert prune(tmp_path / "save", 20, 1, None) == []
    assert {path.name for path in (tmp_path / "save").glob("[ir]*")} == {"iter_0000001", "iter_0000020", "release"}
    assert open_checkpoint(tmp_path / "elsewhere").iteration == 5


def test_what_cannot_be_removed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is out of sight, and goes before the next checkpoint."""
    saved(tmp_path, (10, 20))

    def fails(*args: Any, **options: Any) -> None:
        raise OSError("Directory not empty")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fails)
        (problem,) = prune(tmp_path, 20, 1, None)
    assert problem.startswith(
        f"warning: checkpoint {tmp_path / 'iter_0000010'} is not needed any more but could not be"
    )
    assert (tmp_path / ".iter_0000010.removed").is_dir()
    saved(tmp_path, (30,))
    assert present(tmp_path) == [20, 30]


class Crash(BaseException):
    """The power goes."""


def test_a_crash_while_removing_leaves_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, is_done = 0, False
    while not is_done:
        folder, count = tmp_path / str(count), count + 1
        saved(folder, (10, 20, 30))
        left = count

        def counted(real: Any) -> Any:
            def change(*args: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if not left:
                    raise Crash
                return real(*args, **options)

            return change

        with monkeypatch.context() as patch:
            for name in ("rename", "unlink", "rmdir"):
                patch.setattr(os, name, counted(getattr(os, name)))
            try:
                prune(folder, 30, 1, None)
                is_done = True
            except Crash:
                is_done = False
        for iteration in (path.name for path in folder.glob("iter_*")):
            assert not open_checkpoint(folder / iteration).warnings
        assert (open_checkpoint(folder).iteration, open_checkpoint(folder).warnings) == (30, ())
        saved(folder, (40,))
        assert not list(folder.glob(".*"))
    assert count > 10
