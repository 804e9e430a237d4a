"""What is inspected: the token files of a prefix, of either kind of data."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron.config import UsageError
from megatron.data import Array, IndexedDataset, InstructionDataset
from megatron.data.gpt import document_bounds
from megatron.data.indexed import data_files
from megatron.data.instruction import role_prefix, text_prefix


@dataclass(frozen=True)
class TokenFiles:
    """The data of `prefix`.

    Attributes:
        prefix: as `--data_path` takes it.
        tokens: ids of the rows of instruction data, or of the documents of plain text.
        roles: who speaks each token; None for plain text.
        bounds: where each row or document begins in the files, and where the last ends, in elements, int64 [n + 1].
    """

    prefix: str
    tokens: IndexedDataset
    roles: IndexedDataset | None
    bounds: Array

    def __len__(self) -> int:
        """Number of rows or documents."""
        return len(self.bounds) - 1

    @cached_property
    def lengths(self) -> Array:
        """Tokens of each, int64 [n]."""
        return np.diff(self.bounds)

    @property
    def unit(self) -> str:
        """What one is called."""
        return "row" if self.roles else "document"


def open_token_files(prefix: str, data_type: str | None = None) -> TokenFiles:
    """The data of `prefix`, by default of the `--data_type` that its files show.

    Raises:
        UsageError: there are no such files.
        ValueError: a file is damaged, there are no rows, or tokens and roles are not of the same rows.
    """
    names = {"instruction": [text_prefix(prefix), role_prefix(prefix)], "gpt": [prefix]}
    files = {kind: [file for name in halves for file in data_files(name)] for kind, halves in names.items()}
    kind = data_type or next((kind for kind, all_ in files.items() if any(file.is_file() for file in all_)), None)
    if kind is None:
        raise UsageError(
            f"--data_path {prefix}: no data there, neither {files['instruction'][0]} nor {files['gpt'][0]}; give the "
            "prefix that training takes, which ends before -text.bin or .bin"
        )
    whole = prefix.removesuffix("-text").removesuffix("-role")
    if data_type is None and whole != prefix and data_files(role_prefix(whole))[1].is_file():
        raise UsageError(f"--data_path {prefix} is one half of instruction data; give {whole}")
    missing = [str(file) for file in files[kind] if not file.is_file()]
    if missing:
        raise UsageError(f"--data_path {prefix}: no such file: {', '.join(missing)} (--data_type {kind})")
    if kind == "instruction":
        rows = InstructionDataset(prefix)
        return TokenFiles(prefix, rows.text, rows.role, rows.text.starts(np.arange(len(rows) + 1)))
    text = IndexedDataset(prefix)
    if not len(text):
        raise ValueError(f"{text.idx_path} has no documents")
    return TokenFiles(prefix, text, None, text.starts(document_bounds(text)))
