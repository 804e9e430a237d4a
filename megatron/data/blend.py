"""Blends of several datasets: which of them each sample comes from."""

from collections.abc import Sequence
from fractions import Fraction
from math import lcm
from operator import add

import numpy as np

from megatron.data.batch import Array

MOST_PARTS = 1 << 19
"""Weights become whole parts of about so many; shares that take more are rounded to them."""
FIRST_BLOCK = 1 << 10


class Blend:
    """Deals a stream of samples out to datasets by weight: each sample to the one that lacks most, a tie to the first.

    Before sample i a dataset of share w lacks w * max(i, 1) less what it has given, as in Megatron-LM's
    `build_blending_indices`, but in exact arithmetic: with weights of a_1 .. a_d parts of S, all are even after S
    samples, and from there the order repeats every S. So any part of the stream is known without what comes before.
    """

    def __init__(self, weights: Sequence[Fraction]) -> None:
        self._parts = _in_parts(weights)
        self._period = sum(self._parts)
        self._lacking = list(self._parts)
        self._given = [0] * len(self._parts)
        self._known = np.empty((0, 2), np.int64)

    def choose(self, start: int, count: int) -> Array:
        """Samples `start .. start + count` of the stream, int64 [count, 2]: dataset, and which of its samples."""
        positions = np.arange(start, start + count)
        first = np.where(positions < 2 * self._period, positions, self._period + positions % self._period)
        if count:
            self._extend(int(first.max()) + 1)
        chosen = self._known[first]
        chosen[:, 1] += (positions - first) // self._period * np.array(self._parts)[chosen[:, 0]]
        return chosen

    def _extend(self, count: int) -> None:
        """Know the first `count` samples, or more: in blocks that grow, so that they are seldom."""
        known = len(self._known)
        if count <= known:
            return
        block = []
        for position in range(known, min(max(count, 2 * known, FIRST_BLOCK), 2 * self._period)):
            if position > 1:  # the first sample is given before anything is due, as if it were the second
                self._lacking = list(map(add, self._lacking, self._parts))
            chosen = self._lacking.index(max(self._lacking))
            block.append((chosen, self._given[chosen]))
            self._lacking[chosen] -= self._period
            self._given[chosen] += 1
        self._known = np.concatenate([self._known, np.array(block, np.int64)])


def _in_parts(weights: Sequence[Fraction]) -> list[int]:
    """Whole numbers in the same proportions as the weights, as small as can be."""
    shares = [Fraction(weight) / sum(weights) for weight in weights]
    total = lcm(*(share.denominator for share in shares))
    return [max(round(share * min(total, MOST_PARTS)), 1) for share in shares]
