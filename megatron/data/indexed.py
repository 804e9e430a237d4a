"""Token sequences on disk: `PREFIX.bin`, ids back to back, and `PREFIX.idx`, where each sequence lies.

The index, little endian:

| offset   | size | content                                          |
|----------|------|--------------------------------------------------|
| 0        | 9    | `MMIDIDX\\0\\0`                                    |
| 9        | 8    | u64 version, 1                                   |
| 17       | 1    | u8 code of the element type, see `DTYPES`        |
| 18       | 8    | u64 N, number of sequences                       |
| 26       | 8    | u64 D, length of doc_idx                         |
| 34       | 4N   | i32 sizes, in elements                           |
| 34 + 4N  | 8N   | i64 pointers, byte offset of each sequence       |
| 34 + 12N | 8D   | i64 doc_idx, first sequence of each document     |
"""

import struct
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from megatron.data.publish import Partial, publish

Array = np.ndarray[Any, np.dtype[Any]]

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
SMALL_VOCABULARY = 65500
CHECK_BLOCK = 1 << 20


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The element type of token files: uint16 for a vocabulary smaller than 65,500, else int32."""
    return np.dtype("<u2") if vocab_size < SMALL_VOCABULARY else np.dtype("<i4")


def data_files(prefix: str | Path) -> tuple[Path, Path]:
    """The two files (`.bin`, `.idx`) of the indexed dataset at `prefix`."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


class IndexedDataset:
    """Read-only sequences of an indexed dataset, memory-mapped: ranks on one machine share the page cache.

    `dataset[i]` is sequence i, a read-only array of the file's element type. `sizes` is int32 [N], `doc_idx` int64 [D].
    With `warmup` the token file is read once from end to end, so that later reads find it in memory.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: a file is damaged, or the two contradict each other.
    """

    def __init__(self, prefix: str | Path, *, warmup: bool = False) -> None:
        self.bin_path, self.idx_path = data_files(prefix)
        missing = [str(path) for path in (self.bin_path, self.idx_path) if not path.is_file()]
        if missing:
            raise FileNotFoundError(f"no indexed dataset at {prefix}: missing {' and '.join(missing)}")
        self.dtype, self.sizes, self._pointers, self.doc_idx = _read_index(self.idx_path)
        self._check()
        self._data: Array = (
            np.memmap(self.bin_path, dtype=self.dtype, mode="r")
            if self.bin_path.stat().st_size
            else np.empty(0, self.dtype)
        )
        if warmup:
            _read_through(self.bin_path)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Array:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {self.bin_path}, which has {len(self)}")
        start = int(self._pointers[index]) // self.dtype.itemsize
        return self._data[start : start + int(self.sizes[index])]

    def _check(self) -> None:
        """Raise `ValueError` unless sizes, pointers, documents and the length of the token file agree."""
        if len(self.sizes) and int(self.sizes.min()) < 0:
            raise ValueError(f"{self.idx_path}: sequence {int(self.sizes.argmin())} has a negative size")
        end = _check_pointers(self.idx_path, self.sizes, self._pointers, self.dtype.itemsize)
        length = self.bin_path.stat().st_size
        if length != end:
            raise ValueError(
                f"{self.bin_path} is {length:,} bytes long, but {self.idx_path} describes {end:,}: "
                "one of them is cut off, or they are not from the same run"
            )
        documents = self.doc_idx
        in_order = len(documents) > 0 and documents[0] == 0 and bool((np.diff(documents) >= 0).all())
        if not in_order or documents[-1] > len(self):
            raise ValueError(f"{self.idx_path}: doc_idx does not rise from 0 to at most {len(self)} sequences")


def _read_index(path: Path) -> tuple[np.dtype[Any], Array, Array, Array]:
    """Element type, sizes, pointers and doc_idx of an index file (arrays memory-mapped)."""
    length = path.stat().st_size
    if length < HEADER.size:
        raise ValueError(f"{path} is {length} bytes long, too short for the header of an index ({HEADER.size} bytes)")
    with path.open("rb") as file:
        magic, version, code, sequences, documents = HEADER.unpack(file.read(HEADER.size))
    if magic != MAGIC:
        raise ValueError(f"{path} is not an index of an indexed dataset: it starts with {magic!r}, not {MAGIC!r}")
    if version != VERSION:
        raise ValueError(f"{path} has index version {version}; only version {VERSION} is known")
    if code not in DTYPES:
        raise ValueError(f"{path} has element type code {code}; token ids have one of {sorted(DTYPES)}")
    expected = HEADER.size + 12 * sequences + 8 * documents
    if length != expected:
        raise ValueError(
            f"{path} is {length:,} bytes long, but {sequences:,} sequences and {documents:,} document "
            f"entries take {expected:,}: it is cut off or damaged"
        )
    body = np.memmap(path, dtype=np.uint8, mode="r")
    after_sizes = HEADER.size + 4 * sequences
    after_pointers = after_sizes + 8 * sequences
    sizes = body[HEADER.size : after_sizes].view("<i4")
    pointers = body[after_sizes:after_pointers].view("<i8")
    return DTYPES[code], sizes, pointers, body[after_pointers:].view("<i8")


def _check_pointers(path: Path, sizes: Array, pointers: Array, itemsize: int) -> int:
    """Raise `ValueError` unless each sequence starts where the one before ends; the end of the last, in bytes."""
    end = 0
    for start in range(0, len(sizes), CHECK_BLOCK):
        ends = end + np.cumsum(sizes[start : start + CHECK_BLOCK], dtype=np.int64) * itemsize
        starts = np.concatenate([np.array([end], np.int64), ends[:-1]])
        wrong = np.flatnonzero(starts != pointers[start : start + CHECK_BLOCK])
        if len(wrong):
            first = int(wrong[0])
            raise ValueError(
                f"{path}: sequence {start + first} is said to start at byte {int(pointers[start + first]):,}, "
                f"but the sequences before it end at {int(starts[first]):,}"
            )
        end = int(ends[-1])
    return end


def _read_through(path: Path) -> None:
    """Read a file once, to bring it into the page cache."""
    with path.open("rb", buffering=0) as file:
        while file.read(64 << 20):
            pass


class IndexedWriter:
    """Writes an indexed dataset; nothing appears under its final name before `publish_datasets`.

    As a context manager it publishes itself at the end and leaves nothing behind on an error. `reference_doc_idx`
    writes `doc_idx = [0]`, as the instruction files of the reference have it, instead of `[0 .. N]`, which every reader
    takes.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype[Any] | str, *, reference_doc_idx: bool = False) -> None:
        self.dtype = np.dtype(dtype)
        if self.dtype not in CODES:
            raise ValueError(f"token files cannot hold elements of type {self.dtype}")
        self._reference_doc_idx = reference_doc_idx
        self._sizes: list[Array] = []
        bin_path, idx_path = data_files(prefix)
        self._bin = Partial(bin_path)
        try:
            self._idx = Partial(idx_path)
        except OSError:
            self._bin.discard()
            raise

    def append(self, sequence: Array) -> None:
        """Add one sequence."""
        self.extend(sequence, np.array([len(sequence)], np.int32))

    def extend(self, values: Array, sizes: Array) -> None:
        """Add sequences: `values` are their elements back to back, `sizes` int32 [n] their lengths.

        Raises:
            ValueError: an element does not fit the element type of the file, or the lengths do not sum up.
        """
        if int(sizes.sum()) != len(values):
            raise ValueError(f"sizes sum up to {int(sizes.sum())}, but there are {len(values)} elements")
        stored = values.astype(self.dtype, copy=False)
        if stored is not values and not np.array_equal(stored, values):
            raise ValueError(f"{self._bin.path}: ids up to {int(values.max())} do not fit {self.dtype}")
        self._bin.file.write(np.ascontiguousarray(stored).data)
        self._sizes.append(sizes.astype("<i4"))

    def finish(self) -> list[Partial]:
        """Write the index; returns the complete but still unpublished files, tokens first."""
        sizes = np.concatenate([np.empty(0, "<i4"), *self._sizes])
        ends = np.cumsum(sizes, dtype="<i8") * self.dtype.itemsize
        pointers = np.concatenate([np.zeros(1, "<i8"), ends])[: len(sizes)]
        doc_idx = np.zeros(1, "<i8") if self._reference_doc_idx else np.arange(len(sizes) + 1, dtype="<i8")
        file = self._idx.file
        file.write(HEADER.pack(MAGIC, VERSION, CODES[self.dtype], len(sizes), len(doc_idx)))
        for array in (sizes, pointers, doc_idx):
            file.write(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
        return [self._bin, self._idx]

    def discard(self) -> None:
        """Remove what was written."""
        self._bin.discard()
        self._idx.discard()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.discard()
        else:
            publish_datasets([self])


def publish_datasets(writers: list[IndexedWriter]) -> None:
    """Finish `writers` and give their files their final names, all of them or, on an error before that, none."""
    try:
        publish([partial for writer in writers for partial in writer.finish()])
    except BaseException:
        for writer in writers:
            writer.discard()
        raise
