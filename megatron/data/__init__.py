"""Data: from jsonl files to token files, and from token files to the batches of each rank.

In: rows of text with a tokenizer (`preprocess`), or the prefixes of indexed datasets (`build_instruction_splits`).
Out: `PREFIX-text` and `PREFIX-role` files; `GlobalBatch` objects of NumPy arrays, the same samples on any layout.
"""

from megatron.data.batch import MicroBatch, RowOptions
from megatron.data.indexed import Array, IndexedDataset, IndexedWriter
from megatron.data.instruction import InstructionDataset
from megatron.data.plan import GlobalBatch, InstructionBatches
from megatron.data.splits import DataSplit, DataSplits, build_instruction_splits

__all__ = [
    "Array",
    "DataSplit",
    "DataSplits",
    "GlobalBatch",
    "IndexedDataset",
    "IndexedWriter",
    "InstructionBatches",
    "InstructionDataset",
    "MicroBatch",
    "RowOptions",
    "build_instruction_splits",
]
