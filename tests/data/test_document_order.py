"""The order of documents is kept beside the data: whole, for its content, and by whoever comes first."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron.data import document_order
from megatron.data.document_order import DocumentOrder, DocumentOrders, build_order
from megatron.data.publish import Partial

LENGTHS = np.random.default_rng(0).integers(0, 9, 500).astype(np.int32)


def orders(folder: Path, lengths: np.ndarray = LENGTHS, seed: int = 1) -> DocumentOrders:
    return DocumentOrders(lambda: lengths, seed, folder / "text")


def same(first: DocumentOrder, second: DocumentOrder) -> bool:
    return np.array_equal(first.documents, second.documents) and np.array_equal(first.starts, second.starts)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail(*_: object) -> None:
    raise AssertionError("built again")


def test_built_once_and_found_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = orders(tmp_path).epoch(0)
    assert same(first, build_order(LENGTHS, 1, 0))
    assert files(tmp_path) == [orders(tmp_path).file(0).name]
    monkeypatch.setattr(document_order, "build_order", fail)
    assert same(orders(tmp_path).epoch(0), first)


def test_the_file_of_the_epoch_before_stays(tmp_path: Path) -> None:
    """Other ranks may be there still; the one before that is removed."""
    kept = orders(tmp_path)
    for epoch in range(4):
        assert same(kept.epoch(epoch), build_order(LENGTHS, 1, epoch))
        assert files(tmp_path) == [kept.file(one).name for one in range(max(epoch - 1, 0), epoch + 1)]
    assert same(kept.epoch(2), build_order(LENGTHS, 1, 2))


def test_two_epochs_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch may need both."""
    kept = orders(tmp_path)
    first, second = kept.epoch(0), kept.epoch(1)
    monkeypatch.setattr(document_order, "build_order", fail)
    assert (kept.epoch(0), kept.epoch(1)) == (first, second)


def longer(lengths: np.ndarray) -> np.ndarray:
    return np.append(lengths, np.int32(3))


def other(lengths: np.ndarray) -> np.ndarray:
    """The same number of documents and of tokens."""
    return lengths[::-1].copy()


@pytest.mark.parametrize("change", [longer, other])
def test_other_documents_have_another_order(tmp_path: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    orders(tmp_path).epoch(0)
    changed = change(LENGTHS)
    assert same(orders(tmp_path, changed).epoch(0), build_order(changed, 1, 0))
    assert same(orders(tmp_path, seed=2).epoch(0), build_order(LENGTHS, 2, 0))
    assert len(files(tmp_path)) == 3


def cut(data: bytes) -> bytes:
    return data[:-8]


def zeros(data: bytes) -> bytes:
    """The values, behind a header of 128 bytes, never reached the disk."""
    return data[:128] + bytes(len(data) - 128)


@pytest.mark.parametrize(
    "damage", [lambda data: b"", cut, lambda data: data[:50], lambda data: b"x" * len(data), zeros]
)
def test_a_damaged_file_is_made_again(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    orders(tmp_path).epoch(0)
    path = orders(tmp_path).file(0)
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(damage(whole))
    assert same(orders(tmp_path).epoch(0), build_order(LENGTHS, 1, 0))
    assert path.read_bytes() == whole


@pytest.mark.parametrize("failing", ["megatron.data.document_order.Partial", "os.fsync", "os.replace"])
def test_where_no_file_can_be_written_it_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(failing, full)
    assert same(orders(tmp_path).epoch(0), build_order(LENGTHS, 1, 0))
    assert files(tmp_path) == []


def test_a_folder_that_is_not_writable_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert orders(tmp_path).note == ""
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert orders(tmp_path).note == f"{tmp_path} is not writable: every rank keeps the order of its documents in memory"


def test_while_another_rank_writes_it_is_in_memory(tmp_path: Path) -> None:
    kept = orders(tmp_path)
    other = Partial(kept.file(0))
    assert same(kept.epoch(0), build_order(LENGTHS, 1, 0))
    assert not kept.file(0).exists()
    os.utime(next(tmp_path.iterdir()), (0, 0))  # it was left behind by a crash
    assert same(orders(tmp_path).epoch(0), build_order(LENGTHS, 1, 0))
    assert files(tmp_path) == [kept.file(0).name]
    other.discard()


def open_at_once(folder: Path, barrier: object, results: object) -> None:
    """What a rank does: wait for the others, then open."""
    barrier.wait()  # type: ignore[attr-defined]
    order = orders(folder).epoch(0)
    results.put((order.documents.tolist(), order.starts.tolist()))  # type: ignore[attr-defined]


def test_many_ranks_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(6), context.Queue()
    ranks = [context.Process(target=open_at_once, args=(tmp_path, barrier, results)) for _ in range(6)]
    for rank in ranks:
        rank.start()
    found = [results.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join()
    expected = build_order(LENGTHS, 1, 0)
    assert found == [(expected.documents.tolist(), expected.starts.tolist())] * 6
    assert files(tmp_path) == [orders(tmp_path).file(0).name]
