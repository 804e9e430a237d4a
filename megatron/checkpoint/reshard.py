"""Checkpoints for another layout, offline: one file for each model-parallel rank, written tensor by tensor."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.folder import folder_name
from megatron.checkpoint.load import Checkpoint
from megatron.checkpoint.save import begin_checkpoint
from megatron.checkpoint.store import Entry, Ranges, Slice, TensorStore
from megatron.checkpoint.vocabulary import ResizedVocabulary, with_vocabulary
from megatron.config import ModelConfig, UsageError
from megatron.hf.config import EXPORTED
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
    """Write `checkpoint` below `save`, cut for `layout`: each tensor of the optimizer as the weight it belongs to.

    Args:
        checkpoint: of any layout, or a Hugging Face folder; training resumes from the result as from it.
        save: a folder of checkpoints.
        layout: for which one file a rank is written.
        model_name: the family to note for a Hugging Face folder; any other checkpoint knows its own.
        vocab_size: rows of the vocabulary; by default as stored. Optimizer state of new rows is zero.
        dtype: of the weights; by default as stored. Optimizer state is always as stored.
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
    model = replace(checkpoint.model, model_name=run["config"]["model"]["model_name"])
    check_layout(model, layout.tensor, layout.pipeline, FLAGS)
    run["vocab_size"] = rows = vocab_size or checkpoint.vocab_size
    files = _files("model", with_vocabulary(checkpoint.weights, rows), model, layout, dtype)
    if checkpoint.optimizer:
        files |= _files("optimizer", ResizedVocabulary(checkpoint.optimizer, rows, as_mean=False), model, layout)
    return begin_checkpoint(save, iteration, run, files, checkpoint.tokenizer_files, progress=progress).complete()


def _files(
    folder: str, store: TensorStore, model: ModelConfig, layout: Layout, dtype: torch.dtype | None = None
) -> dict[str, list[Slice]]:
    """The files of all model-parallel ranks in "model" (weights) or "optimizer" (`KEY.WEIGHT`)."""
    weights = {name: name.partition(".")[2] if folder == "optimizer" else name for name in store.names()}
    return {
        f"{folder}/{folder}-tp{tensor:02d}-pp{stage:02d}.safetensors": list(
            _slices(store, weights, model, layout, tensor, stage, dtype)
        )
        for stage in range(layout.pipeline)
        for tensor in range(layout.tensor)
    }


def _slices(
    store: TensorStore,
    weights: Mapping[str, str],
    model: ModelConfig,
    layout: Layout,
    tensor: int,
    stage: int,
    dtype: torch.dtype | None,
) -> Iterator[Slice]:
    """What the file of one model-parallel rank holds: of each tensor the part that the rank has of its weight.

    A weight that is whole on every rank is in the first one's.
    """
    assert model.num_layers
    for name, weight in weights.items():
        is_whole = split_of(weight, model, layout.tensor).dim is None
        if stage_of(weight, model.num_layers, layout.pipeline) != stage or (is_whole and tensor):
            continue
        shape = store.shape(name)
        ranges = tensor_ranges(weight, shape, model, layout.tensor, tensor)
        entry = Entry(name, dtype or store.dtype(name), tuple(r.stop - r.start for r in ranges))
        if not entry.size:
            continue
        yield Slice(name, shape, tuple(r.start for r in ranges), entry, partial(_read, store, ranges, entry))


def _read(store: TensorStore, ranges: Ranges, entry: Entry) -> torch.Tensor:
    return store.read(entry.name, ranges).to(entry.dtype)


def _description(checkpoint: Checkpoint, layout: Layout, model_name: str | None) -> dict[str, Any]:
    """run.json of the new checkpoint: the old one's, of another layout.

    Raises:
        UsageError: `model_name` is not of the kind that the Hugging Face folder holds.
    """
    found = checkpoint.model.model_name
    if model_name and checkpoint.is_hugging_face and EXPORTED[model_name] != EXPORTED[found]:
        raise UsageError(f"{checkpoint.folder} holds a model of {found}, not of {model_name}; name that family")
    config: Mapping[str, Any] = checkpoint.run["config"]
    model = {**config["model"], **({"model_name": model_name} if model_name and checkpoint.is_hugging_face else {})}
    sizes = {"tensor_model_parallel_size": layout.tensor, "pipeline_model_parallel_size": layout.pipeline}
    return {**checkpoint.run, "config": {**config, "model": model, "parallel": {**config.get("parallel", {}), **sizes}}}
