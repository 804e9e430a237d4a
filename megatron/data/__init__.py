"""Data: from jsonl files to token files, and from token files to the batches of each rank.

In: rows of text with a tokenizer (`preprocess`), or the prefixes of indexed datasets (`build_splits`).
Out: token files, `PREFIX-text` and `PREFIX-role` or `PREFIX_KEY_document`; `GlobalBatch` objects of NumPy arrays, the
same samples on any layout.
"""

from megatron.data.batch import Array, MicroBatch, RowOptions, Sample
from megatron.data.indexed import IndexedDataset, IndexedWriter
from megatron.data.instruction import InstructionDataset
from megatron.data.plan import GlobalBatch, GlobalBatches
from megatron.data.splits import DataSplit, DataSplits, build_splits
from megatron.data.stream import Samples, SampleStream

__all__ = [
    "Array",
    "DataSplit",
    "DataSplits",
    "GlobalBatch",
    "GlobalBatches",
    "IndexedDataset",
    "IndexedWriter",
    "InstructionDataset",
    "MicroBatch",
    "RowOptions",
    "Sample",
    "SampleStream",
    "Samples",
    "build_splits",
]
