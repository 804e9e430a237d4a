"""The samples of one or more datasets in the order in which they are trained on."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

import numpy as np

from megatron.data.batch import Array, Sample
from megatron.data.blend import Blend
from megatron.data.order import SampleOrder


class Samples(Protocol):
    """What a dataset gives to train on. Number `epoch * len(samples) + i` is the i-th sample of an epoch.

    Attributes:
        name: for a reader.
    """

    name: str

    def __len__(self) -> int:
        """Samples of an epoch."""

    def lengths(self, numbers: Array) -> Array:
        """How many tokens samples have."""

    def document_starts(self, number: int) -> Array:
        """See `Sample`."""

    def place(self, number: int) -> str:
        """Where a sample is in the files, for a reader."""

    def __getitem__(self, number: int) -> Sample: ...


class SampleStream:
    """Samples in an order that is a pure function of their numbers, the weights and the seed.

    Shuffled, it is endless: every dataset epoch after epoch, each in an order of its own, and several dealt out by
    their weights (`Blend`). Otherwise it is one pass through the only dataset, in its own order.
    """

    def __init__(
        self, datasets: Sequence[Samples], weights: Sequence[Fraction] = (Fraction(1),), *, seed: int, shuffled: bool
    ) -> None:
        assert shuffled or len(datasets) == 1
        self._datasets = datasets
        self._blend = Blend(weights)
        self._orders = [SampleOrder(len(samples), seed, shuffled=shuffled) for samples in datasets]
        self._shuffled = shuffled

    def choose(self, start: int, count: int) -> Array:
        """Samples `start .. start + count`, int64 [n, 2]: dataset, and number there; fewer where a single pass ends."""
        if not self._shuffled:
            count = min(count, max(len(self._datasets[0]) - start, 0))
        chosen = self._blend.choose(start, count)
        for which, (samples, order) in enumerate(zip(self._datasets, self._orders, strict=True)):
            (places,) = np.nonzero(chosen[:, 0] == which)
            if len(places):
                visited = chosen[places, 1]
                epochs = visited // len(samples)
                chosen[places, 1] = epochs * len(samples) + order.indices(int(visited[0]), len(visited))
        return chosen

    def lengths(self, chosen: Array) -> Array:
        """Tokens of each sample, int64 [n]."""
        lengths = np.empty(len(chosen), np.int64)
        for which, samples in enumerate(self._datasets):
            places = chosen[:, 0] == which
            lengths[places] = samples.lengths(chosen[places, 1])
        return lengths

    def document_starts(self, chosen: Array) -> list[Array]:
        """Where documents begin in each sample."""
        return [self._datasets[which].document_starts(number) for which, number in chosen.tolist()]

    def places(self, chosen: Array) -> list[str]:
        """Where the samples are in the files, for a reader."""
        datasets = [self._datasets[which] for which in chosen[:, 0]]
        return [
            f"{data.name} {data.place(number)}" for data, number in zip(datasets, chosen[:, 1].tolist(), strict=True)
        ]

    def read(self, chosen: Array) -> list[Sample]:
        """The samples themselves."""
        return [self._datasets[which][number] for which, number in chosen.tolist()]
