"""Padding-free batches: whole samples, none padded, and an even share of tokens for every rank."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_golden import run as preprocess_real_data

from megatron.data import GlobalBatches, InstructionDataset, RowOptions, Sample, SampleStream
from megatron.data.batch import packed_rows
from megatron.data.instruction import InstructionSamples
from megatron.data.packing import deal_by_tokens

PAD = 99


def rows(**options: object) -> RowOptions:
    return RowOptions(**({"micro_batch_size": 2, "seq_length": 16, "pad_id": PAD} | options))  # type: ignore[arg-type]


def test_layout_of_packed_rows() -> None:
    samples = [
        Sample(np.array([1, 2, 3, 4, 5]), np.array([0.25, 1, 1, 0.25], np.float32)),
        Sample(np.array([7]), np.empty(0, np.float32)),
        Sample(np.arange(10, 30), np.ones(19, np.float32)),
    ]
    batch = packed_rows(samples, rows(seq_length=6, row_multiple=4))
    assert batch.tokens.tolist() == [1, 2, 3, 4, 10, 11, 12, 13, 14, 15, PAD, PAD]
    assert batch.labels.tolist() == [2, 3, 4, 5, 11, 12, 13, 14, 15, 16, PAD, PAD]
    assert batch.weights.tolist() == [0.25, 1, 1, 0.25, 1, 1, 1, 1, 1, 1, 0, 0]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 4, 10, 12]
    assert (batch.max_seqlen, batch.useful_tokens) == (6, 10)
    assert batch.weights.dtype == np.float32
    assert batch.cu_seqlens.dtype == np.int32


@pytest.mark.parametrize("lengths", [[], [1, 0, 1]])
def test_nothing_to_predict_is_an_ignored_row(lengths: list[int]) -> None:
    batch = packed_rows([Sample(np.arange(n), np.ones(max(n - 1, 0))) for n in lengths], rows(row_multiple=4))
    assert batch.tokens.tolist() == [PAD] * 4
    assert (batch.weights.sum(), batch.useful_tokens) == (0, 0)


@settings(deadline=None, max_examples=200)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=40),
    ranks=st.integers(1, 5),
    micro_batch_size=st.integers(1, 4),
    least=st.integers(1, 8),
)
def test_every_sample_once_and_rows_within_their_bound(
    lengths: list[int], ranks: int, micro_batch_size: int, least: int
) -> None:
    options = rows(micro_batch_size=micro_batch_size, least_micro_batches=least)
    dealt = deal_by_tokens(np.array(lengths, np.int32), options, ranks)
    sizes = options.input_tokens(np.array(lengths, np.int32))
    assert len(dealt) == ranks
    assert len({len(micro_batches) for micro_batches in dealt}) == 1
    positions = [int(p) for micro_batches in dealt for row in micro_batches for p in row]
    assert sorted(positions) == list(range(len(lengths)))
    assert all(sizes[row].sum() <= micro_batch_size * 16 for micro_batches in dealt for row in micro_batches)
    count, samples = len(dealt[0]), [sum(map(len, micro_batches)) for micro_batches in dealt]
    assert count >= min(least, *samples)
    totals = [sum(int(sizes[row].sum()) for row in micro_batches) for micro_batches in dealt]
    assert max(totals) - min(totals) <= sizes.max(initial=0)  # the bound of longest-first dealing


def test_a_micro_batch_holds_as_much_as_it_may() -> None:
    dealt = deal_by_tokens(np.full(12, 9, np.int32), rows(micro_batch_size=2, seq_length=16), 2)
    assert [[len(row) for row in micro_batches] for micro_batches in dealt] == [[3, 3], [3, 3]]


def waste(dataset: InstructionDataset, packing: str) -> tuple[float, float]:
    """(share of computed tokens that is padding, imbalance over 4 ranks) of 100 global batches of 64, on average."""
    options = RowOptions(micro_batch_size=4, seq_length=512, variable_seq_lengths=True)
    ranks = [
        GlobalBatches(
            stream=SampleStream([InstructionSamples(dataset, np.arange(len(dataset)))], seed=1234, shuffled=True),
            rows=options,
            packing=packing,
            data_parallel_rank=rank,
            data_parallel_size=4,
        )
        for rank in range(4)
    ]
    padded, imbalances = [], []
    for number in range(100):
        batches = [rank.batch(64 * number, 64).micro_batches for rank in ranks]
        computed = np.array([sum(len(rows.tokens) for rows in micro_batches) for micro_batches in batches])
        useful = sum(rows.useful_tokens for micro_batches in batches for rows in micro_batches)
        padded.append(1 - useful / computed.sum())
        imbalances.append(computed.max() / computed.mean() - 1)
    return float(np.mean(padded)), float(np.mean(imbalances))


def test_real_data_wastes_next_to_nothing(shared_data: Path, tmp_path: Path) -> None:
    preprocess_real_data(shared_data, shared_data / "data" / "cot_train.jsonl", tmp_path / "cot")
    dataset = InstructionDataset(tmp_path / "cot")
    packed, unpacked = (waste(dataset, packing) for packing in ("padding_free", "none"))
    print(f"padded share, imbalance: padding_free {packed}, none {unpacked}")
    assert packed[0] <= 0.02
    assert packed[1] < 0.05
    assert unpacked[0] > 0.2  # what the reference's layout computes for nothing
