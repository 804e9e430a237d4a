"""Writing a checkpoint: slices of weights and optimizer state, the description of the run, the tokenizer."""

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron.checkpoint.folder import RUN, folder_name, writing
from megatron.checkpoint.store import Slice, write_slices
from megatron.hf.rows import to_hf
from megatron.tokenizer import Tokenizer


def save_checkpoint(
    save: Path,
    iteration: int | None,
    run: Mapping[str, Any],
    files: Mapping[str, Iterable[Slice]],
    tokenizer: Tokenizer | Sequence[Path],
    *,
    rank: int = 0,
    is_main: bool = True,
    barrier: Callable[[], None] = lambda: None,
    progress: Callable[[int], object] = lambda size: None,
) -> Path:
    """Write a checkpoint together with all other ranks, and return its folder.

    Args:
        save: the folder of all checkpoints.
        iteration: None for a release.
        run: what run.json will hold.
        files: path below the checkpoint ("model/...", "optimizer/...") -> the slices that this rank writes there, by
            our names.
        tokenizer: to be kept with the weights, or its files.
        rank: of this process.
        is_main: whether this process writes what is not sliced.
        barrier: waits for all ranks.
        progress: is told the bytes of each slice written.
    """
    with writing(save, iteration, rank=rank, is_main=is_main, barrier=barrier) as checkpoint:
        for name, slices in files.items():
            stored = [_renamed(part) for part in slices]
            if stored:
                checkpoint.add(name, partial(write_slices, slices=stored, progress=progress))
        if is_main:
            checkpoint.add_json(RUN, run)
            with tempfile.TemporaryDirectory() as folder:
                checkpoint.add_copies("tokenizer", _tokenizer_files(tokenizer, Path(folder)))
    return save / folder_name(iteration)


def _tokenizer_files(tokenizer: Tokenizer | Sequence[Path], folder: Path) -> Sequence[Path]:
    if isinstance(tokenizer, Sequence):
        return tokenizer
    tokenizer.save(folder)
    return sorted(folder.iterdir())


def state_name(name: str, translate: Callable[[str], str]) -> str:
    """A name whose weight is translated: `exp_avg.NAME` keeps its key, a weight has none."""
    for key in ("exp_avg.", "exp_avg_sq.", "momentum_buffer."):
        if name.startswith(key):
            return key + translate(name.removeprefix(key))
    return translate(name)


def _renamed(part: Slice) -> Slice:
    name = state_name(part.name, to_hf)
    return replace(part, name=name, entry=replace(part.entry, name=name))
