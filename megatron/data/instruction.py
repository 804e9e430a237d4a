"""Instruction rows: token ids of whole conversations, and who speaks each token."""

from pathlib import Path
from typing import Any

import numpy as np

from megatron.data.indexed import IndexedDataset

Array = np.ndarray[Any, np.dtype[Any]]


def text_prefix(prefix: str | Path) -> str:
    """Prefix of the token files of the instruction dataset `prefix`."""
    return f"{prefix}-text"


def role_prefix(prefix: str | Path) -> str:
    """Prefix of the role files of the instruction dataset `prefix`."""
    return f"{prefix}-role"


def tokenizer_file(prefix: str | Path) -> Path:
    """The file that describes the tokenizer of the instruction dataset `prefix`; other tools' datasets have none."""
    return Path(f"{prefix}-tokenizer.json")


class InstructionDataset:
    """The pair `PREFIX-text` and `PREFIX-role`; `dataset[i]` is (tokens int64 [n], roles int64 [n]) of row i.

    `lengths` is int32 [rows], in tokens. `warmup` reads the files once from end to end.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, there are no rows, or the two halves are not of the same rows.
    """

    def __init__(self, prefix: str | Path, *, warmup: bool = False) -> None:
        self.prefix = str(prefix)
        self._text = IndexedDataset(text_prefix(prefix), warmup=warmup)
        self._role = IndexedDataset(role_prefix(prefix), warmup=warmup)
        self.lengths = self._text.sizes
        if not len(self._text):
            raise ValueError(f"{self._text.idx_path} has no rows")
        self._check()

    def _check(self) -> None:
        text, role = self._text, self._role
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
        return self._text[index].astype(np.int64), self._role[index].astype(np.int64)
