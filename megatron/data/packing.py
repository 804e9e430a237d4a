"""Padding-free batches: samples dealt to data-parallel ranks by their tokens, and laid whole into rows.

global batch          A A A A A A   B B   C C C   D D D D   E
                      longest first, each to the rank with the fewest tokens so far
rank 0                A A A A A A | C C C            a rank's samples, the same way, into as few micro batches of at
rank 1                D D D D | B B | E              most micro batch size x sequence length tokens as will hold them
"""

import heapq

import numpy as np

from megatron.data.batch import Array, Dealt, RowOptions

MICRO_BATCHES_A_STAGE = 4
"""A packed batch has so many for each pipeline stage if it can: less than a fifth of the time is then idle."""


def least_micro_batches(stages: int) -> int:
    """How many micro batches a packed batch should have, to keep a pipeline of `stages` busy."""
    return MICRO_BATCHES_A_STAGE * stages if stages > 1 else 1


def deal_by_tokens(lengths: Array, options: RowOptions, data_parallel_size: int) -> Dealt:
    """Who gets which samples, heavy micro batches first.

    Every rank has the same number of micro batches: as few as hold the samples, but `least_micro_batches` if there are
    samples for so many.
    """
    sizes = options.input_tokens(lengths)
    shares = _balanced(np.arange(len(sizes)), sizes, data_parallel_size)
    capacity = options.micro_batch_size * options.seq_length
    needed = max(-(-int(sizes[share].sum()) // capacity) for share in shares)
    count = max(1, needed, min(options.least_micro_batches, *map(len, shares)))
    while True:
        dealt = [_balanced(share, sizes, count) for share in shares]
        if all(sizes[row].sum() <= capacity for rows in dealt for row in rows):
            return [sorted(rows, key=lambda row: -sizes[row].sum()) for rows in dealt]
        count += 1


def _balanced(positions: Array, sizes: Array, parts: int) -> list[Array]:
    """Positions in parts of nearly equal total size: longest first to the lightest part (Graham 1969)."""
    chosen: list[list[int]] = [[] for _ in range(parts)]
    lightest = [(0, part) for part in range(parts)]
    for position in positions[np.argsort(-sizes[positions], kind="stable")]:
        total, part = lightest[0]
        chosen[part].append(int(position))
        heapq.heapreplace(lightest, (total + int(sizes[position]), part))
    return [np.sort(np.array(part, np.int64)) for part in chosen]
