"""A micro batch: the tokens that go through the model together, as flat arrays with document bounds.

t tokens of the micro batch   s tokens of a row   n tokens of a sample   d documents
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Dealt = list[list[Array]]
"""[rank][micro batch] -> positions in the global batch, int64; the same number of micro batches for each rank."""
ROUNDING = 16
"""Rows of variable length are multiples of this."""
ONE_DOCUMENT, NOWHERE = np.zeros(1, np.int64), np.zeros(0, np.int64)
"""Where documents begin in a sample that is one, and in padding that belongs to the one before."""


@dataclass(frozen=True)
class Sample:
    """What is trained on as one: tokens, of which all but the first are predicted.

    Attributes:
        tokens: int64 [n].
        weights: float32 [n - 1], loss weight of predicting each token but the first.
        document_starts: int64 [d], where documents begin, the first 0; attention never crosses from one to the next.
        position_starts: int64, where positions begin again at 0, the first 0.
    """

    tokens: Array
    weights: Array
    document_starts: Array = field(default_factory=lambda: ONE_DOCUMENT)
    position_starts: Array = field(default_factory=lambda: ONE_DOCUMENT)


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes.

    Attributes:
        tokens: int64 [t], input ids.
        labels: int64 [t], the id to predict at each position.
        weights: float32 [t], weight of each position's loss; 0 means ignored.
        positions: int64 [t], position within the sample, or within what of it counts anew.
        cu_seqlens: int32 [d + 1], where documents begin; first 0, last t. Attention never crosses a bound.
        max_seqlen: length of the longest document.
        useful_tokens: how many of the t tokens are not padding.
    """

    tokens: Array
    labels: Array
    weights: Array
    positions: Array
    cu_seqlens: Array
    max_seqlen: int
    useful_tokens: int


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """How samples become rows.

    Attributes:
        micro_batch_size: samples in a micro batch, or, packed, tokens in it by the `seq_length`.
        seq_length: most input tokens of a sample; what is longer is cut off.
        variable_seq_lengths: make rows as long as the micro batch needs, instead of `seq_length`.
        pad_id: what fills the unused positions; any id does, since padding is known by length.
        row_multiple: t is a multiple of this (the tensor-parallel size).
        least_micro_batches: of a packed batch, if it has the samples, so that a pipeline is kept busy.
    """

    micro_batch_size: int
    seq_length: int
    variable_seq_lengths: bool = False
    pad_id: int = 0
    row_multiple: int = 1
    least_micro_batches: int = 1

    def input_tokens(self, lengths: Array) -> Array:
        """How many input tokens samples of `lengths` tokens have: the last one is only predicted; cut off, int64."""
        return np.clip(lengths.astype(np.int64) - 1, 0, self.seq_length)


def padded_rows(samples: Sequence[Sample], options: RowOptions) -> MicroBatch:
    """One row a sample, all of the same length s; padding belongs to the last document of its row.

    s is `seq_length`, or with `variable_seq_lengths` the tokens of the longest sample, rounded up to a multiple of 16
    and at most `seq_length`. Padding has weight 0. No samples give one ignored document of `row_multiple` tokens.
    """
    if not samples:
        return ignored_rows(options)
    length = _row_length([len(sample.tokens) for sample in samples], options)
    pieces = []
    for sample in samples:
        row = _predicted(sample, options)
        pieces += [row, _ignored(length - len(row.tokens), NOWHERE, options)]
    return _laid_out(pieces, options)


def packed_rows(samples: Sequence[Sample], options: RowOptions) -> MicroBatch:
    """The samples one after the other; those without anything to predict are left out."""
    pieces = (_predicted(sample, options) for sample in samples)
    return _laid_out([piece for piece in pieces if len(piece.tokens)], options)


def ignored_rows(options: RowOptions) -> MicroBatch:
    """A micro batch without samples, for ranks that have no share: one document of `row_multiple` ignored tokens."""
    return _laid_out([], options)


def _row_length(sizes: Sequence[int], options: RowOptions) -> int:
    if not options.variable_seq_lengths:
        return options.seq_length
    return min(max(-(-max(sizes) // ROUNDING), 1) * ROUNDING, options.seq_length)


@dataclass(frozen=True)
class _Piece:
    """A part of a micro batch, `useful` or padding; see `MicroBatch` and `Sample`."""

    tokens: Array
    labels: Array
    weights: Array
    document_starts: Array
    position_starts: Array
    useful: bool = True


def _predicted(sample: Sample, options: RowOptions) -> _Piece:
    """A sample's inputs, cut off at `seq_length`, and what each should predict."""
    size = int(options.input_tokens(np.array(len(sample.tokens))))
    documents, positions = (
        starts[starts < max(size, 1)] for starts in (sample.document_starts, sample.position_starts)
    )
    return _Piece(sample.tokens[:size], sample.tokens[1 : size + 1], sample.weights[:size], documents, positions)


def _ignored(length: int, starts: Array, options: RowOptions) -> _Piece:
    padding = np.full(length, options.pad_id, np.int64)
    return _Piece(padding, padding, np.zeros(length, np.float32), starts, starts, useful=False)


def _laid_out(pieces: list[_Piece], options: RowOptions) -> MicroBatch:
    """The pieces one after the other, and a document of ignored tokens more if `row_multiple` wants it."""
    total = sum(len(piece.tokens) for piece in pieces)
    missing = -total % options.row_multiple if total else options.row_multiple
    if missing:
        pieces = [*pieces, _ignored(missing, ONE_DOCUMENT, options)]
    sizes = [len(piece.tokens) for piece in pieces]
    offsets = np.cumsum([0, *sizes])
    placed = list(zip(pieces, offsets, strict=False))
    bounds = np.concatenate([*(piece.document_starts + offset for piece, offset in placed), offsets[-1:]])
    restarts = np.concatenate([*(piece.position_starts + offset for piece, offset in placed), offsets[-1:]])
    return MicroBatch(
        tokens=np.concatenate([piece.tokens for piece in pieces]),
        labels=np.concatenate([piece.labels for piece in pieces]),
        weights=np.concatenate([piece.weights for piece in pieces]),
        positions=np.arange(offsets[-1]) - np.repeat(restarts[:-1], np.diff(restarts)),
        cu_seqlens=bounds.astype(np.int32),
        max_seqlen=int(np.diff(bounds).max()),
        useful_tokens=sum(size for piece, size in zip(pieces, sizes, strict=True) if piece.useful),
    )
