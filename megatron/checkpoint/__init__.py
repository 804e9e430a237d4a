"""Checkpoints: slices of weights and optimizer state go to disk and come back, into any layout.

Out: folders of safetensors and JSON that become visible only when whole. In: those, and Hugging Face model folders.
Loading never runs code from a file.
"""

from megatron.checkpoint.folder import holds_checkpoints
from megatron.checkpoint.integrity import is_changed, large_files
from megatron.checkpoint.load import Checkpoint, open_checkpoint
from megatron.checkpoint.retention import prune
from megatron.checkpoint.save import Save, begin_checkpoint
from megatron.checkpoint.store import Slice, TensorStore
from megatron.checkpoint.vocabulary import vocabulary_size, with_vocabulary
from megatron.checkpoint.writing import Ranks

__all__ = [
    "Checkpoint",
    "Ranks",
    "Save",
    "Slice",
    "TensorStore",
    "begin_checkpoint",
    "holds_checkpoints",
    "is_changed",
    "large_files",
    "open_checkpoint",
    "prune",
    "vocabulary_size",
    "with_vocabulary",
]
