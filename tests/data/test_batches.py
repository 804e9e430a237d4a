"""Micro batches, global batches, and the data that options ask for."""

from pathlib import Path

import numpy as np
import pytest

from megatron.config import DataConfig, UsageError
from megatron.data import (
    GlobalBatch,
    IndexedWriter,
    InstructionBatches,
    InstructionDataset,
    MicroBatch,
    RowOptions,
    build_instruction_splits,
)
from megatron.data.batch import padded_rows

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


def sample(length: int, role: int = 2) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(10, 10 + length), np.full(length, role)


def test_layout_of_padded_rows() -> None:
    tokens, roles = np.array([1, 2, 3, 4, 5]), np.array([1, 1, 2, 2, 0])
    batch = padded_rows([(tokens, roles), sample(3)], rows(seq_length=6, scalar_loss_mask=0.25, row_multiple=8))
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


@pytest.mark.parametrize("length", [0, 1])
def test_nothing_to_predict(length: int) -> None:
    batch = padded_rows([sample(length)], rows(seq_length=4))
    assert batch.tokens.tolist() == [PAD] * 4
    assert batch.weights.sum() == 0
    assert batch.useful_tokens == 0


def test_padding_is_found_by_length_not_by_id() -> None:
    tokens = np.full(5, PAD)
    assert padded_rows([(tokens, np.full(5, 2))], rows(seq_length=6)).weights.tolist() == [1, 1, 1, 1, 0, 0]


def test_no_samples_give_an_ignored_row() -> None:
    batch = padded_rows([], rows(row_multiple=4))
    assert batch.tokens.tolist() == [PAD] * 4
    assert batch.weights.tolist() == [0] * 4
    assert (batch.cu_seqlens.tolist(), batch.max_seqlen, batch.useful_tokens) == ([0, 4], 4, 0)


def build(
    dataset: InstructionDataset, *, size: int, ranks: int, rank: int, shuffled: bool = True
) -> InstructionBatches:
    return InstructionBatches(
        dataset=dataset,
        indices=np.arange(len(dataset)),
        rows=rows(micro_batch_size=size),
        data_parallel_rank=rank,
        data_parallel_size=ranks,
        shuffled=shuffled,
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
        assert all(share.sample_indices.tolist() == whole.sample_indices.tolist() for share in shares)
        assert len({len(share.micro_batches) for share in shares}) == 1
        found = [label for share in shares for micro in share.micro_batches for label in supervised(micro)]
        assert sorted(found) == expected
        assert {share.truncated for share in shares} == {whole.truncated}


def test_who_gets_which(dataset: InstructionDataset) -> None:
    shares = parts(dataset, 2, 2, 0, shuffled=False)
    firsts = [[micro.tokens[micro.cu_seqlens[:-1]].tolist() for micro in share.micro_batches] for share in shares]
    assert firsts == [[[0, 100], [400, 500]], [[200, 300], [600, 700]]]


def test_truncated_counts_the_global_batch(dataset: InstructionDataset) -> None:
    assert build(dataset, size=2, ranks=2, rank=0, shuffled=False).batch(0, 13).truncated == 1


def test_last_partial_batch_of_a_pass(dataset: InstructionDataset) -> None:
    shares = parts(dataset, 2, 3, 8, shuffled=False)
    assert shares[0].sample_indices.tolist() == [8, 9, 10, 11, 12]
    assert [len(share.micro_batches) for share in shares] == [1, 1, 1]
    assert [share.micro_batches[0].useful_tokens for share in shares] == [3 + 32, 5 + 7, 0]
    beyond = build(dataset, size=2, ranks=3, rank=2, shuffled=False).batch(8, 2).micro_batches
    assert beyond[0].cu_seqlens.tolist() == [0, 1]
    assert build(dataset, size=2, ranks=3, rank=2, shuffled=False).batch(13, 2).micro_batches == []


def test_subset_of_rows(dataset: InstructionDataset) -> None:
    batches = InstructionBatches(dataset=dataset, indices=np.array([3, 5, 8]), rows=rows())
    seen = batches.batch(0, 6).sample_indices.tolist()
    assert sorted(seen) == [3, 3, 5, 5, 8, 8]
    assert len(batches) == 3


def equal(a: GlobalBatch, b: GlobalBatch) -> bool:
    return all(
        np.array_equal(getattr(x, name), getattr(y, name))
        for x, y in zip(a.micro_batches, b.micro_batches, strict=True)
        for name in ("tokens", "labels", "weights", "positions", "cu_seqlens")
    )


def test_prefetching_changes_nothing(dataset: InstructionDataset) -> None:
    options = {"dataset": dataset, "indices": np.arange(len(dataset)), "rows": rows()}
    plain, ahead = InstructionBatches(**options), InstructionBatches(**options, prefetching=True)
    for consumed, size in ((0, 4), (4, 4), (8, 6), (14, 6), (3, 2), (5, 2)):
        assert equal(plain.batch(consumed, size), ahead.batch(consumed, size))


def test_prefetching_passes_errors_on(dataset: InstructionDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = InstructionBatches(dataset=dataset, indices=np.arange(len(dataset)), rows=rows(), prefetching=True)

    def fail(*_: object) -> None:
        raise OSError("disk gone")

    monkeypatch.setattr(InstructionDataset, "__getitem__", fail)
    for _ in range(2):
        with pytest.raises(OSError, match="disk gone"):
            batches.batch(0, 4)


def test_splits_of_one_path(tmp_path: Path) -> None:
    write_rows(tmp_path / "all", [3] * 100)
    splits = build_instruction_splits(DataConfig(data_path=(str(tmp_path / "all"),), split="90,10,0"))
    assert splits.require("train").indices.tolist() == list(range(90))
    assert splits.require("valid").indices.tolist() == list(range(90, 100))
    assert splits.test is None
    with pytest.raises(UsageError, match="no test data: --split '90,10,0' leaves none of the 100 rows"):
        splits.require("test")


def test_separate_paths(tmp_path: Path) -> None:
    write_rows(tmp_path / "a", [3] * 4)
    write_rows(tmp_path / "b", [3] * 2)
    splits = build_instruction_splits(
        DataConfig(train_data_path=(str(tmp_path / "a"),), test_data_path=(str(tmp_path / "b"),))
    )
    assert (len(splits.require("train").indices), len(splits.require("test").indices)) == (4, 2)
    with pytest.raises(UsageError, match="no valid data: only --train_data_path, --test_data_path given"):
        splits.require("valid")


def test_mistakes_in_paths(tmp_path: Path) -> None:
    write_rows(tmp_path / "a", [3])
    with pytest.raises(UsageError, match="no data: give --data_path"):
        build_instruction_splits(DataConfig())
    with pytest.raises(UsageError, match="--data_path and --valid_data_path exclude"):
        build_instruction_splits(DataConfig(data_path=("a",), valid_data_path=("b",)))
    with pytest.raises(UsageError, match="blends"):
        build_instruction_splits(
            DataConfig(
                data_path=(
                    "0.5",
                    "a",
                    "0.5",
                    "b",
                )
            )
        )
    (tmp_path / "a-role.idx").unlink()
    with pytest.raises(UsageError, match=r"--data_path \S*a: no such file: \S*a-role\.idx; .*without -text"):
        build_instruction_splits(DataConfig(data_path=(str(tmp_path / "a"),)))
