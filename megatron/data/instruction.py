"""Instruction rows: token ids of whole conversations, and who speaks each token."""

from pathlib import Path

import numpy as np

from megatron.data.batch import ONE_DOCUMENT, Sample
from megatron.data.indexed import Array, IndexedDataset
from megatron.tokenizer.chat import Role


def text_prefix(prefix: str | Path) -> str:
    """Prefix of the token files of the instruction dataset `prefix`."""
    return f"{prefix}-text"


def role_prefix(prefix: str | Path) -> str:
    """Prefix of the role files of the instruction dataset `prefix`."""
    return f"{prefix}-role"


class InstructionDataset:
    """The pair `PREFIX-text` and `PREFIX-role`; `dataset[i]` is (tokens int64 [n], roles int64 [n]) of row i.

    `lengths` is int32 [rows], in tokens; `text` and `role` are the two halves. `warmup` reads the files once from end
    to end.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, there are no rows, or the two halves are not of the same rows.
    """

    def __init__(self, prefix: str | Path, *, warmup: bool = False) -> None:
        self.prefix = str(prefix)
        self.text = IndexedDataset(text_prefix(prefix), warmup=warmup)
        self.role = IndexedDataset(role_prefix(prefix), warmup=warmup)
        self.lengths = self.text.sizes
        if not len(self.text):
            raise ValueError(f"{self.text.idx_path} has no rows")
        self._check()

    def _check(self) -> None:
        text, role = self.text, self.role
        if len(text) != len(role):
            raise ValueError(f"{text.idx_path} has {len(text):,} rows, but {role.idx_path} has {len(role):,}")
        differing = np.flatnonzero(text.sizes != role.sizes)
        if len(differing):
            row = int(differing[0])
            raise ValueError(
                f"row {row} has {int(text.sizes[row]):,} tokens in {text.idx_path}, "
                f"but {int(role.sizes[row]):,} roles in {role.idx_path}"
            )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[Array, Array]:
        return self.text[index].astype(np.int64), self.role[index].astype(np.int64)


class InstructionSamples:
    """Some rows of an instruction dataset to train on, each a document; see `Samples`.

    Args:
        dataset: all rows.
        rows: int64, those that there are.
        scalar_loss_mask: loss weight of tokens that are not the assistant's.
    """

    def __init__(self, dataset: InstructionDataset, rows: Array, scalar_loss_mask: float = 0.0) -> None:
        self.name = dataset.prefix
        self._dataset = dataset
        self._rows = rows
        self._scalar_loss_mask = scalar_loss_mask

    def __len__(self) -> int:
        return len(self._rows)

    def lengths(self, numbers: Array) -> Array:
        """Tokens of each."""
        return self._dataset.lengths[self._rows[numbers % len(self)]]

    def document_starts(self, number: int) -> Array:
        """A row is one document."""
        return ONE_DOCUMENT

    def place(self, number: int) -> str:
        """The row."""
        return f"row {self._rows[number % len(self)]}"

    def __getitem__(self, number: int) -> Sample:
        tokens, roles = self._dataset[int(self._rows[number % len(self)])]
        return Sample(tokens, loss_weights(roles, self._scalar_loss_mask))


def loss_weights(roles: Array, other_weight: float) -> Array:
    """Loss weights of predicting all tokens but the first: 1 for the assistant's, else `other_weight`; float32."""
    return np.where(roles[1:] == Role.ASSISTANT, 1.0, other_weight).astype(np.float32)
