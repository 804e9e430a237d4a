"""Vocabularies of another size than the checkpoint's: rows cut off, or new ones that start as the mean of the old."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron.checkpoint.store import BLOCK_ROWS, Ranges, TensorStore

VOCABULARY = ("embedding", "lm_head")
"""Modules whose weight has a row a token; its optimizer state, `exp_avg.embedding.weight` and so on, has one, too."""


@dataclass(frozen=True)
class ResizedVocabulary:
    """A store whose vocabulary tensors have `vocab_size` rows.

    Fewer than stored: the last rows are left out. More: each new row is the mean of the stored ones, so that a new
    token starts as no token in particular; of optimizer state (not `as_mean`) it is zero, as at the start of training.
    """

    store: TensorStore
    vocab_size: int
    as_mean: bool = True
    _means: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def names(self) -> list[str]:
        """Of all tensors."""
        return self.store.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        shape = self.store.shape(name)
        return (self.vocab_size, *shape[1:]) if _has_a_row_a_token(name) else shape

    def dtype(self, name: str) -> torch.dtype:
        """As stored."""
        return self.store.dtype(name)

    def read(self, name: str, ranges: Ranges | None = None) -> Tensor:
        """The tensor or a part of it."""
        if not _has_a_row_a_token(name):
            return self.store.read(name, ranges)
        rows, *rest = ranges or tuple(slice(0, size) for size in self.shape(name))
        stored = self.store.shape(name)[0]
        if self.vocab_size <= stored:
            return self.store.read(name, (rows, *rest))
        old = self.store.read(name, (slice(min(rows.start, stored), min(rows.stop, stored)), *rest))
        added = rows.stop - rows.start - len(old)
        row = self._mean(name)[(slice(None), *rest)] if self.as_mean else torch.zeros(1, old.shape[1])
        return torch.cat([old, row.expand(added, -1).to(old.dtype)])

    def close(self) -> None:
        """Let go of the files until they are read again."""
        self.store.close()

    def _mean(self, name: str) -> Tensor:
        if name not in self._means:
            rows, *rest = self.store.shape(name)
            whole = [slice(0, size) for size in rest]
            sums = [
                self.store.read(name, (slice(start, min(start + BLOCK_ROWS, rows)), *whole)).float().sum(0)
                for start in range(0, rows, BLOCK_ROWS)
            ]
            self._means[name] = torch.stack(sums).sum(0, keepdim=True) / rows
        return self._means[name]


def _has_a_row_a_token(name: str) -> bool:
    return name.rpartition(".")[0].rpartition(".")[2] in VOCABULARY


def with_vocabulary(store: TensorStore, vocab_size: int) -> TensorStore:
    """`store` with `vocab_size` rows in its vocabulary tensors."""
    if vocabulary_size(store) == vocab_size:
        return store
    return ResizedVocabulary(store, vocab_size)


def vocabulary_size(store: TensorStore) -> int:
    """Rows of the embedding."""
    return store.shape("embedding.weight")[0]
