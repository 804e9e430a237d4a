"""Data as it is shown: rows, documents, or samples that training cuts from documents."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron.config import DataConfig
from megatron.data import Array
from megatron.data.document_order import DocumentOrders
from megatron.data.gpt import Documents, GPTOptions, GPTSamples
from megatron.data.instruction import loss_weights
from megatron.inspection.figures import Limit
from megatron.inspection.token_files import TokenFiles


@dataclass(frozen=True)
class Stretch:
    """What is shown as one.

    Attributes:
        tokens: ids [n].
        weights: loss weight of predicting each but the first, float32 [n - 1].
        roles: who speaks each; None for plain text.
        documents: the number of the document that each belongs to, int64 [n].
        used: how many of the tokens are; those behind are cut off.
    """

    tokens: Array
    weights: Array
    roles: Array | None
    documents: Array
    used: int


class View(Protocol):
    """All stretches.

    Attributes:
        unit: what one is called.
    """

    unit: str

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Stretch: ...


class Rows:
    """Rows of instruction data."""

    unit = "row"

    def __init__(self, files: TokenFiles, limit: Limit, other_weight: float) -> None:
        self._files, self._limit, self._other_weight = files, limit, other_weight

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> Stretch:
        assert self._files.roles
        start, stop = self._files.bounds[number : number + 2].tolist()
        roles = self._files.roles.elements(start, stop)
        return Stretch(
            self._files.tokens.elements(start, stop),
            loss_weights(roles, self._other_weight),
            roles,
            np.broadcast_to(number, stop - start),
            int(self._limit.used(np.array(stop - start))),
        )


class WholeDocuments:
    """Documents of plain text, each for itself."""

    unit = "document"

    def __init__(self, files: TokenFiles) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> Stretch:
        start, stop = self._files.bounds[number : number + 2].tolist()
        tokens, length = self._files.tokens.elements(start, stop), stop - start
        weights = np.broadcast_to(np.float32(1), max(length - 1, 0))
        return Stretch(tokens, weights, None, np.broadcast_to(number, length), length)


class CutSamples:
    """Samples of `seq_length` inputs, cut from documents in the order of the file; training shuffles those."""

    unit = "sample"

    def __init__(self, files: TokenFiles, options: GPTOptions) -> None:
        self._files, self.seq_length = files, options.seq_length
        orders = DocumentOrders(lambda: files.lengths, seed=None)
        self._samples = GPTSamples(files.prefix, Documents(files.tokens, 0, len(files)), orders, options)

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, number: int) -> Stretch:
        sample = self._samples[number]
        first, length = number * self.seq_length, len(sample.tokens)
        places = self._files.bounds[0] + first + np.arange(length)
        documents = np.searchsorted(self._files.bounds, places, side="right") - 1
        return Stretch(sample.tokens, sample.weights, None, documents, length)


def open_view(files: TokenFiles, data: DataConfig, limit: Limit) -> View:
    """The data of `files` as training with these options takes it."""
    if files.roles:
        return Rows(files, limit, data.scalar_loss_mask)
    if not data.seq_length:
        return WholeDocuments(files)
    return CutSamples(files, GPTOptions(seq_length=data.seq_length, eod_mask_loss=data.eod_mask_loss))
