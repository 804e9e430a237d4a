"""One file of tensors, to read: safetensors, or a `.bin` pickle of plain tensors. Nothing in it is ever run.

The entries of a safetensors file may be slices of larger tensors. Its metadata says which:

    DCP_SHARDING_INFO   {name: {"saved_offsets": [row, column]}}, as `torch.distributed.checkpoint` writes and reads it
    GLOBAL_SHAPES       {name: [rows, columns]} of the whole tensors
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron.checkpoint.json_file import parse_json
from megatron.checkpoint.safetensors_file import NAMED_DTYPES

BLOCK_BYTES = 1 << 24
LARGEST_SIZE = 1 << 48
"""More than a dimension of a tensor can be."""
OFFSETS, SHAPES = "DCP_SHARDING_INFO", "GLOBAL_SHAPES"
Ranges = tuple[slice, ...]


@dataclass(frozen=True)
class Content:
    """An entry of a file: a tensor of `shape` that begins at `offsets` of one of shape `whole`."""

    name: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    whole: tuple[int, ...]
    dtype: torch.dtype


class TensorFile(Protocol):
    """A file of tensors."""

    def contents(self) -> Iterator[Content]:
        """All entries."""
        ...

    def read(self, name: str, ranges: Ranges) -> Tensor:
        """A part of an entry."""
        ...

    def close(self) -> None:
        """Let go of it until it is read again: a file that is open takes room on the disk after it was removed."""
        ...


class SafetensorsFile:
    """A safetensors file, checked by `safetensors`. Reads are plain ones: pages of a mapped file would stay resident.

    It is opened when it is first read, since a process cannot have the files of a thousand ranks open.

    Raises:
        ValueError: it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._opened: FileIO | None = None
        try:
            with safe_open(path, framework="pt"), path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                self._header: dict[str, Any] = parse_json(file.read(size))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a whole safetensors file: {error}") from error
        self._metadata = self._header.pop("__metadata__", {})
        self._begin = 8 + size

    def contents(self) -> Iterator[Content]:
        """All entries."""
        try:
            offsets = parse_json(self._metadata.get(OFFSETS, "{}"))
            wholes = parse_json(self._metadata.get(SHAPES, "{}"))
            for name, entry in self._header.items():
                shape = tuple(entry["shape"])
                start = offsets[name]["saved_offsets"] if name in offsets else [0] * len(shape)
                start, whole = _sizes(start, len(shape)), _sizes(wholes.get(name, shape), len(shape))
                yield Content(name, start, shape, whole, NAMED_DTYPES[entry["dtype"]])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self._path}: damaged metadata or unknown type: {error!r}") from error

    def read(self, name: str, ranges: Ranges) -> Tensor:
        """A part of an entry: its rows, a block of them at a time where only some of their columns are wanted."""
        entry = self._header[name]
        dtype, inner = NAMED_DTYPES[entry["dtype"]], entry["shape"][1:]
        rows, *columns = ranges or (slice(0, 1),)
        row_bytes = torch.Size(inner).numel() * dtype.itemsize
        begin = self._begin + entry["data_offsets"][0]
        if all((r.start, r.stop) == (0, size) for r, size in zip(columns, inner, strict=True)):
            whole = torch.empty(rows.stop - rows.start, *inner, dtype=dtype)
            self._fill(whole, begin + rows.start * row_bytes)
            return whole.reshape([]) if not entry["shape"] else whole
        result = torch.empty(rows.stop - rows.start, *(r.stop - r.start for r in columns), dtype=dtype)
        for part in result.split(max(BLOCK_BYTES // row_bytes, 1)):
            block = torch.empty(len(part), *inner, dtype=dtype)
            self._fill(block, begin + rows.start * row_bytes)
            part.copy_(block[(slice(None), *columns)])
            rows = slice(rows.start + len(part), rows.stop)
        return result

    def close(self) -> None:
        """Let go of it until it is read again."""
        if self._opened:
            self._opened.close()
            self._opened = None

    def _fill(self, tensor: Tensor, offset: int) -> None:
        """Read a tensor's bytes, which begin at `offset` of the file."""
        self._opened = self._opened or self._path.open("rb", buffering=0)
        data = tensor.reshape(-1).view(torch.uint8).numpy().data
        while data:
            count = os.preadv(self._opened.fileno(), [data], offset)
            if not count:
                raise ValueError(f"{self._path} ends too early: it was changed while it was read")
            data, offset = data[count:], offset + count


def _sizes(values: Any, count: int) -> tuple[int, ...]:
    """What should be so many sizes, of a tensor's dimensions.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(values, list | tuple) or len(values) != count:
        raise ValueError(f"{values!r} are not {count} sizes")
    if not all(type(value) is int and 0 <= value < LARGEST_SIZE for value in values):
        raise ValueError(f"{values!r} are not sizes")
    return tuple(values)


@dataclass(frozen=True)
class MappedFile:
    """Tensors of the file `path`, mapped into memory, by name."""

    path: Path
    tensors: Mapping[str, Tensor]

    def contents(self) -> Iterator[Content]:
        """All entries."""
        for name, tensor in self.tensors.items():
            shape = tuple(tensor.shape)
            yield Content(name, (0,) * tensor.ndim, shape, shape, tensor.dtype)

    def read(self, name: str, ranges: Ranges) -> Tensor:
        """A part of an entry."""
        return self.tensors[name][ranges]

    def close(self) -> None:
        """It stays mapped: nothing here removes the files of other toolkits."""


def map_pickled(path: Path) -> MappedFile:
    """A `.bin` file as PyTorch saves a dictionary of tensors; loaded with `weights_only`.

    Raises:
        ValueError: it is damaged, or holds anything else.
    """
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # whatever a damaged or hostile pickle makes of itself
        raise ValueError(f"{path}: not a file of plain tensors: {error}") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided
        for name, tensor in tensors.items()
    ):
        raise ValueError(f"{path}: not a dictionary of tensors")
    return MappedFile(path, tensors)
