"""A micro batch: the tokens that go through the model together, as flat arrays with document bounds.

t tokens of the micro batch   s tokens of a row   d documents
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron.tokenizer.chat import Role

Array = np.ndarray[Any, np.dtype[Any]]
Sample = tuple[Array, Array]
"""Tokens and roles, int64 [n] each."""
Dealt = list[list[Array]]
"""[rank][micro batch] -> positions in the global batch, int64; the same number of micro batches for each rank."""
ROUNDING = 16
"""Rows of variable length are multiples of this."""


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass takes.

    Attributes:
        tokens: int64 [t], input ids.
        labels: int64 [t], the id to predict at each position.
        weights: float32 [t], weight of each position's loss; 0 means ignored.
        positions: int64 [t], position within the document.
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
        scalar_loss_mask: loss weight of tokens that are not the assistant's.
        pad_id: what fills the unused positions; any id does, since padding is known by length.
        row_multiple: t is a multiple of this (the tensor-parallel size).
        least_micro_batches: of a packed batch, if it has the samples, so that a pipeline is kept busy.
    """

    micro_batch_size: int
    seq_length: int
    variable_seq_lengths: bool = False
    scalar_loss_mask: float = 0.0
    pad_id: int = 0
    row_multiple: int = 1
    least_micro_batches: int = 1

    def input_tokens(self, lengths: Array) -> Array:
        """How many input tokens samples of `lengths` tokens have: the last one is only predicted; cut off, int64."""
        return np.clip(lengths.astype(np.int64) - 1, 0, self.seq_length)


def padded_rows(samples: Sequence[Sample], options: RowOptions) -> MicroBatch:
    """One row a sample, all of the same length s; each row is a document.

    s is `seq_length`, or with `variable_seq_lengths` the tokens of the longest sample, rounded up to a multiple of 16
    and at most `seq_length`. The loss weight at a position is by the role of its label: 1 for the assistant's tokens,
    `scalar_loss_mask` for others, 0 for padding. No samples give one ignored document of `row_multiple` tokens.
    """
    if not samples:
        return ignored_rows(options)
    length = _row_length([len(tokens) for tokens, _ in samples], options)
    tokens = np.full((len(samples), length), options.pad_id, np.int64)
    labels = np.full_like(tokens, options.pad_id)
    weights = np.zeros(tokens.shape, np.float32)
    useful = 0
    for row, sample in enumerate(samples):
        inputs, predicted, weight = _inputs(sample, options)
        size = len(inputs)
        tokens[row, :size], labels[row, :size], weights[row, :size] = inputs, predicted, weight
        useful += size
    starts = np.arange(len(samples) + 1, dtype=np.int32) * length
    return _fill_up(tokens.ravel(), labels.ravel(), weights.ravel(), starts, useful, options)


def packed_rows(samples: Sequence[Sample], options: RowOptions) -> MicroBatch:
    """The samples one after the other, each a document; those without anything to predict are left out."""
    parts = [part for part in (_inputs(sample, options) for sample in samples) if len(part[0])]
    if not parts:
        return ignored_rows(options)
    tokens, labels, weights = (np.concatenate(column) for column in zip(*parts, strict=True))
    starts = np.cumsum([0, *(len(inputs) for inputs, _, _ in parts)], dtype=np.int32)
    return _fill_up(tokens, labels, weights, starts, len(tokens), options)


def _inputs(sample: Sample, options: RowOptions) -> tuple[Array, Array, Array]:
    """(input ids, labels, loss weights by the role of the label) of a sample, cut off at `seq_length`."""
    ids, roles = sample
    size = int(options.input_tokens(np.array(len(ids))))
    weights = np.where(roles[1 : size + 1] == Role.ASSISTANT, 1.0, options.scalar_loss_mask).astype(np.float32)
    return ids[:size], ids[1 : size + 1], weights


def ignored_rows(options: RowOptions) -> MicroBatch:
    """A micro batch without samples, for ranks that have no share: one document of `row_multiple` ignored tokens."""
    nothing = np.zeros(0, np.int64)
    return _fill_up(nothing, nothing, np.zeros(0, np.float32), np.zeros(1, np.int32), 0, options)


def _row_length(sizes: Sequence[int], options: RowOptions) -> int:
    if not options.variable_seq_lengths:
        return options.seq_length
    return min(max(-(-max(sizes) // ROUNDING), 1) * ROUNDING, options.seq_length)


def _fill_up(
    tokens: Array, labels: Array, weights: Array, starts: Array, useful: int, options: RowOptions
) -> MicroBatch:
    """Add a document of ignored tokens if `row_multiple` wants it, and number the positions of each document."""
    missing = -len(tokens) % options.row_multiple if len(tokens) else options.row_multiple
    if missing:
        padding = np.full(missing, options.pad_id, np.int64)
        tokens, labels = np.concatenate([tokens, padding]), np.concatenate([labels, padding])
        weights = np.concatenate([weights, np.zeros(missing, np.float32)])
        starts = np.append(starts, np.int32(len(tokens)))
    sizes = np.diff(starts)
    return MicroBatch(
        tokens=tokens,
        labels=labels,
        weights=weights,
        positions=np.arange(len(tokens), dtype=np.int64) - np.repeat(starts[:-1].astype(np.int64), sizes),
        cu_seqlens=starts.astype(np.int32),
        max_seqlen=int(sizes.max()),
        useful_tokens=useful,
    )
