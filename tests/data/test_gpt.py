"""Pretraining text: samples cut from documents in an order of each epoch, and what document borders do to them."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data import GlobalBatches, IndexedDataset, IndexedWriter, RowOptions, SampleStream
from megatron.data.document_order import DocumentOrders, build_order
from megatron.data.gpt import Documents, GPTOptions, GPTSamples, document_bounds
from megatron.data.indexed import HEADER, MAGIC, VERSION

EOD = 0
ORDERS = [[0, 1, 2, 3, 5, 4], [1, 0, 4, 3, 2, 5]]
"""Of 6 documents in the first two epochs of seed 1234: a change would change what resumed runs see."""
NVIDIA = """
import json, sys, torch
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids
for inputs in json.loads(sys.argv[1]):
    masked, weights, positions = _get_ltor_masks_and_position_ids(torch.tensor(inputs), 0, True, True, True, True)
    print(json.dumps([(~masked[0]).int().tolist(), weights.tolist(), positions.tolist()]))
"""


def write(prefix: Path, documents: Sequence[Sequence[int]]) -> None:
    with IndexedWriter(prefix, "<u2") as writer:
        for document in documents:
            writer.append(np.array(document, "<u2"))


def numbered(lengths: Sequence[int]) -> list[list[int]]:
    """Documents of so many tokens, all different, each ended by EOD."""
    ends = np.cumsum(lengths)
    return [
        [*range(end - size + 1, end), EOD] if size else [] for size, end in zip(lengths, ends.tolist(), strict=True)
    ]


def open_samples(prefix: Path, seed: int | None = 1234, **options: object) -> GPTSamples:
    dataset = IndexedDataset(prefix)
    documents = Documents(dataset, 0, len(document_bounds(dataset)) - 1)
    return GPTSamples("text", documents, DocumentOrders(documents.lengths, seed), GPTOptions(**options))  # type: ignore[arg-type]


def flat(documents: Sequence[Sequence[int]], order: Sequence[int]) -> tuple[list[int], list[int]]:
    """The tokens of an epoch, and which of them begin a document."""
    tokens, begins = [], []
    for document in (documents[one] for one in order):
        tokens += document
        begins += [place == 0 for place in range(len(document))]
    return tokens, begins


def test_the_order_never_changes() -> None:
    lengths = np.array([3, 1, 4, 1, 5, 9], np.int32)
    for epoch, expected in enumerate(ORDERS):
        order = build_order(lengths, 1234, epoch)
        assert order.documents.tolist() == expected
        assert order.starts.tolist() == [0, *np.cumsum(lengths[expected]).tolist()]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(lambda lengths: sum(lengths) > 1),
    seq_length=st.integers(1, 12),
    epoch=st.integers(0, 3),
    seed=st.integers(0, 3) | st.none(),
)
def test_an_epoch_is_its_documents_one_after_the_other(
    lengths: list[int], seq_length: int, epoch: int, seed: int | None
) -> None:
    """Every token but the first is predicted exactly once, in the order of the epoch."""
    documents = numbered(lengths)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "text", documents)
        data = open_samples(Path(folder) / "text", seed, seq_length=seq_length)
        numbers = np.arange(len(data)) + epoch * len(data)
        samples = [data[int(number)] for number in numbers]
        assert data.lengths(numbers).tolist() == [len(sample.tokens) for sample in samples]
    order = range(len(lengths)) if seed is None else build_order(np.array(lengths), seed, epoch).documents.tolist()
    tokens, _ = flat(documents, order)
    assert [token for sample in samples for token in sample.tokens[:-1].tolist()] == tokens[:-1]
    assert [token for sample in samples for token in sample.tokens[1:].tolist()] == tokens[1:]
    assert all(len(sample.tokens) == seq_length + 1 for sample in samples[:-1])
    assert all((sample.weights == 1).all() and len(sample.weights) == len(sample.tokens) - 1 for sample in samples)
    assert all(sample.document_starts.tolist() == sample.position_starts.tolist() == [0] for sample in samples)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=12).filter(lambda lengths: sum(lengths) > 1),
    seq_length=st.integers(1, 9),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_what_borders_do(lengths: list[int], seq_length: int, flags: tuple[bool, bool, bool]) -> None:
    positions, attention, masked = flags
    documents = numbered(lengths)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "text", documents)
        data = open_samples(
            Path(folder) / "text",
            seq_length=seq_length,
            reset_position_ids=positions,
            reset_attention_mask=attention,
            eod_mask_loss=masked,
        )
        samples = [data[number] for number in range(len(data))]
        assert [data.document_starts(number).tolist() for number in range(len(data))] == [
            sample.document_starts.tolist() for sample in samples
        ]
    _, begins = flat(documents, build_order(np.array(lengths), 1234, 0).documents.tolist())
    for number, sample in enumerate(samples):
        inside = begins[number * seq_length : number * seq_length + len(sample.tokens)]
        borders = [0, *(place for place in range(1, len(inside)) if inside[place])]
        assert sample.document_starts.tolist() == (borders if attention else [0])
        assert sample.position_starts.tolist() == (borders if positions else [0])
        assert sample.weights.tolist() == [float(not (masked and begin)) for begin in inside[1:]]


def test_documents_and_positions_of_a_micro_batch(tmp_path: Path) -> None:
    """Attention and positions are apart: either may begin anew without the other."""
    write(tmp_path / "text", numbered([3, 2, 6, 3]))
    expected = {
        (False, False): ([0, 8, 16], [*range(8), *range(8)]),
        (True, False): ([0, 3, 5, 8, 11, 16], [*range(8), *range(8)]),
        (False, True): ([0, 8, 16], [0, 1, 2, 0, 1, 0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 4]),
        (True, True): ([0, 3, 5, 8, 11, 16], [0, 1, 2, 0, 1, 0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 4]),
    }
    for (attention, positions), (bounds, places) in expected.items():
        data = open_samples(
            tmp_path / "text", None, seq_length=8, reset_attention_mask=attention, reset_position_ids=positions
        )
        stream = SampleStream([data], seed=0, shuffled=False)
        batch = GlobalBatches(stream=stream, rows=RowOptions(micro_batch_size=2, seq_length=8)).batch(0, 2)
        (micro,) = batch.micro_batches
        assert (
            micro.cu_seqlens.tolist() == bounds
        )  # the last 3 are padding: there are 14 tokens, of which 13 are inputs
        assert micro.positions.tolist() == places
        assert micro.tokens.tolist() == [1, 2, 0, 4, 0, 6, 7, 8, 9, 10, 0, 12, 13, 0, 0, 0]
        assert micro.useful_tokens == 13
        assert batch.document_lengths.tolist() == ([3, 2, 3, 3, 2] if attention else [8, 5])


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    """`doc_idx` says what a document is; a file that marks none has one for each sequence."""
    write(tmp_path / "text", [[1, 2], [3], [4, 5, 6], [7]])
    index = (tmp_path / "text.idx").read_bytes()
    for marked, bounds in {
        (0, 2, 4): [0, 3, 7],
        (0, 3): [0, 6, 7],
        (0,): [0, 2, 3, 6, 7],
        (0, 2, 2, 4): [0, 3, 3, 7],
    }.items():
        body = index[HEADER.size : HEADER.size + 12 * 4]
        header = HEADER.pack(MAGIC, VERSION, 8, 4, len(marked))
        (tmp_path / "text.idx").write_bytes(header + body + np.array(marked, "<i8").tobytes())
        dataset = IndexedDataset(tmp_path / "text")
        documents = Documents(dataset, 0, len(document_bounds(dataset)) - 1)
        assert documents.lengths().tolist() == np.diff(bounds).tolist()
        begins = documents.begins(np.arange(len(bounds) - 1))
        found = [
            documents.tokens(start, start + size).tolist()
            for start, size in zip(begins, documents.lengths(), strict=True)
        ]
        assert found == [list(range(start + 1, stop + 1)) for start, stop in pairwise(bounds)]


def test_a_part_of_the_documents(tmp_path: Path) -> None:
    write(tmp_path / "text", numbered([3, 2, 6, 3]))
    documents = Documents(IndexedDataset(tmp_path / "text"), 1, 3)
    data = GPTSamples("text", documents, DocumentOrders(documents.lengths, None), GPTOptions(seq_length=7))
    assert [data[n].tokens.tolist() for n in range(len(data))] == [[4, 0, 6, 7, 8, 9, 10, 0]]
    assert data.place(0) == "documents 1, 2"


def test_a_corpus_larger_than_memory(tmp_path: Path) -> None:
    """3 billion tokens; the files are sparse, and only the ends are read."""
    count, size = 3000, 1_000_000
    total = count * size
    sizes = np.full(count, size, "<i4")
    pointers = np.arange(count, dtype="<i8") * size * 2
    with (tmp_path / "text.idx").open("wb") as file:
        file.write(HEADER.pack(MAGIC, VERSION, 8, count, count + 1))
        for array in (sizes, pointers, np.arange(count + 1, dtype="<i8")):
            file.write(array.tobytes())
    with (tmp_path / "text.bin").open("wb") as file:
        file.truncate(2 * total)
        file.seek(2 * (total - 5))
        file.write(np.array([11, 12, 13, 14, 15], "<u2").tobytes())
    try:
        data = open_samples(tmp_path / "text", None, seq_length=4096)
        assert len(data) == -(-(total - 1) // 4096)
        last = data[len(data) - 1]
        assert len(last.tokens) == total - (len(data) - 1) * 4096
        assert last.tokens[-5:].tolist() == [11, 12, 13, 14, 15]
        shuffled = open_samples(tmp_path / "text", 1, seq_length=4096, reset_attention_mask=True)
        order = build_order(sizes, 1, 2)
        begin = int(order.starts[np.flatnonzero(order.documents == count - 1)[0]]) + size - 1
        found = shuffled[2 * len(data) + begin // 4096].tokens
        assert found[begin % 4096] == 15
        assert np.flatnonzero(found).tolist() == list(range(begin % 4096 - 4, begin % 4096 + 1))
    finally:
        (tmp_path / "text.bin").unlink()


@pytest.mark.slow
def test_borders_do_what_they_do_at_nvidia(megatron_core: Path, tmp_path: Path) -> None:
    write(tmp_path / "text", numbered([3, 1, 1, 9, 4, 2, 7, 1, 5]))
    flags = {"reset_position_ids": True, "reset_attention_mask": True, "eod_mask_loss": True}
    data = open_samples(tmp_path / "text", seq_length=6, **flags)
    batches = GlobalBatches(
        stream=SampleStream([data], seed=0, shuffled=False), rows=RowOptions(micro_batch_size=1, seq_length=6)
    )
    rows = batches.batch(0, len(data) - 1).micro_batches
    done = subprocess.run(
        [sys.executable, "-c", NVIDIA, json.dumps([row.tokens.tolist() for row in rows])],
        env={"PYTHONPATH": str(megatron_core), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for row, line in zip(rows, done.stdout.splitlines()[-len(rows) :], strict=True):
        document = np.searchsorted(row.cu_seqlens, np.arange(6), side="right")
        seen = np.tril(document[:, None] == document[None, :]).astype(int)
        assert json.loads(line) == [seen.tolist(), row.weights.tolist(), row.positions.tolist()]
