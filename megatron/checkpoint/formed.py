"""Weights in the form that a family has in Hugging Face's files: read from it row by row, and put together again."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron.checkpoint.files import Ranges
from megatron.checkpoint.store import SlicedStore, TensorStore
from megatron.hf.forms import Rows, Source


@dataclass(frozen=True)
class FormedStore:
    """Our tensors, read from a store of theirs.

    Attributes:
        store: of their tensors.
        sources: our name -> where it lies there.
    """

    store: TensorStore
    sources: Mapping[str, Source]

    def names(self) -> list[str]:
        """Ours."""
        return list(self.sources)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of our whole tensor."""
        source = self._source(name)
        shape = self.store.shape(source.name)
        if source.transposed:
            shape = shape[::-1]
        return shape if source.rows is None else (len(source.rows), *shape[1:])

    def dtype(self, name: str) -> torch.dtype:
        """As stored."""
        return self.store.dtype(self._source(name).name)

    def read(self, name: str, ranges: Ranges | None = None) -> Tensor:
        """Our tensor or a part of it; only the rows asked for are read."""
        source = self._source(name)
        rows, *rest = ranges or tuple(slice(0, size) for size in self.shape(name))
        if source.rows is None:
            return self._read(source, rows, rest)
        wanted = source.rows[rows]
        if not len(wanted):  # of few rows some data-parallel ranks have none
            return torch.empty(0, *(r.stop - r.start for r in rest), dtype=self.dtype(name))
        order = np.argsort(wanted)  # few reads of many rows, whatever order ours have
        found = torch.cat([self._read(source, run, rest) for run in _runs(wanted[order])])
        return found if (np.diff(order) == 1).all() else found[torch.as_tensor(np.argsort(order))]

    def close(self) -> None:
        """Let go of the files until they are read again."""
        self.store.close()

    def _read(self, source: Source, rows: slice, rest: Sequence[slice]) -> Tensor:
        """Rows of ours in the order in which they lie there."""
        if source.transposed:
            return self.store.read(source.name, (*rest, rows)).t()
        return self.store.read(source.name, (rows, *rest))

    def _source(self, name: str) -> Source:
        if name not in self.sources:
            raise ValueError(f"there is no tensor {name}")
        return self.sources[name]


def formed_shape(shapes: Mapping[str, tuple[int, ...]], parts: Mapping[str, Source]) -> tuple[int, ...]:
    """Shape of their tensor that is made of `parts` of ours, by the shapes of ours."""
    first, source = next(iter(parts.items()))
    shape = (sum(shapes[name][0] for name in parts), *shapes[first][1:])
    return shape[::-1] if source.transposed else shape


def check_shapes(stored: SlicedStore, expected: Mapping[str, tuple[int, ...]], described: object) -> None:
    """Raise `ValueError` for the first tensor that has not the shape that the file `described` gives it."""
    for name, shape in expected.items():
        if stored.shape(name) != shape:
            should = f"but by {described} it should be {list(shape)}"
            raise ValueError(f"{stored.folder}: {name} is {list(stored.shape(name))}, {should}")


def formed(weights: TensorStore, parts: Mapping[str, Source]) -> Tensor:
    """Their tensor, put together from `parts` of ours."""
    first, source = next(iter(parts.items()))
    if source.rows is None:
        whole = weights.read(first)
    else:
        rows = sum(weights.shape(name)[0] for name in parts)
        whole = torch.empty(rows, *weights.shape(first)[1:], dtype=weights.dtype(first))
        for name, place in parts.items():
            whole[torch.as_tensor(place.rows)] = weights.read(name)
    return whole.t().contiguous() if source.transposed else whole


def _runs(rows: Rows) -> Iterator[slice]:
    """Consecutive rows as slices, in order."""
    for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
        if len(run):
            yield slice(int(run[0]), int(run[-1]) + 1)
