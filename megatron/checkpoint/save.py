"""Writing a checkpoint: slices of weights and optimizer state, the description of the run, the tokenizer."""

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron.checkpoint.folder import RUN, TOKENIZER
from megatron.checkpoint.store import Slice, write_slices
from megatron.checkpoint.writing import Ranks, Writing
from megatron.hf.rows import to_hf
from megatron.tokenizer import Tokenizer

ALONE = Ranks()


@dataclass(frozen=True)
class Save:
    """A checkpoint that was begun.

    Attributes:
        writing: its folder.
        run: what run.json will hold.
        files: path below the checkpoint -> the slices that this rank writes there.
        tokenizer: to be kept with the weights, or its files.
        progress: is told the bytes of each slice written.
    """

    writing: Writing
    run: Mapping[str, Any]
    files: Mapping[str, Sequence[Slice]]
    tokenizer: Tokenizer | Sequence[Path]
    progress: Callable[[int], object]

    def write(self) -> None:
        """Write this rank's files; other ranks are not waited for, so that any thread can do it."""
        self.writing.add_nothing()  # for a rank that holds only copies of others' slices
        for name, slices in self.files.items():
            if slices:
                self.writing.add(name, partial(write_slices, slices=slices, progress=self.progress))
        if self.writing.ranks.is_main:
            self.writing.add_json(RUN, self.run)
            with tempfile.TemporaryDirectory() as folder:
                self.writing.add_copies(TOKENIZER, _tokenizer_files(self.tokenizer, Path(folder)))

    def finish(self, error: BaseException | None = None) -> Path:
        """Make the checkpoint visible when every rank has written its files; called by all, with what went wrong."""
        return self.writing.finish(error)

    def complete(self) -> Path:
        """Write the files and make the checkpoint visible, all at once."""
        try:
            error = attempt(self.write)
        except BaseException:
            self.writing.abandon()
            raise
        return self.finish(error)


def begin_checkpoint(
    save: Path,
    iteration: int | None,
    run: Mapping[str, Any],
    files: Mapping[str, Iterable[Slice]],
    tokenizer: Tokenizer | Sequence[Path],
    *,
    ranks: Ranks = ALONE,
    progress: Callable[[int], object] = lambda size: None,
) -> Save:
    """Make room for a checkpoint, together with all other ranks; `Save.complete` writes it.

    Args:
        save: the folder of all checkpoints.
        iteration: None for a release.
        run: what run.json will hold.
        files: path below the checkpoint ("model/...", "optimizer/...") -> the slices that this rank writes there, by
            our names.
        tokenizer: to be kept with the weights, or its files.
        ranks: that write it together.
        progress: is told the bytes of each slice written.

    Raises:
        OSError: there is not enough room, or `save` cannot be written to.
    """
    stored = {name: [_renamed(part) for part in slices] for name, slices in files.items()}
    writing = Writing(save, iteration, ranks)
    writing.begin(sum(part.entry.size for slices in stored.values() for part in slices))
    return Save(writing, run, stored, tokenizer, progress)


def attempt(work: Callable[[], object]) -> Exception | None:
    """What goes wrong in `work`."""
    try:
        work()
    except Exception as error:
        return error
    return None


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
