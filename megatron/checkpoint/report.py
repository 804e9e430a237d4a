"""How a long conversion shows that it moves, and what it says at its end."""

import time
from types import TracebackType

import torch
from tqdm import tqdm

from megatron.checkpoint.safetensors_file import Entry
from megatron.checkpoint.store import TensorStore


class Progress:
    """A bar over the bytes of a checkpoint's tensors, silent where there is no terminal, and the figures of a summary.

    Args:
        store: of the weights.
        dtype: that they are written in; by default as stored.
        optimizer: its state, where that is written, too.
    """

    def __init__(
        self, store: TensorStore, dtype: torch.dtype | None = None, optimizer: TensorStore | None = None
    ) -> None:
        weights, state = _entries(store, dtype), _entries(optimizer) if optimizer else []
        self.tensors = len(weights) + len(state)
        self.parameters = sum(torch.Size(entry.shape).numel() for entry in weights)
        self._what = " with optimizer state" if state else ""
        self._bar = tqdm(total=sum(entry.size for entry in weights + state), unit="B", unit_scale=True, disable=None)
        self._bytes = 0
        self._start = time.perf_counter()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def advance(self, size: int) -> None:
        """Count `size` more bytes."""
        self._bytes += size
        self._bar.update(size)

    def parameters_agree_with(self, billions: int) -> bool:
        """Whether a model called by this size may have this many parameters."""
        return abs(self.parameters / 1e9 - billions) <= max(0.1 * billions, 0.5)

    def summary(self) -> str:
        """What was done."""
        seconds = time.perf_counter() - self._start
        figures = f"{self.tensors} tensors, {self.parameters:,} parameters{self._what}, {self._bytes / 1e6:,.1f} MB"
        return f"{figures} in {seconds:.1f} s"


def _entries(store: TensorStore, dtype: torch.dtype | None = None) -> list[Entry]:
    return [Entry(name, dtype or store.dtype(name), store.shape(name)) for name in store.names()]
