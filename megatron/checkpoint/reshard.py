"""Checkpoints for another layout, offline: one file for each model-parallel rank, written tensor by tensor."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.folder import folder_name
from megatron.checkpoint.load import Checkpoint
from megatron.checkpoint.save import save_checkpoint
from megatron.checkpoint.store import Entry, Ranges, Slice, TensorStore
from megatron.checkpoint.vocabulary import vocabulary_size, with_vocabulary
from megatron.config import ModelConfig, UsageError
from megatron.parallel.plan import check_layout, split_of, stage_of, tensor_ranges

FLAGS = ("--target_tensor_parallel_size", "--target_pipeline_parallel_size")


@dataclass(frozen=True)
class Layout:
    """Model-parallel sizes to write for."""

    tensor: int = 1
    pipeline: int = 1

    def __post_init__(self) -> None:
        for flag, size in zip(FLAGS, (self.tensor, self.pipeline), strict=True):
            if size < 1:
                raise UsageError(f"{flag} {size} is not positive")


def reshard(
    checkpoint: Checkpoint,
    save: Path,
    layout: Layout,
    *,
    model_name: str | None = None,
    vocab_size: int | None = None,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], object] = lambda size: None,
) -> Path:
    """Write the weights of `checkpoint` below `save`, cut for `layout`; optimizer state is left out.

    Args:
        checkpoint: of any layout, or a Hugging Face folder.
        save: a folder of checkpoints.
        layout: for which one file a rank is written.
        model_name: the family to note for a Hugging Face folder; any other checkpoint knows its own.
        vocab_size: rows of the vocabulary; by default as stored.
        dtype: of the weights; by default as stored.
        progress: is told the bytes written.

    Raises:
        UsageError: the model does not divide over the layout, `vocab_size` is not positive, or `checkpoint` itself
            would be overwritten.
    """
    iteration = checkpoint.iteration or None
    if (save / folder_name(iteration)).resolve() == checkpoint.folder.resolve():
        raise UsageError(f"--save_dir {save} would overwrite the checkpoint that is read; give another folder")
    if vocab_size is not None and vocab_size < 1:
        raise UsageError(f"--true_vocab_size {vocab_size} is not positive")
    run = _description(checkpoint, layout, model_name)
    model = ModelConfig(**run["config"]["model"])
    check_layout(model, layout.tensor, layout.pipeline, FLAGS)
    weights = with_vocabulary(checkpoint.weights, vocab_size or checkpoint.vocab_size)
    run["vocab_size"] = vocabulary_size(weights)
    files = {
        f"model/model-tp{tensor:02d}-pp{stage:02d}.safetensors": list(
            _slices(weights, model, layout, tensor, stage, dtype)
        )
        for stage in range(layout.pipeline)
        for tensor in range(layout.tensor)
    }
    return save_checkpoint(save, iteration, run, files, checkpoint.tokenizer_files, progress=progress)


def _slices(
    weights: TensorStore, model: ModelConfig, layout: Layout, tensor: int, stage: int, dtype: torch.dtype | None
) -> Iterator[Slice]:
    """What the file of one model-parallel rank holds; a weight that is whole on every rank is in the first one's."""
    assert model.num_layers
    for name in weights.names():
        is_whole = split_of(name, model, layout.tensor).dim is None
        if stage_of(name, model.num_layers, layout.pipeline) != stage or (is_whole and tensor):
            continue
        shape = weights.shape(name)
        ranges = tensor_ranges(name, shape, model, layout.tensor, tensor)
        entry = Entry(name, dtype or weights.dtype(name), tuple(r.stop - r.start for r in ranges))
        if not entry.size:
            continue
        yield Slice(name, shape, tuple(r.start for r in ranges), entry, partial(_read, weights, ranges, entry))


def _read(weights: TensorStore, ranges: Ranges, entry: Entry) -> torch.Tensor:
    return weights.read(entry.name, ranges).to(entry.dtype)


def _description(checkpoint: Checkpoint, layout: Layout, model_name: str | None) -> dict[str, Any]:
    """run.json of the new checkpoint: the old one's, without what belongs to the optimizer."""
    config: Mapping[str, Any] = checkpoint.run["config"]
    model = {**config["model"], **({"model_name": model_name} if model_name and checkpoint.is_hugging_face else {})}
    sizes = {"tensor_model_parallel_size": layout.tensor, "pipeline_model_parallel_size": layout.pipeline}
    kept = ("iteration", "consumed_samples", "schedule", "tokens", "tokenizer_fingerprint", "versions")
    return {
        "config": {**config, "model": model, "parallel": {**config.get("parallel", {}), **sizes}},
        **{key: checkpoint.run[key] for key in kept if key in checkpoint.run},
    }
