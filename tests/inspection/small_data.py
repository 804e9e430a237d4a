"""Small token files, written from lists."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron.data import IndexedWriter

Row = tuple[Sequence[int], Sequence[int]]
"""Ids and roles."""
MARKERS = "<|im_start|>,<|im_end|>"


def typed(model: Path) -> dict[str, str]:
    """The tokenizer's flags, by field name."""
    kind = "SentencePieceTokenizer"
    return {"tokenizer_type": kind, "vocab_file": str(model), "vocab_extra_ids_list": MARKERS}


def write_rows(prefix: Path, rows: Sequence[Row], dtype: str = "<u2") -> str:
    """Instruction data; the prefix."""
    with IndexedWriter(f"{prefix}-text", dtype) as text, IndexedWriter(f"{prefix}-role", "<u2") as role:
        for ids, roles in rows:
            text.append(np.array(ids, dtype))
            role.append(np.array(roles, "<u2"))
    return str(prefix)


def write_documents(prefix: Path, documents: Sequence[Sequence[int]]) -> str:
    """Plain text; the prefix."""
    with IndexedWriter(prefix, "<u2") as text:
        for ids in documents:
            text.append(np.array(ids, "<u2"))
    return str(prefix)
