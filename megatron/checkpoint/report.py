"""How a long conversion shows that it moves, and what it says at its end."""

import time
from types import TracebackType

import torch
from tqdm import tqdm

from megatron.checkpoint.safetensors_file import Entry
from megatron.checkpoint.store import TensorStore


class Progress:
    """A bar over the bytes of a store's tensors, silent where there is no terminal, and the figures of a summary."""

    def __init__(self, store: TensorStore, dtype: torch.dtype | None = None) -> None:
        entries = [Entry(name, dtype or store.dtype(name), store.shape(name)) for name in store.names()]
        self.tensors = len(entries)
        self.parameters = sum(torch.Size(entry.shape).numel() for entry in entries)
        self._bar = tqdm(total=sum(entry.size for entry in entries), unit="B", unit_scale=True, disable=None)
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
        return abs(self.parameters / 1e9 - billions) <= 0.1 * billions

    def summary(self) -> str:
        """What was done."""
        seconds = time.perf_counter() - self._start
        return f"{self.tensors} tensors, {self.parameters:,} parameters, {self._bytes / 1e6:,.1f} MB in {seconds:.1f} s"
