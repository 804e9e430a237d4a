"""In which order samples and documents are visited, and which of them belong to which split."""

from itertools import pairwise

import numpy as np

from megatron.config import UsageError
from megatron.data.indexed import Array

SEED_MASK = (1 << 64) - 1
SAMPLES, DOCUMENTS = 0, 1
"""What is permuted: a stream of random numbers of its own for each."""


def permutation(count: int, seed: int, epoch: int, stream: int = SAMPLES) -> Array:
    """0 .. count in random order, int64 [count]; a pure function of its arguments, forever.

    Raw Philox output, which no NumPy version may change, is sorted by its upper 32 bits, 16 at a time, since NumPy
    sorts such short keys by counting them; equal keys keep their order.
    """
    key, counter = np.array([seed & SEED_MASK, epoch], np.uint64), np.array([0, 0, 0, stream], np.uint64)
    keys = np.random.Philox(key=key, counter=counter).random_raw(count) >> np.uint64(32)
    low = np.argsort(keys.astype(np.uint16), kind="stable")
    high = (keys >> np.uint64(16)).astype(np.uint16)[low]
    return low[np.argsort(high, kind="stable")]


class SampleOrder:
    """The order of samples, a pure function of (number of samples, seed).

    Shuffled, it is an endless stream of epochs, each a permutation of its own; otherwise one pass in file order, for
    evaluation. `--dataloader_type single` and `cyclic` are both this order: the shuffle of an epoch depends on nothing
    but the seed and the epoch's number.
    """

    def __init__(self, num_samples: int, seed: int, *, shuffled: bool = True) -> None:
        self._num_samples = num_samples
        self._seed = seed
        self._shuffled = shuffled
        self._newest: tuple[int, Array] | None = None

    def indices(self, start: int, count: int) -> Array:
        """Samples `start .. start + count` of the stream, int64 [count]; fewer where a single pass ends."""
        if not self._shuffled:
            return np.arange(start, min(start + count, self._num_samples), dtype=np.int64)
        parts, end = [np.empty(0, np.int64)], start + count
        while start < end:
            epoch, offset = divmod(start, self._num_samples)
            parts.append(self._epoch(epoch)[offset : offset + end - start])
            start += len(parts[-1])
        return np.concatenate(parts)

    def _epoch(self, epoch: int) -> Array:
        newest = self._newest
        if newest is None or newest[0] != epoch:
            newest = self._newest = (epoch, permutation(self._num_samples, self._seed, epoch))
        return newest[1]


def split_ranges(split: str, total: int) -> list[tuple[int, int]]:
    """(start, stop) of the train, valid and test documents among `total`, by shares such as `969,30,1`.

    Shares are separated by commas or slashes, missing ones are 0, and they need not sum up to anything. Bounds are
    rounded shares, the rounding error taken off every bound, so that the last one is `total`.

    Raises:
        UsageError: not one to three non-negative numbers of which one is positive.
    """
    try:
        shares = [float(part) for part in split.replace("/", ",").split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or not all(0 <= share < float("inf") for share in shares) or not sum(shares) > 0:
        raise UsageError(f"--split {split!r} is not up to three shares for train, valid and test, such as 969,30,1")
    shares += [0.0] * (3 - len(shares))
    bounds = [0]
    for share in shares:
        bounds.append(bounds[-1] + round(share / sum(shares) * total))
    surplus = bounds[-1] - total
    bounds = [0, *(min(max(bound - surplus, 0), total) for bound in bounds[1:])]
    return list(pairwise(bounds))
