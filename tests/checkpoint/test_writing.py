"""Ranks that write together: all of them succeed, or all fail, and then nothing is left."""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny_checkpoints import contents, random_state, run_of, same, save, totals, whole

from megatron.checkpoint import Ranks, Slice, begin_checkpoint, open_checkpoint
from megatron.config import PeerError

STATE = random_state()
GIGABYTE = 10**9


def of_ranks(count: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What `work` returns or raises on each of so many ranks."""
    total = totals(count)

    def attempt(rank: int) -> Any:
        try:
            return work(Ranks(rank, count, lambda value: total(rank, value)))
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(attempt, range(count)))


def breaks() -> torch.Tensor:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("broken", [0, 1])
def test_an_error_of_one_rank_is_one_of_all(tmp_path: Path, broken: int) -> None:
    save(tmp_path, 100, STATE)

    def work(ranks: Ranks) -> Path:
        part = whole("final_norm.weight", STATE["final_norm.weight"])
        if ranks.rank == broken:
            part = Slice(part.name, part.shape, part.offsets, part.entry, breaks)
        files = {f"model/rank-{ranks.rank:05d}.safetensors": [part]}
        return begin_checkpoint(tmp_path, 200, run_of(200), files, (), ranks=ranks).complete()

    results = of_ranks(2, work)
    assert isinstance(results[broken], OSError)
    assert f"model/rank-0000{broken}.safetensors could not be written: " in str(results[broken])
    assert "No space left on device" in str(results[broken])
    assert isinstance(results[1 - broken], PeerError)
    assert {path.name for path in tmp_path.iterdir()} == {"latest_checkpointed_iteration.txt", "iter_0000100"}
    assert open_checkpoint(tmp_path).iteration == 100


def test_a_rank_may_have_nothing_to_write(tmp_path: Path) -> None:
    """As one whose share of every tensor is empty."""

    def work(ranks: Ranks) -> Path:
        parts = [whole(name, tensor) for name, tensor in STATE.items()] if ranks.rank == 1 else []
        return begin_checkpoint(
            tmp_path, 100, run_of(100), {f"model/{ranks.rank}.safetensors": parts}, (), ranks=ranks
        ).complete()

    assert of_ranks(3, work) == [tmp_path / "iter_0000100"] * 3
    assert same(contents(open_checkpoint(tmp_path).weights), STATE)


class Usage(NamedTuple):
    """Of a disk."""

    total: int
    used: int
    free: int


def test_room_is_asked_for_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum over all ranks counts; the slices are not even asked for."""
    save(tmp_path, 100, STATE)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(9 * GIGABYTE, 8 * GIGABYTE, GIGABYTE))

    def work(size: int, ranks: Ranks) -> Any:
        entry = whole("final_norm.weight", torch.empty(size // 4, device="meta"))
        files = {f"model/{ranks.rank}.safetensors": [entry]}
        return begin_checkpoint(tmp_path, 200, run_of(200), files, (), ranks=ranks)

    main, other = of_ranks(2, lambda ranks: work(GIGABYTE * 3 // 5, ranks))
    assert str(main) == (
        f"{tmp_path / 'iter_0000200'}: the checkpoint needs 1.20 GB, and 1.00 GB are free; make room, or keep fewer "
        "checkpoints by --keep_last"
    )
    assert isinstance(other, PeerError)
    assert {path.name for path in tmp_path.iterdir()} == {"latest_checkpointed_iteration.txt", "iter_0000100"}
    assert not any(isinstance(result, Exception) for result in of_ranks(2, lambda ranks: work(GIGABYTE // 2, ranks)))


def test_a_folder_that_ranks_do_not_share_is_noticed(tmp_path: Path) -> None:
    def work(ranks: Ranks) -> Path:
        files = {"model/a.safetensors": [whole("final_norm.weight", STATE["final_norm.weight"])]}
        folder = tmp_path / f"machine-{ranks.rank}"
        (folder / ".iter_0000100.tmp").mkdir(parents=True, exist_ok=ranks.rank == 1)
        return begin_checkpoint(folder, 100, run_of(100), files, (), ranks=ranks).complete()

    main, _ = of_ranks(2, work)
    assert "has no files of rank 1; is --save the same folder on every machine?" in str(main)


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> torch.Tensor:
        raise KeyboardInterrupt

    part = whole("final_norm.weight", STATE["final_norm.weight"])
    files = {"model/a.safetensors": [Slice(part.name, part.shape, part.offsets, part.entry, interrupted)]}
    with pytest.raises(KeyboardInterrupt):
        begin_checkpoint(tmp_path, None, run_of(0), files, ()).complete()
    assert list(tmp_path.iterdir()) == []
