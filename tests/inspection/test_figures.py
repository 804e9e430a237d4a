"""Figures equal naive counting, and what training makes of the same data."""

import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from small_data import Row, write_documents, write_rows

from megatron.data import GlobalBatches, InstructionDataset, RowOptions, SampleStream
from megatron.data.instruction import InstructionSamples
from megatron.inspection import figures
from megatron.inspection.figures import Figures, Limit, count
from megatron.inspection.layouts import WAYS, Batching, lay_out
from megatron.inspection.report import histogram
from megatron.inspection.token_files import open_token_files
from megatron.inspection.vocabulary import Vocabulary
from megatron.tokenizer.chat import Role

VOCABULARY = Vocabulary({"vocab_size": 6, "bos_id": 1, "eod_id": 2})
LIMITS = [Limit(), Limit(4), Limit(4, drops=True)]
ROWS = st.lists(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 4)), max_size=8), min_size=1, max_size=30)


def counted(rows: list[Row], limit: Limit) -> dict[str, Any]:
    """The figures, one row and token after the other."""
    used = []
    for ids, _ in rows:
        most = len(ids) if limit.seq_length is None else limit.seq_length + 1
        used.append(min(len(ids), most) if not limit.drops or len(ids) <= most else 0)
    supervised = [sum(role == Role.ASSISTANT for role in r[1:n]) for (_, r), n in zip(rows, used, strict=True)]
    known = {(tuple(ids), tuple(roles)): i for i, (ids, roles) in reversed(list(enumerate(rows)))}
    earlier = [known[tuple(ids), tuple(roles)] for ids, roles in rows]
    repeated = [(i, first) for i, first in enumerate(earlier) if first < i and rows[i][0]]
    return {
        "rows": len(rows),
        "tokens": sum(len(ids) for ids, _ in rows),
        "tokens_per_role": [sum(list(r).count(role) for _, r in rows) for role in Role],
        "longer": sum(n < len(ids) for (ids, _), n in zip(rows, used, strict=True)),
        "unused": sum(len(ids) - n for (ids, _), n in zip(rows, used, strict=True)),
        "predicted": sum(max(n - 1, 0) for n in used),
        "supervised": sum(supervised),
        "empty": sum(not ids for ids, _ in rows),
        "unsupervised": sum(
            s == 0 and (n > 0 or not ids) for s, n, (ids, _) in zip(supervised, used, rows, strict=True)
        ),
        "duplicates": len(repeated),
        "first_duplicate": repeated[0] if repeated else None,
        "double_bos": sum(any(pair == (1, 1) for pair in pairwise(ids)) for ids, _ in rows),
        "ended": sum(bool(ids) and ids[-1] == 2 for ids, _ in rows),
        "ids": [sum(list(ids).count(i) for ids, _ in rows) for i in range(6)],
    } | {
        name: next(
            (
                (sum(value >= size for row in rows for value in row[half]), i, position, value)
                for i, row in enumerate(rows)
                for position, value in enumerate(row[half])
                if value >= size
            ),
            (0, 0, 0, 0),
        )
        for name, half, size in (("stray_ids", 0, 6), ("stray_roles", 1, len(Role)))
    }


def plain(found: Figures) -> dict[str, Any]:
    strays = {
        name: (stray.count, stray.row, stray.position, stray.value)
        for name, stray in (("stray_ids", found.stray_ids), ("stray_roles", found.stray_roles))
    }
    return vars(found) | {"ids": found.ids.tolist()} | strays


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=ROWS, limit=st.sampled_from(LIMITS), block=st.integers(1, 40))
@example(pairs=[[(1, 1)], [(1, 1)]], limit=Limit(), block=40)  # two BOS, but not of one row
def test_figures_equal_naive_counting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pairs: list[list[tuple[int, int]]], limit: Limit, block: int
) -> None:
    rows = [([i for i, _ in row], [r for _, r in row]) for row in pairs]
    monkeypatch.setattr(figures, "BLOCK_TOKENS", block)
    assert plain(count(open_token_files(write_rows(tmp_path / "rows", rows)), VOCABULARY, limit)) == counted(
        rows, limit
    )


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    write_documents(tmp_path / "text", [[1, 1, 3], [2], [], [1, 3, 1], [1, 1, 3, 2]])
    index = tmp_path / "text.idx"
    bounds = np.array([0, 2, 3, 4, 5], "<i8")  # the first two sequences are one document
    content = index.read_bytes()[: -6 * 8]
    index.write_bytes(content[:26] + np.array([5], "<u8").tobytes() + content[34:] + bounds.tobytes())
    files = open_token_files(str(tmp_path / "text"))
    found = count(files, VOCABULARY, Limit())
    assert files.lengths.tolist() == [4, 0, 3, 4]
    assert (found.rows, found.tokens, found.empty, found.ended, found.tokens_per_role) == (4, 11, 1, 2, [])
    assert (found.double_bos, found.first_duplicate) == (2, (3, 0))


@pytest.mark.parametrize("limit", LIMITS)
def test_supervised_tokens_are_those_that_training_weighs(tmp_path: Path, limit: Limit) -> None:
    rows = random_rows(40, longest=9)
    files = open_token_files(write_rows(tmp_path / "rows", rows))
    kept = np.flatnonzero(files.lengths <= 5) if limit.drops else np.arange(len(rows))
    stream = SampleStream([InstructionSamples(InstructionDataset(files.prefix), kept)], seed=0, shuffled=False)
    options = RowOptions(micro_batch_size=3, seq_length=limit.seq_length or 100)
    batch = GlobalBatches(stream=stream, rows=options, packing="padding_free").batch(0, len(rows))
    found = count(files, VOCABULARY, limit)
    assert found.supervised == sum(row.weights.sum() for row in batch.micro_batches)
    assert found.predicted == sum(row.useful_tokens for row in batch.micro_batches)


@pytest.mark.parametrize("drops", [False, True])
def test_packing_is_that_of_training(tmp_path: Path, drops: bool) -> None:
    files = open_token_files(write_rows(tmp_path / "rows", random_rows(50, longest=30)))
    limit, size, ranks = Limit(20, drops=drops), 16, 3
    options = RowOptions(micro_batch_size=2, seq_length=20, row_multiple=4, least_micro_batches=3)
    kept = np.flatnonzero(files.lengths <= 21) if drops else np.arange(len(files))
    samples = InstructionSamples(InstructionDataset(files.prefix), kept)
    found = lay_out(files.lengths, limit, Batching(options, size, ranks, seed=7))
    for (packing, changes), way in zip(WAYS.values(), found, strict=True):
        stream = SampleStream([samples], seed=7, shuffled=True)
        rows = RowOptions(**(vars(options) | changes))
        batches = [
            [
                GlobalBatches(
                    stream=stream, rows=rows, packing=packing, data_parallel_rank=rank, data_parallel_size=ranks
                )
                .batch(start, size)
                .micro_batches
                for rank in range(ranks)
            ]
            for start in range(0, len(kept), size)
        ]
        micro_batches = [row for batch in batches for mine in batch for row in mine]
        total = sum(len(row.tokens) for row in micro_batches)
        useful = [[sum(row.useful_tokens for row in mine) for mine in batch] for batch in batches]
        assert way.micro_batches == len(micro_batches) / len(batches) / ranks
        assert way.tokens == total / len(micro_batches)
        assert way.padded_share == pytest.approx(1 - sum(map(sum, useful)) / total)
        assert way.imbalance == pytest.approx(np.mean([max(row) * ranks / sum(row) - 1 for row in useful]))


def test_memory_is_that_of_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "BLOCK_TOKENS", 1 << 14)
    files = open_token_files(write_rows(tmp_path / "rows", [(np.arange(1000) % 6, np.arange(1000) % 3)] * 1000))
    tracemalloc.start()
    found = count(files, VOCABULARY, Limit(512))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (found.tokens, found.duplicates) == (1_000_000, 999)
    assert peak < 2_000_000  # the ids of all rows alone would take 8,000,000 as int64


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 100_000), min_size=1, max_size=200))
def test_bins_hold_every_row_once(lengths: list[int]) -> None:
    bins = histogram(np.array(lengths))
    assert [b.count for b in bins] == [
        sum(b.start <= length < (float("inf") if b.stop is None else b.stop) for length in lengths) for b in bins
    ]
    assert sum(b.count for b in bins) == len(lengths)
    assert len(bins) <= 17


def random_rows(count: int, longest: int) -> list[Row]:
    generator = np.random.default_rng(5)
    sizes = generator.integers(0, longest, count, endpoint=True)
    return [(generator.integers(0, 6, n).tolist(), generator.integers(0, 3, n).tolist()) for n in sizes]
