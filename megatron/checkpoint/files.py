"""One file of tensors, to read: safetensors, or a `.bin` pickle of plain tensors. Nothing in it is ever run.

The entries of a safetensors file may be slices of larger tensors. Its metadata says which:

    DCP_SHARDING_INFO   {name: {"saved_offsets": [row, column]}}, as `torch.distributed.checkpoint` writes and reads it
    GLOBAL_SHAPES       {name: [rows, columns]} of the whole tensors
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron.checkpoint.safetensors_file import NAMED_DTYPES

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
    """A safetensors file, mapped into memory.

    Raises:
        ValueError: it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._handle = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a whole safetensors file: {error}") from error

    def contents(self) -> Iterator[Content]:
        """All entries."""
        metadata = self._handle.metadata() or {}
        try:
            offsets, wholes = json.loads(metadata.get(OFFSETS, "{}")), json.loads(metadata.get(SHAPES, "{}"))
            for name in self._handle.keys():  # noqa: SIM118 - not a dictionary
                part = self._handle.get_slice(name)
                shape = tuple(part.get_shape())
                start = tuple(offsets[name]["saved_offsets"]) if name in offsets else (0,) * len(shape)
                whole = tuple(wholes.get(name, shape))
                yield Content(name, start, shape, whole, NAMED_DTYPES[part.get_dtype()])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self._path}: damaged metadata or unknown type: {error!r}") from error

    def read(self, name: str, ranges: Ranges) -> Tensor:
        """A part of an entry."""
        return self._handle.get_slice(name)[ranges]


class PickledFile:
    """A `.bin` file as PyTorch saves a dictionary of tensors; loaded with `weights_only`, mapped into memory.

    Raises:
        ValueError: it is damaged, or holds anything else.
    """

    def __init__(self, path: Path) -> None:
        try:
            tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # whatever a damaged or hostile pickle makes of itself
            raise ValueError(f"{path}: not a file of plain tensors: {error}") from error
        if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
            raise ValueError(f"{path}: not a dictionary of tensors")
        self._tensors: dict[str, Tensor] = tensors

    def contents(self) -> Iterator[Content]:
        """All entries."""
        for name, tensor in self._tensors.items():
            shape = tuple(tensor.shape)
            yield Content(name, (0,) * tensor.ndim, shape, shape, tensor.dtype)

    def read(self, name: str, ranges: Ranges) -> Tensor:
        """A part of an entry."""
        return self._tensors[name][ranges]
