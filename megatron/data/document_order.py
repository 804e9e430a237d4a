"""The order of documents in each epoch of pretraining, kept in a file beside the data for those who come after."""

import glob
import hashlib
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron.data.batch import Array
from megatron.data.order import DOCUMENTS, permutation
from megatron.data.publish import Partial

VERSION = 1
"""Of the order and of its file."""
SECONDS_TO_WRITE = 60
"""A file that has not grown for longer was left behind."""
EPOCHS_HELD = 2
"""A batch may begin in one epoch and end in the next."""


@dataclass(frozen=True)
class DocumentOrder:
    """One epoch.

    Attributes:
        documents: int64 [d], in their order.
        starts: int64 [d + 1], the token of the epoch with which each begins, and the number of all tokens.
    """

    documents: Array
    starts: Array


class DocumentOrders:
    """The order of each epoch, a pure function of (lengths of the documents, seed, epoch).

    A new epoch's order is written to `PREFIX-order-KEY-EPOCH.npy`; KEY is a hash of what the order depends on. From
    there it is memory-mapped, so that ranks on one machine share it. It is written under another name and renamed, so
    that many ranks may come at once; those that see one of them writing keep theirs in memory, as all do where no file
    can be written. The file of the epoch before stays, since other ranks may still read it, and on a network disk what
    one machine removes is lost to the others; the one before that is removed.

    Args:
        lengths: computes the lengths of the documents, integers [d].
        seed: of the shuffle; None for the order of the file, in every epoch.
        prefix: of the files; None: in memory.
    """

    def __init__(self, lengths: Callable[[], Array], seed: int | None, prefix: str | Path | None = None) -> None:
        self._lengths = lengths
        self._seed = seed
        self._prefix: str | None = None
        if prefix is not None and seed is not None:
            values = lengths()
            content = hashlib.blake2b(f"{VERSION} {seed} {values.dtype}".encode(), digest_size=8)
            content.update(np.ascontiguousarray(values).data)
            self._prefix = f"{prefix}-order-{content.hexdigest()}"
        self._held: dict[int, DocumentOrder] = {}

    @property
    def note(self) -> str:
        """A line for the user where no file can be written, else ""."""
        folder = Path(self._prefix).parent if self._prefix else None
        if folder is None or os.access(folder, os.W_OK):
            return ""
        return f"{folder} is not writable: every rank keeps the order of its documents in memory"

    def file(self, epoch: int) -> Path | None:
        """Where an epoch's order is kept."""
        return Path(f"{self._prefix}-{epoch}.npy") if self._prefix else None

    def epoch(self, epoch: int) -> DocumentOrder:
        """The order of an epoch, counted from 0."""
        epoch = 0 if self._seed is None else epoch
        if epoch not in self._held:
            self._held = dict(list(self._held.items())[1 - EPOCHS_HELD :]) | {epoch: self._open(epoch)}
        return self._held[epoch]

    def _open(self, epoch: int) -> DocumentOrder:
        path, lengths = self.file(epoch), self._lengths()
        found = _read(path, lengths) if path else None
        if found:
            return found
        order = build_order(lengths, self._seed, epoch)
        if not path:
            return order
        with suppress(OSError):
            _write(path, order)
            Path(f"{self._prefix}-{epoch - EPOCHS_HELD}.npy").unlink(missing_ok=True)
        return _read(path, lengths) or order


def build_order(lengths: Array, seed: int | None, epoch: int) -> DocumentOrder:
    """The order of an epoch, from nothing."""
    count = len(lengths)
    documents = np.arange(count) if seed is None else permutation(count, seed, epoch, DOCUMENTS)
    starts = np.zeros(count + 1, np.int64)
    np.cumsum(lengths[documents], out=starts[1:])
    return DocumentOrder(documents, starts)


def _read(path: Path, lengths: Array) -> DocumentOrder | None:
    """The order in a file; None where there is none, or not a whole one."""
    count = len(lengths)
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if values.dtype != np.int64 or values.shape != (2 * count + 1,) or values[-1] != lengths.sum(dtype=np.int64):
        return None
    return DocumentOrder(values[:count], values[count:])


def _write(path: Path, order: DocumentOrder) -> None:
    """Write the order, unless another rank is at it.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    if _is_being_written(path):
        return
    partial = Partial(path)
    try:
        np.save(partial.file, np.concatenate([order.documents, order.starts]), allow_pickle=False)
        partial.close()
        partial.place()
    finally:
        partial.discard()


def _is_being_written(path: Path) -> bool:
    """Whether another rank is at it; what a crash left behind is removed."""
    for partial in path.parent.glob(f"{glob.escape(path.name)}.*"):
        if time.time() - partial.stat().st_mtime < SECONDS_TO_WRITE:
            return True
        partial.unlink(missing_ok=True)
    return False
