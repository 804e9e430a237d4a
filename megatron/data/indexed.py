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
from collections.abc import Callable, Mapping, Sequence
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
CHECK_BLOCK = 1 << 14
"""Sequences that are checked at a time: few enough to stay in the processor's cache."""
BLOCK = 1 << 20
"""Sequences whose pointers are held at a time."""
COPY_BLOCK = 1 << 24
"""Bytes of a token file."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The element type of token files: uint16 for a vocabulary smaller than 65,500, else int32."""
    return np.dtype("<u2") if vocab_size < SMALL_VOCABULARY else np.dtype("<i4")


def data_files(prefix: str | Path) -> tuple[Path, Path]:
    """The two files (`.bin`, `.idx`) of the indexed dataset at `prefix`."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


def tokenizer_file(prefix: str | Path) -> Path:
    """The file that describes the tokenizer of the data that training names `prefix`; other tools' data has none."""
    return Path(f"{prefix}-tokenizer.json")


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
            np.asarray(np.memmap(self.bin_path, dtype=self.dtype, mode="r"))
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

    def starts(self, sequences: Array) -> Array:
        """Where sequences begin in the token file, in elements, int64; sequence N would begin where the file ends."""
        pointers = self._pointers[np.minimum(sequences, len(self) - 1)] // self.dtype.itemsize
        return np.where(sequences < len(self), pointers, len(self._data))

    def elements(self, start: int, stop: int) -> Array:
        """Elements `start .. stop` of the token file, read-only."""
        return self._data[start:stop]

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
        in_order = len(documents) > 0 and documents[0] == 0 and bool((documents[1:] >= documents[:-1]).all())
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
        starts = np.array(pointers[start : start + CHECK_BLOCK])  # copied: it is not aligned in the file
        ends = starts + np.array(sizes[start : start + CHECK_BLOCK]) * np.int64(itemsize)
        wrong = starts[0] != end or bool((starts[1:] != ends[:-1]).any())
        if wrong:
            expected = np.append(end, ends[:-1])
            first = int(np.flatnonzero(starts != expected)[0])
            raise ValueError(
                f"{path}: sequence {start + first} is said to start at byte {int(starts[first]):,}, "
                f"but the sequences before it end at {int(expected[first]):,}"
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

    As a context manager it publishes itself at the end and leaves nothing behind on an error. Each sequence is a
    document; `reference_doc_idx` writes `doc_idx = [0]`, as the instruction files of the reference have it, instead of
    `[0 .. N]`, which every reader takes. `len` is the number of sequences.
    """

    def __init__(self, prefix: str | Path, dtype: np.dtype[Any] | str, *, reference_doc_idx: bool = False) -> None:
        self.dtype = np.dtype(dtype)
        if self.dtype not in CODES:
            raise ValueError(f"token files cannot hold elements of type {self.dtype}")
        self._reference_doc_idx = reference_doc_idx
        self._sizes: list[Array] = []
        self._sequences = 0
        self._documents: list[tuple[range | Array, int]] = [(range(1), 0)]  # entries, and what to add to each
        bin_path, idx_path = data_files(prefix)
        self._bin = Partial(bin_path)
        try:
            self._idx = Partial(idx_path)
        except OSError:
            self._bin.discard()
            raise

    def __len__(self) -> int:
        return self._sequences

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
        self._sequences += len(sizes)
        if self._reference_doc_idx:
            return
        added, (last, _) = range(self._sequences - len(sizes) + 1, self._sequences + 1), self._documents[-1]
        if isinstance(last, range) and last.stop == added.start:
            self._documents[-1] = (range(last.start, added.stop), 0)
        else:
            self._documents.append((added, 0))

    def copy(self, dataset: IndexedDataset, progress: Callable[[int], object]) -> None:
        """Add all of a dataset of the same element type, its documents as they are; `progress` is told bytes copied."""
        assert dataset.dtype == self.dtype
        with dataset.bin_path.open("rb", buffering=0) as file:
            while block := file.read(COPY_BLOCK):
                progress(self._bin.file.write(block))
        self._sizes.append(dataset.sizes)
        self._documents.append((dataset.doc_idx[1:], self._sequences))
        self._sequences += len(dataset)

    def finish(self) -> list[Partial]:
        """Write the index; returns the complete but still unpublished files, tokens first."""
        documents = sum(len(entries) for entries, _ in self._documents)
        file = self._idx.file
        file.write(HEADER.pack(MAGIC, VERSION, CODES[self.dtype], self._sequences, documents))
        sizes = np.concatenate([np.empty(0, "<i4"), *self._sizes])
        file.write(sizes.data)
        end = 0
        for start in range(0, len(sizes), BLOCK):
            ends = end + np.cumsum(sizes[start : start + BLOCK], dtype="<i8") * self.dtype.itemsize
            file.write(np.concatenate([np.array([end], "<i8"), ends[:-1]]).data)
            end = int(ends[-1])
        for entries, offset in self._documents:
            for start in range(0, len(entries), BLOCK):
                block = entries[start : start + BLOCK]
                array = np.arange(block.start, block.stop) if isinstance(block, range) else block
                file.write((array + offset).astype("<i8", copy=False).data)
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


def publish_datasets(writers: Sequence[IndexedWriter], tokenizers: Mapping[Path, bytes] | None = None) -> None:
    """Finish `writers` and give their files their final names, all of them or, on an error before that, none.

    `tokenizers` are the contents of files that describe the tokenizers of the data, and appear with it.
    """
    partials: list[Partial] = []
    try:
        for path, content in (tokenizers or {}).items():
            partials.append(Partial(path))
            partials[-1].file.write(content)
        publish([*partials, *(partial for writer in writers for partial in writer.finish())])
    except BaseException:
        for partial in partials:
            partial.discard()
        for writer in writers:
            writer.discard()
        raise
