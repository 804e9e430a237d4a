"""One file of tensors, to read: safetensors, or a `.bin` pickle of plain tensors. Nothing in it is ever run.

The entries of a safetensors file may be slices of larger tensors. Its metadata says which:

    DCP_SHARDING_INFO   {name: {"saved_offsets": [row, column]}}, as `torch.distributed.checkpoint` writes and reads it
    GLOBAL_SHAPES       {name: [rows, columns]} of the whole tensors
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron.checkpoint.safetensors_file import NAMED_DTYPES

BLOCK_BYTES = 1 << 24
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


class SafetensorsFile:
    """A safetensors file, checked by `safetensors`. Reads are plain ones: pages of a mapped file would stay resident.

    Raises:
        ValueError: it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with safe_open(path, framework="pt"):
                self._file = path.open("rb", buffering=0)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a whole safetensors file: {error}") from error
        size = int.from_bytes(self._file.read(8), "little")
        self._header: dict[str, Any] = json.loads(self._file.read(size))
        self._metadata = self._header.pop("__metadata__", {})
        self._begin = 8 + size

    def contents(self) -> Iterator[Content]:
        """All entries."""
        try:
            offsets = json.loads(self._metadata.get(OFFSETS, "{}"))
            wholes = json.loads(self._metadata.get(SHAPES, "{}"))
            for name, entry in self._header.items():
                shape = tuple(entry["shape"])
                start = tuple(offsets[name]["saved_offsets"]) if name in offsets else (0,) * len(shape)
                yield Content(name, start, shape, tuple(wholes.get(name, shape)), NAMED_DTYPES[entry["dtype"]])
        except (KeyError, TypeError, ValueError) as error:
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

    def _fill(self, tensor: Tensor, offset: int) -> None:
        """Read a tensor's bytes, which begin at `offset` of the file."""
        data = tensor.reshape(-1).view(torch.uint8).numpy().data
        while data:
            count = os.preadv(self._file.fileno(), [data], offset)
            if not count:
                raise ValueError(f"{self._path} ends too early: it was changed while it was read")
            data, offset = data[count:], offset + count


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
