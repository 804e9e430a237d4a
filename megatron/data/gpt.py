"""Pretraining text: documents laid one after the other and cut into samples of equal length."""

from dataclasses import dataclass

import numpy as np

from megatron.data.batch import ONE_DOCUMENT, Array, Sample
from megatron.data.document_order import DocumentOrder, DocumentOrders
from megatron.data.indexed import IndexedDataset


class Documents:
    """The documents `start .. stop` of a token file, numbered from 0; `first` is what number 0 is in the file.

    A file that marks no documents (`doc_idx` is `[0]`) has one for each sequence.
    """

    def __init__(self, dataset: IndexedDataset, start: int, stop: int) -> None:
        self.first = start
        self._dataset = dataset
        self._sequences = document_bounds(dataset)[start : stop + 1]  # and the one after the last
        self._are_sequences = bool((self._sequences[1:] - self._sequences[:-1] == 1).all())

    def lengths(self) -> Array:
        """Tokens of each, integers [d]."""
        if self._are_sequences:
            return np.array(self._dataset.sizes[self._sequences[0] : self._sequences[-1]])
        return np.diff(self._dataset.starts(self._sequences))

    def begins(self, documents: Array) -> Array:
        """Where documents begin in the token file, int64."""
        return self._dataset.starts(self._sequences[documents])

    def tokens(self, start: int, stop: int) -> Array:
        """Tokens `start .. stop` of the token file."""
        return self._dataset.elements(start, stop)


def document_bounds(dataset: IndexedDataset) -> Array:
    """The first sequence of each document, and the number of all sequences; int64 [documents + 1]."""
    marked = dataset.doc_idx
    if len(marked) == 1:
        return np.arange(len(dataset) + 1)
    return marked if marked[-1] == len(dataset) else np.append(marked, len(dataset))


@dataclass(frozen=True, kw_only=True)
class GPTOptions:
    """How documents become samples.

    Attributes:
        seq_length: inputs of a sample.
        reset_position_ids: positions begin again with each document.
        reset_attention_mask: attention keeps within documents.
        eod_mask_loss: predicting a document's first token from the end of another weighs nothing.
    """

    seq_length: int
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False


class GPTSamples:
    """Samples of `seq_length` + 1 tokens, cut from documents across their borders; see `Samples`.

        documents of an epoch   a a a a a b b b c c c c c c ...        in an order of its own
        sample 0                a a a a a                              seq_length 4
        sample 1                        a b b b c
        sample 2                                c c c c c              the last may be shorter

    A sample begins with the last token of the one before, so that every token of an epoch but the very first is
    predicted exactly once.
    """

    def __init__(self, name: str, documents: Documents, orders: DocumentOrders, options: GPTOptions) -> None:
        self.name = name
        self._documents = documents
        self._orders = orders
        self._options = options
        self.tokens = int(documents.lengths().sum())

    def __len__(self) -> int:
        return -(-(self.tokens - 1) // self._options.seq_length)

    def lengths(self, numbers: Array) -> Array:
        """Tokens of each."""
        first = numbers % len(self) * self._options.seq_length
        return np.minimum(self.tokens - first, self._options.seq_length + 1)

    def document_starts(self, number: int) -> Array:
        """Where documents begin in a sample, if attention keeps within them."""
        return self._place(number).borders if self._options.reset_attention_mask else ONE_DOCUMENT

    def place(self, number: int) -> str:
        """The documents in their order."""
        return f"documents {', '.join(str(self._documents.first + one) for one in self._place(number).documents)}"

    def __getitem__(self, number: int) -> Sample:
        place, options = self._place(number), self._options
        weights = np.ones(place.length - 1, np.float32)
        if options.eod_mask_loss:
            weights[place.borders[1:] - 1] = 0
        return Sample(
            self._read(place),
            weights,
            document_starts=place.borders if options.reset_attention_mask else ONE_DOCUMENT,
            position_starts=place.borders if options.reset_position_ids else ONE_DOCUMENT,
        )

    def _place(self, number: int) -> "_Place":
        epoch, index = divmod(number, len(self))
        first = index * self._options.seq_length
        return _Place(self._orders.epoch(epoch), first, min(self.tokens - first, self._options.seq_length + 1))

    def _read(self, place: "_Place") -> Array:
        """The tokens of a sample, int64."""
        offsets = self._documents.begins(place.documents) - place.starts
        starts, ends = place.starts.clip(0), np.append(place.starts[1:], place.length)
        parts = zip((offsets + starts).tolist(), (offsets + ends).tolist(), strict=True)
        return np.concatenate([self._documents.tokens(start, end) for start, end in parts]).astype(np.int64)


class _Place:
    """Where a sample lies in an epoch.

    Attributes:
        length: of the sample, in tokens.
        documents: those that it has something of.
        starts: with which token of the sample they begin; the first one mostly before it.
    """

    def __init__(self, order: DocumentOrder, first: int, length: int) -> None:
        begin = int(np.searchsorted(order.starts, first, side="right")) - 1
        end = int(np.searchsorted(order.starts, first + length, side="left"))
        self.length = length
        self.documents = order.documents[begin:end]
        self.starts = np.asarray(order.starts[begin:end]) - first

    @property
    def borders(self) -> Array:
        """Where documents begin in the sample, int64, the first 0; documents without tokens are not seen."""
        return np.unique(self.starts.clip(0))
