"""Checkpoints: slices of weights and optimizer state go to disk and come back, into any layout.

Out: folders of safetensors and JSON that become visible only when whole. In: those, and Hugging Face model folders.
Loading never runs code from a file.
"""

from megatron.checkpoint.folder import changed_files
from megatron.checkpoint.load import Checkpoint, open_checkpoint
from megatron.checkpoint.save import save_checkpoint
from megatron.checkpoint.store import Slice, TensorStore
from megatron.checkpoint.vocabulary import vocabulary_size, with_vocabulary

__all__ = [
    "Checkpoint",
    "Slice",
    "TensorStore",
    "changed_files",
    "open_checkpoint",
    "save_checkpoint",
    "vocabulary_size",
    "with_vocabulary",
]
