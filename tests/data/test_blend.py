"""Blends: in proportion, the same as Megatron-LM's, and known anywhere without what comes before."""

import json
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.blend import MOST_PARTS, Blend

HELPER = """
import json, sys
import numpy as np
from megatron.core.datasets.helpers_cpp import build_blending_indices
weights, size = json.loads(sys.argv[1]), int(sys.argv[2])
datasets, samples = np.zeros(size, np.int16), np.zeros(size, np.int64)
build_blending_indices(datasets, samples, np.array(weights), len(weights), size, False)
print(json.dumps(np.stack([datasets, samples], 1).tolist()))
"""
fractions = st.integers(1, 250).map(lambda parts: Fraction(parts, 50))


def largest_error_first(weights: Sequence[Fraction], count: int) -> list[list[int]]:
    """One sample after the other, from the first on."""
    shares = [weight / sum(weights) for weight in weights]
    given, chosen = [0] * len(shares), []
    for position in range(count):
        errors = [share * max(position, 1) - one for share, one in zip(shares, given, strict=True)]
        which = errors.index(max(errors))
        chosen.append([which, given[which]])
        given[which] += 1
    return chosen


@settings(max_examples=40, deadline=None)
@given(weights=st.lists(fractions, min_size=1, max_size=5), start=st.integers(0, 300), count=st.integers(0, 100))
def test_any_window_is_a_part_of_the_one_stream(weights: list[Fraction], start: int, count: int) -> None:
    assert Blend(weights).choose(start, count).tolist() == largest_error_first(weights, start + count)[start:]


@settings(max_examples=30, deadline=None)
@given(
    weights=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    period=st.integers(3, 10**12),
    offset=st.integers(0, 99),
)
def test_far_on_the_order_repeats(weights: list[int], period: int, offset: int) -> None:
    blend, parts, total = Blend([Fraction(weight) for weight in weights]), np.array(weights), sum(weights)
    near, far = blend.choose(total + offset, 40), blend.choose(period * total + offset, 40)
    assert far[:, 0].tolist() == near[:, 0].tolist()
    assert (far[:, 1] - near[:, 1]).tolist() == ((period - 1) * parts[near[:, 0]]).tolist()


@pytest.mark.parametrize("weights", [["0.3", "0.7"], ["1", "1", "1"], ["5", "1", "1", "0.01"], ["1e-3", "2/3"]])
def test_proportions_are_exact(weights: list[str]) -> None:
    exact = [Fraction(weight) for weight in weights]
    datasets = Blend(exact).choose(0, 20_000)[:, 0]
    for which, weight in enumerate(exact):
        given = np.cumsum(datasets == which)
        wanted = np.arange(1, len(datasets) + 1) * float(weight / sum(exact))
        assert np.abs(given - wanted).max() < 2, weights[which]


def test_weights_finer_than_the_parts_are_rounded() -> None:
    """Even a share that would be rounded to nothing is given its part."""
    blend = Blend([Fraction(123456789), Fraction(987654321), Fraction(1)])
    chosen = blend.choose(2 * MOST_PARTS, MOST_PARTS)
    shares = np.bincount(chosen[:, 0], minlength=3) / len(chosen)
    assert shares == pytest.approx([123456789 / 1111111111, 987654321 / 1111111111, 0], abs=2e-6)
    assert shares[2] > 0


@pytest.mark.slow
@pytest.mark.parametrize("weights", [["0.25", "0.75"], ["0.5", "0.25", "0.25"], ["0.125", "0.0625", "0.8125"]])
def test_equals_the_compiled_helper_of_nvidia(weights: list[str], megatron_core: Path, tmp_path: Path) -> None:
    """With weights that are exact in floating point; where others tie, there rounding decides."""
    done = subprocess.run(
        [sys.executable, "-c", HELPER, json.dumps([float(weight) for weight in weights]), "400"],
        env={"PYTHONPATH": str(megatron_core), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    expected = json.loads(done.stdout.splitlines()[-1])
    assert Blend([Fraction(weight) for weight in weights]).choose(0, 400).tolist() == expected
