"""Micro batches, global batches, and the data that options ask for."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron.data import (
    GlobalBatch,
    GlobalBatches,
    IndexedWriter,
    InstructionDataset,
    MicroBatch,
    RowOptions,
    Sample,
    SampleStream,
)
from megatron.data.batch import packed_rows, padded_rows
from megatron.data.instruction import InstructionSamples
from megatron.data.plan import Prefetcher

PAD = 99


def write_rows(prefix: Path, lengths: list[int]) -> None:
    """Row i has tokens 100 * i, 100 * i + 1, ...; roles go round."""
    with IndexedWriter(f"{prefix}-text", "<i4") as text, IndexedWriter(f"{prefix}-role", "<u2") as role:
        for row, length in enumerate(lengths):
            text.append(np.arange(length, dtype="<i4") + 100 * row)
            role.append((np.arange(length) % 3).astype("<u2"))


@pytest.fixture
def dataset(tmp_path: Path) -> InstructionDataset:
    write_rows(tmp_path / "rows", [5, 20, 2, 33, 7, 9, 18, 3, 4, 40, 6, 8, 1])
    return InstructionDataset(tmp_path / "rows")


def rows(**options: object) -> RowOptions:
    return RowOptions(**({"micro_batch_size": 2, "seq_length": 32, "pad_id": PAD} | options))  # type: ignore[arg-type]


def sample(length: int) -> Sample:
    return Sample(np.arange(10, 10 + length), np.ones(max(length - 1, 0), np.float32))


def test_layout_of_padded_rows() -> None:
    weighted = Sample(np.array([1, 2, 3, 4, 5]), np.array([0.25, 1, 1, 0.25], np.float32))
    batch = padded_rows([weighted, sample(3)], rows(seq_length=6, row_multiple=8))
    assert batch.tokens.tolist() == [1, 2, 3, 4, PAD, PAD, 10, 11, PAD, PAD, PAD, PAD, PAD, PAD, PAD, PAD]
    assert batch.labels.tolist() == [2, 3, 4, 5, PAD, PAD, 11, 12, PAD, PAD, PAD, PAD, PAD, PAD, PAD, PAD]
    assert batch.weights.tolist() == [0.25, 1, 1, 0.25, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    assert batch.cu_seqlens.tolist() == [0, 6, 12, 16]
    assert (batch.max_seqlen, batch.useful_tokens) == (6, 6)
    dtypes = [array.dtype for array in (batch.tokens, batch.labels, batch.positions, batch.weights, batch.cu_seqlens)]
    assert dtypes == [np.int64, np.int64, np.int64, np.float32, np.int32]


@pytest.mark.parametrize(
    ("longest", "variable", "length"),
    [(3, False, 40), (3, True, 16), (16, True, 16), (17, True, 32), (33, True, 40), (90, True, 40), (1, True, 16)],
)
def test_row_length(longest: int, variable: bool, length: int) -> None:
    batch = padded_rows([sample(2), sample(longest)], rows(seq_length=40, variable_seq_lengths=variable))
    assert batch.cu_seqlens.tolist() == [0, length, 2 * length]


def test_a_long_sample_is_cut_to_seq_length_inputs() -> None:
    batch = padded_rows([sample(50)], rows(seq_length=8))
    assert batch.tokens.tolist() == list(range(10, 18))
    assert batch.labels.tolist() == list(range(11, 19))
    assert batch.useful_tokens == 8


@pytest.mark.parametrize("layout", [padded_rows, packed_rows])
def test_documents_of_a_sample(layout: Callable[..., MicroBatch]) -> None:
    """One that begins with the last token, which is only predicted, or behind the cut, has no inputs."""
    starts = np.array([0, 2, 4, 6])
    whole = Sample(np.arange(7), np.ones(6, np.float32), document_starts=starts, position_starts=starts[:2])
    batch = layout([whole, whole], rows(seq_length=6))
    assert batch.cu_seqlens.tolist() == [0, 2, 4, 6, 8, 10, 12]
    assert batch.positions.tolist() == 2 * [0, 1, 0, 1, 2, 3]
    assert batch.max_seqlen == 2
    assert layout([whole, whole], rows(seq_length=4)).cu_seqlens.tolist() == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("length", [0, 1])
def test_nothing_to_predict(length: int) -> None:
    batch = padded_rows([sample(length)], rows(seq_length=4))
    assert batch.tokens.tolist() == [PAD] * 4
    assert batch.weights.sum() == 0
    assert batch.useful_tokens == 0


def test_padding_is_found_by_length_not_by_id() -> None:
    assert padded_rows([Sample(np.full(5, PAD), np.ones(4, np.float32))], rows(seq_length=6)).weights.tolist() == [
        1,
        1,
        1,
        1,
        0,
        0,
    ]


def test_no_samples_give_an_ignored_row() -> None:
    batch = padded_rows([], rows(row_multiple=4))
    assert batch.tokens.tolist() == [PAD] * 4
    assert batch.weights.tolist() == [0] * 4
    assert (batch.cu_seqlens.tolist(), batch.max_seqlen, batch.useful_tokens) == ([0, 4], 4, 0)


def stream(dataset: InstructionDataset, *, shuffled: bool = True) -> SampleStream:
    return SampleStream([InstructionSamples(dataset, np.arange(len(dataset)))], seed=1234, shuffled=shuffled)


def build(dataset: InstructionDataset, *, size: int, ranks: int, rank: int, shuffled: bool = True) -> GlobalBatches:
    return GlobalBatches(
        stream=stream(dataset, shuffled=shuffled),
        rows=rows(micro_batch_size=size),
        data_parallel_rank=rank,
        data_parallel_size=ranks,
    )


def supervised(batch: MicroBatch) -> list[tuple[int, float]]:
    return [(int(i), float(w)) for i, w in zip(batch.labels, batch.weights, strict=True) if w]


def parts(dataset: InstructionDataset, size: int, ranks: int, consumed: int, **options: bool) -> list[GlobalBatch]:
    return [
        build(dataset, size=size, ranks=ranks, rank=rank, **options).batch(consumed, 12 if consumed else 8)
        for rank in range(ranks)
    ]


@pytest.mark.parametrize("consumed", [0, 8])
def test_same_samples_on_any_layout(dataset: InstructionDataset, consumed: int) -> None:
    (whole,) = parts(dataset, 1, 1, consumed)
    expected = sorted(label for micro in whole.micro_batches for label in supervised(micro))
    for size, ranks in ((1, 2), (2, 1), (2, 2), (4, 1), (4, 2), (1, 4), (3, 2), (5, 3)):
        shares = parts(dataset, size, ranks, consumed)
        assert all(share.samples.tolist() == whole.samples.tolist() for share in shares)
        assert len({len(share.micro_batches) for share in shares}) == 1
        found = [label for share in shares for micro in share.micro_batches for label in supervised(micro)]
        assert sorted(found) == expected


def test_who_gets_which(dataset: InstructionDataset) -> None:
    shares = parts(dataset, 2, 2, 0, shuffled=False)
    firsts = [[micro.tokens[micro.cu_seqlens[:-1]].tolist() for micro in share.micro_batches] for share in shares]
    assert firsts == [[[0, 100], [400, 500]], [[200, 300], [600, 700]]]


def test_last_partial_batch_of_a_pass(dataset: InstructionDataset) -> None:
    shares = parts(dataset, 2, 3, 8, shuffled=False)
    assert shares[0].samples.tolist() == [[0, row] for row in range(8, 13)]
    assert [len(share.micro_batches) for share in shares] == [1, 1, 1]
    assert [share.micro_batches[0].useful_tokens for share in shares] == [3 + 32, 5 + 7, 0]
    beyond = build(dataset, size=2, ranks=3, rank=2, shuffled=False).batch(8, 2).micro_batches
    assert beyond[0].cu_seqlens.tolist() == [0, 1]
    assert build(dataset, size=2, ranks=3, rank=2, shuffled=False).batch(13, 2).micro_batches == []


def test_subset_of_rows(dataset: InstructionDataset) -> None:
    some = InstructionSamples(dataset, np.array([3, 5, 8]))
    batch = GlobalBatches(stream=SampleStream([some], seed=1, shuffled=True), rows=rows()).batch(0, 6)
    assert sorted(batch.samples.tolist()) == [[0, number] for number in range(6)]
    firsts = [int(token) for micro in batch.micro_batches for token in micro.tokens[micro.cu_seqlens[:-1]]]
    assert sorted(firsts) == [300, 300, 500, 500, 800, 800]


def equal(a: GlobalBatch, b: GlobalBatch) -> bool:
    return all(
        np.array_equal(getattr(x, name), getattr(y, name))
        for x, y in zip(a.micro_batches, b.micro_batches, strict=True)
        for name in ("tokens", "labels", "weights", "positions", "cu_seqlens")
    )


def test_prefetching_changes_nothing(dataset: InstructionDataset) -> None:
    plain, ahead = (
        GlobalBatches(stream=stream(dataset), rows=rows(), prefetching=prefetching) for prefetching in (False, True)
    )
    for consumed, size in ((0, 4), (4, 4), (8, 6), (14, 6), (3, 2), (5, 2)):
        assert equal(plain.batch(consumed, size), ahead.batch(consumed, size))


def test_the_next_batch_is_built_ahead() -> None:
    built: list[tuple[int, int]] = []
    prefetcher = Prefetcher(lambda *wanted: built.append(wanted))  # type: ignore[arg-type,return-value]
    for start in (0, 4, 8):
        prefetcher.get(start, 4)
    assert built[:3] == [(0, 4), (4, 4), (8, 4)]


def test_prefetching_passes_errors_on(dataset: InstructionDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = GlobalBatches(stream=stream(dataset), rows=rows(), prefetching=True)

    def fail(*_: object) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr(InstructionDataset, "__getitem__", fail)
    for _ in range(2):
        with pytest.raises(OSError, match="disk gone"):
            batches.batch(0, 4)
