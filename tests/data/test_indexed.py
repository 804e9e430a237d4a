"""The file format: round trips, damage, and files that appear whole or not at all."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data import indexed
from megatron.data.indexed import DTYPES, IndexedDataset, IndexedWriter, publish_datasets, token_dtype
from megatron.data.instruction import InstructionDataset

ROWS = [[1, 2, 3], [], [4], [5, 6]]


def write(prefix: Path, rows: list[list[int]] = ROWS, dtype: str = "<u2", **options: bool) -> None:
    with IndexedWriter(prefix, dtype, **options) as writer:
        for row in rows:
            writer.append(np.array(row, dtype))


def read(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(prefix)
    return [dataset[i].tolist() for i in range(len(dataset))]


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(list(DTYPES.values())),
    sizes=st.lists(st.lists(st.integers(0, 9), max_size=5), max_size=5),
    reference_doc_idx=st.booleans(),
    seed=st.integers(0, 99),
)
def test_round_trip(dtype: np.dtype, sizes: list[list[int]], reference_doc_idx: bool, seed: int) -> None:
    draw, limits = np.random.default_rng(seed), np.iinfo(dtype)
    blocks = [[draw.integers(limits.min, limits.max, size, dtype, endpoint=True) for size in block] for block in sizes]
    rows = [row for block in blocks for row in block]
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "data"
        with IndexedWriter(prefix, dtype, reference_doc_idx=reference_doc_idx) as writer:
            for block in blocks:
                writer.extend(np.concatenate([np.empty(0, dtype), *block]), np.array([len(row) for row in block], int))
        dataset = IndexedDataset(prefix, warmup=True)
        assert dataset.dtype == dtype
        assert [row.tolist() for row in rows] == [dataset[i].tolist() for i in range(len(dataset))]
        assert dataset.sizes.tolist() == [len(row) for row in rows]
        assert dataset.doc_idx.tolist() == ([0] if reference_doc_idx else list(range(len(rows) + 1)))
        assert sorted(path.name for path in Path(folder).iterdir()) == ["data.bin", "data.idx"]


def test_bytes_of_an_index(tmp_path: Path) -> None:
    write(tmp_path / "d", [[1, 2], [3]])
    expected = b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + b"\x08" + (2).to_bytes(8, "little")
    expected += (3).to_bytes(8, "little")
    expected += np.array([2, 1], "<i4").tobytes() + np.array([0, 4], "<i8").tobytes()
    expected += np.array([0, 1, 2], "<i8").tobytes()
    assert (tmp_path / "d.idx").read_bytes() == expected
    assert (tmp_path / "d.bin").read_bytes() == np.array([1, 2, 3], "<u2").tobytes()


def test_token_dtype_changes_at_the_limit() -> None:
    assert token_dtype(65499) == np.dtype("<u2")
    assert token_dtype(65500) == np.dtype("<i4")


def test_index_out_of_range(tmp_path: Path) -> None:
    write(tmp_path / "d")
    dataset = IndexedDataset(tmp_path / "d")
    assert dataset[-1].tolist() == [5, 6]
    for index in (4, -5):
        with pytest.raises(IndexError):
            dataset[index]


def cut(data: bytes) -> bytes:
    return data[:-1]


def patched(offset: int, value: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[:offset] + value + data[offset + len(value) :]


SIZES, POINTERS = 34, 34 + 4 * len(ROWS)
DOCUMENTS = 34 + 12 * len(ROWS)


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        (".idx", lambda data: b"", r"d\.idx is 0 bytes long, too short"),
        (".idx", patched(0, b"X"), r"d\.idx is not an index"),
        (".idx", patched(9, b"\2"), r"d\.idx has index version 2"),
        (".idx", patched(17, b"\7"), r"d\.idx has element type code 7"),
        (".idx", patched(18, b"\5"), r"d\.idx is .* bytes long, but 5 sequences"),
        (".idx", cut, r"d\.idx is .* bytes long, but 4 sequences"),
        (".idx", lambda data: data + b"\0", r"d\.idx is .* bytes long, but 4 sequences"),
        (".idx", patched(SIZES, b"\xff\xff\xff\xff"), r"d\.idx: sequence 0 has a negative size"),
        (".idx", patched(SIZES, b"\4"), r"d\.idx: sequence 1 is said to start at byte 6, but .* end at 8"),
        (".idx", patched(POINTERS, b"\2"), r"d\.idx: sequence 0 is said to start at byte 2"),
        (".idx", patched(DOCUMENTS, b"\1"), r"d\.idx: doc_idx does not rise"),
        (".idx", patched(DOCUMENTS + 32, b"\5"), r"d\.idx: doc_idx does not rise"),
        (".bin", cut, r"d\.bin is 11 bytes long, but .*d\.idx describes 12"),
        (".bin", lambda data: data + b"\0\0", r"d\.bin is 14 bytes long"),
    ],
)
@pytest.mark.parametrize("block", [1, indexed.CHECK_BLOCK])
def test_damage_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    block: int,
    suffix: str,
    change: Callable[[bytes], bytes],
    message: str,
) -> None:
    monkeypatch.setattr(indexed, "CHECK_BLOCK", block)
    write(tmp_path / "d")
    path = tmp_path / f"d{suffix}"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        IndexedDataset(tmp_path / "d")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.bin and .*none\.idx"):
        IndexedDataset(tmp_path / "none")
    write(tmp_path / "d")
    (tmp_path / "d.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"missing \S*d\.bin$"):
        IndexedDataset(tmp_path / "d")


def test_an_error_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    def fail() -> None:
        with IndexedWriter(tmp_path / "d", "<u2") as writer:
            writer.append(np.array([9], "<u2"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "d")
    with pytest.raises(KeyboardInterrupt):
        fail()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.bin", "d.idx"]
    assert read(tmp_path / "d") == ROWS


def test_ids_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for values in ([65536], [-1]):
        with pytest.raises(ValueError, match="do not fit uint16"), IndexedWriter(tmp_path / "d", "<u2") as writer:
            writer.append(np.array(values))
    with pytest.raises(ValueError, match="sizes sum up to 2"), IndexedWriter(tmp_path / "d", "<u2") as writer:
        writer.extend(np.array([1], "<u2"), np.array([2]))
    with pytest.raises(ValueError, match="float64"):
        IndexedWriter(tmp_path / "d", "f8")
    assert list(tmp_path.iterdir()) == []


def test_a_crash_between_renames_leaves_no_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "d")
    writer = IndexedWriter(tmp_path / "d", "<u2")
    writer.append(np.array([7, 7], "<u2"))
    monkeypatch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError("crash")))
    with pytest.raises(OSError, match="crash"):
        publish_datasets([writer])
    with pytest.raises(FileNotFoundError, match=r"d\.idx"):
        IndexedDataset(tmp_path / "d")


def test_pairs_must_agree(tmp_path: Path) -> None:
    write(tmp_path / "p-text", [[1, 2], [3]])
    write(tmp_path / "p-role", [[1, 2], [0]])
    dataset = InstructionDataset(tmp_path / "p")
    tokens, roles = dataset[0]
    assert (tokens.tolist(), roles.tolist(), tokens.dtype, roles.dtype) == ([1, 2], [1, 2], np.int64, np.int64)
    assert dataset.lengths.tolist() == [2, 1]
    write(tmp_path / "p-role", [[1, 2], [0], [0]])
    with pytest.raises(ValueError, match=r"has 2 rows, but .*p-role\.idx has 3"):
        InstructionDataset(tmp_path / "p")
    write(tmp_path / "p-role", [[1, 2], [0, 1]])
    with pytest.raises(ValueError, match=r"row 1 has 1 tokens in .* but 2 roles"):
        InstructionDataset(tmp_path / "p")
    write(tmp_path / "p-text", [])
    with pytest.raises(ValueError, match=r"p-text\.idx has no rows"):
        InstructionDataset(tmp_path / "p")
