"""Tensors on disk, read slice by slice, however they are cut into files."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron.checkpoint.files import OFFSETS, SHAPES, Ranges, SafetensorsFile, TensorFile, map_pickled
from megatron.checkpoint.safetensors_file import Entry, SafetensorsWriter

BLOCK_ROWS = 4096
"""Of a vocabulary, to be read at a time."""


class TensorStore(Protocol):
    """Named tensors on disk."""

    def names(self) -> list[str]:
        """Of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """As stored."""
        ...

    def read(self, name: str, ranges: Ranges | None = None) -> Tensor:
        """The tensor, or the part of it in `ranges` (one slice a dimension, with start and stop)."""
        ...

    def close(self) -> None:
        """Let go of the files until they are read again."""
        ...


@dataclass(frozen=True)
class Slice:
    """A part of a tensor, to be written.

    Attributes:
        name: of the tensor.
        shape: of the whole tensor.
        offsets: where the part begins in each dimension.
        entry: dtype and shape of the part.
        read: gives the part when it is its turn.
    """

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    entry: Entry
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, name: str, shape: tuple[int, ...], offsets: tuple[int, ...], tensor: Tensor) -> "Slice":
        """The slice that `tensor` holds."""
        return cls(name, shape, offsets, Entry(name, tensor.dtype, tuple(tensor.shape)), lambda: tensor)


@dataclass(frozen=True)
class Written:
    """A file that was written: its size in bytes and crc32."""

    size: int
    checksum: str


def write_slices(path: Path, slices: Iterable[Slice], progress: Callable[[int], object] = lambda size: None) -> Written:
    """Write `slices` into one file; `progress` is told the bytes of each."""
    slices = list(slices)
    metadata = {
        "format": "pt",
        OFFSETS: json.dumps({s.name: {"saved_offsets": list(s.offsets)} for s in slices}),
        SHAPES: json.dumps({s.name: list(s.shape) for s in slices}),
    }
    with SafetensorsWriter(path, [s.entry for s in slices], metadata) as writer:
        for part, tensor in zip(slices, read_ahead([s.read for s in slices]), strict=True):
            writer.write(tensor)
            progress(part.entry.size)
    return Written(writer.size, writer.checksum)


def read_ahead(reads: Iterable[Callable[[], Tensor]]) -> Iterator[Tensor]:
    """What `reads` give, in order; each is read while the caller works with the one before."""
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as thread:
        upcoming: Future[Tensor] | None = None
        for read in reads:
            previous, upcoming = upcoming, thread.submit(read)
            if previous:
                yield previous.result()
        if upcoming:
            yield upcoming.result()


@dataclass(frozen=True)
class Piece:
    """Where a part of a tensor lies: `key` in `file`, beginning at `offsets` of the whole tensor."""

    file: TensorFile
    key: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SlicedStore:
    """Tensors over several files.

    Attributes:
        folder: for messages.
        pieces: name -> its parts.
        shapes: name -> shape of the whole.
        dtypes: name -> dtype.
    """

    folder: Path
    pieces: Mapping[str, Sequence[Piece]]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]

    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        if name not in self.shapes:
            raise ValueError(f"{self.folder} has no tensor {name}")
        return self.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """As stored."""
        return self.dtypes[name]

    def read(self, name: str, ranges: Ranges | None = None) -> Tensor:
        """The tensor or a part of it, from every file that holds some of it.

        Raises:
            ValueError: no file holds some of it, there is no such tensor, or it is larger than the tensor.
        """
        wanted = ranges or tuple(slice(0, size) for size in self.shape(name))
        first, *others = self.pieces[name]
        is_inside = all(r.stop <= size for r, size in zip(wanted, first.shape, strict=True))
        if not others and first.shape == self.shape(name) and is_inside:
            return first.file.read(first.key, wanted)
        result = torch.empty([r.stop - r.start for r in wanted], dtype=self.dtypes[name])
        outstanding = result.numel()
        for piece in self.pieces[name]:
            held = [slice(o, o + size) for o, size in zip(piece.offsets, piece.shape, strict=True)]
            both = [slice(max(w.start, h.start), min(w.stop, h.stop)) for w, h in zip(wanted, held, strict=True)]
            if any(r.start >= r.stop for r in both):
                continue
            source = tuple(slice(r.start - h.start, r.stop - h.start) for r, h in zip(both, held, strict=True))
            target = tuple(slice(r.start - w.start, r.stop - w.start) for r, w in zip(both, wanted, strict=True))
            part = piece.file.read(piece.key, source)
            result[target] = part
            outstanding -= part.numel()
        if outstanding:
            asked = ", ".join(f"{r.start}:{r.stop}" for r in wanted)
            problem = _tiling_problem(self.shape(name), self.pieces[name]) or f"no part [{asked}]"
            raise ValueError(f"{self.folder}: the files hold {problem} of {name} {list(self.shape(name))}")
        return result

    def close(self) -> None:
        """Let go of the files until they are read again."""
        for piece in chain.from_iterable(self.pieces.values()):
            piece.file.close()

    def equal(self, first: str, second: str) -> bool:
        """Whether two tensors are the same in the precision of the first; compared block by block."""
        if self.shape(first) != self.shape(second):
            return False
        rows, *rest = self.shape(first)
        whole = [slice(0, size) for size in rest]
        for start in range(0, rows, BLOCK_ROWS):
            block = (slice(start, min(start + BLOCK_ROWS, rows)), *whole)
            part = self.read(first, block)
            if not torch.equal(part, self.read(second, block).to(part.dtype)):
                return False
        return True

    def check_whole(self) -> None:
        """Raise `ValueError` unless the files hold all of every tensor, and no part of one twice."""
        for name, pieces in self.pieces.items():
            problem = _tiling_problem(self.shapes[name], pieces)
            if problem:
                raise ValueError(f"{self.folder}: the files hold {problem} of {name} {list(self.shapes[name])}")

    def renamed(self, rename: Callable[[str], str]) -> "SlicedStore":
        """The same tensors under other names."""
        return SlicedStore(
            self.folder,
            {rename(name): pieces for name, pieces in self.pieces.items()},
            {rename(name): shape for name, shape in self.shapes.items()},
            {rename(name): dtype for name, dtype in self.dtypes.items()},
        )

    def without(self, names: Iterable[str]) -> "SlicedStore":
        """The store less some tensors."""
        left_out = set(names)
        tables: list[Mapping[str, Any]] = [self.pieces, self.shapes, self.dtypes]
        return SlicedStore(self.folder, *({k: v for k, v in table.items() if k not in left_out} for table in tables))


def open_files(folder: Path, files: Sequence[Path]) -> SlicedStore:
    """The tensors in safetensors or `.bin` files.

    Raises:
        ValueError: a file is damaged, or files contradict each other.
    """
    pieces: dict[str, list[Piece]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for path in files:
        file: TensorFile = map_pickled(path) if path.suffix == ".bin" else SafetensorsFile(path)
        for content in file.contents():
            name, whole, dtype = content.name, content.whole, content.dtype
            known = shapes.setdefault(name, whole), dtypes.setdefault(name, dtype)
            if known != (whole, dtype):
                raise ValueError(f"{path}: {name} is {list(whole)} {dtype} here but {known} in another file")
            pieces.setdefault(name, []).append(Piece(file, name, content.offsets, content.shape))
    return SlicedStore(folder, pieces, shapes, dtypes)


def _tiling_problem(shape: tuple[int, ...], pieces: Sequence[Piece]) -> str | None:
    """Why `pieces` are not all of a tensor of `shape`, each element once; None if they are.

    The borders of the pieces divide the tensor into cells; each cell is to be covered once.
    """
    borders = [
        sorted({0, size, *(p.offsets[d] for p in pieces), *(p.offsets[d] + p.shape[d] for p in pieces)})
        for d, size in enumerate(shape)
    ]
    if any((b[0], b[-1]) != (0, size) for b, size in zip(borders, shape, strict=True)):
        return "a part that lies outside"
    places = [{border: place for place, border in enumerate(b)} for b in borders]
    times = torch.zeros([len(b) - 1 for b in borders], dtype=torch.int32)
    for piece in pieces:
        times[tuple(slice(at[o], at[o + n]) for at, o, n in zip(places, piece.offsets, piece.shape, strict=True))] += 1
    if bool((times == 0).any()):
        return "only a part"
    return "a part twice" if bool((times > 1).any()) else None
