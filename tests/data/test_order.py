"""Shuffling and splits."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.config import UsageError
from megatron.data.order import SampleOrder, split_ranges


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(-5, 5), st.integers(0, 200), st.integers(0, 90))
def test_any_window_is_a_part_of_the_one_stream(samples: int, seed: int, start: int, count: int) -> None:
    stream = SampleOrder(samples, seed).indices(0, 300)
    assert SampleOrder(samples, seed).indices(start, count).tolist() == stream[start : start + count].tolist()


def test_each_epoch_is_another_permutation() -> None:
    order = SampleOrder(50, 7)
    epochs = [order.indices(50 * epoch, 50).tolist() for epoch in range(4)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert SampleOrder(50, 8).indices(0, 50).tolist() != epochs[0]


def test_the_stream_is_the_same_forever() -> None:
    assert SampleOrder(10, 1234).indices(0, 20).tolist() == STREAM


STREAM = [8, 9, 7, 3, 0, 1, 4, 2, 5, 6, 0, 9, 5, 6, 4, 2, 8, 1, 7, 3]
"""First two epochs of 10 samples, seed 1234; a change here breaks the resuming of every running job."""


def test_one_pass_ends() -> None:
    order = SampleOrder(5, 1, shuffled=False)
    assert order.indices(0, 3).tolist() == [0, 1, 2]
    assert order.indices(3, 3).tolist() == [3, 4]
    assert order.indices(6, 3).tolist() == []
    assert order.indices(0, 3).dtype == np.int64


@pytest.mark.parametrize(
    ("split", "total", "expected"),
    [
        ("969, 30, 1", 9000, [(0, 8721), (8721, 8991), (8991, 9000)]),
        ("969,30,1", 1000, [(0, 969), (969, 999), (999, 1000)]),
        ("100/0/0", 7, [(0, 7), (7, 7), (7, 7)]),
        ("1", 7, [(0, 7), (7, 7), (7, 7)]),
        ("0,1", 7, [(0, 0), (0, 7), (7, 7)]),
        ("0.5,0.25,0.25", 8, [(0, 4), (4, 6), (6, 8)]),
        ("1,1,1", 10, [(0, 4), (4, 7), (7, 10)]),  # rounds to 3, 3, 3: one short, so each bound moves up by one
        ("969,30,1", 0, [(0, 0), (0, 0), (0, 0)]),
        ("0,1,1", 3, [(0, 0), (0, 1), (1, 3)]),  # rounds to 0, 2, 2: one too many
    ],
)
def test_split(split: str, total: int, expected: list[tuple[int, int]]) -> None:
    assert split_ranges(split, total) == expected


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=3).filter(any), st.integers(0, 10_000))
def test_splits_cover_everything_once(shares: list[int], total: int) -> None:
    ranges = split_ranges(",".join(map(str, shares)), total)
    assert ranges[0][0] == 0
    assert ranges[-1][1] == total
    assert all(start <= stop for start, stop in ranges)
    assert all(before[1] == after[0] for before, after in pairwise(ranges))


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "0,0,0", "-1,2", "nan", "inf,1", "1,,2"])
def test_mistakes_in_split(split: str) -> None:
    with pytest.raises(UsageError, match="--split"):
        split_ranges(split, 10)
