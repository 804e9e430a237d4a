"""Which samples make a global batch, and how they are dealt to micro batches and data-parallel ranks.

Which samples: a pure function of (seed, consumed samples, datasets and their weights, global batch size), the same on
any layout of ranks (`SampleStream`). How they are dealt: by the row of `LAYOUTS` that `--packing` names.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from megatron.data.batch import Array, Dealt, MicroBatch, RowOptions, Sample, packed_rows, padded_rows
from megatron.data.packing import deal_by_tokens
from megatron.data.stream import SampleStream


@dataclass(frozen=True)
class Layout:
    """A way to lay the samples of a global batch out.

    Attributes:
        deal: (lengths of the samples, row options, data-parallel size) -> who gets which.
        rows: samples of a micro batch -> the micro batch.
    """

    deal: Callable[[Array, RowOptions, int], Dealt]
    rows: Callable[[Sequence[Sample], RowOptions], MicroBatch]


def deal_in_order(lengths: Array, options: RowOptions, data_parallel_size: int) -> Dealt:
    """Sample i goes to rank (i // micro batch size) % ranks, in micro batch i // (micro batch size * ranks)."""
    size = options.micro_batch_size
    starts = range(0, len(lengths), size * data_parallel_size)
    positions = np.arange(len(lengths))
    return [
        [positions[start + rank * size : start + (rank + 1) * size] for start in starts]
        for rank in range(data_parallel_size)
    ]


LAYOUTS = {"none": Layout(deal_in_order, padded_rows), "padding_free": Layout(deal_by_tokens, packed_rows)}
"""`--packing` -> layout."""


@dataclass(frozen=True)
class GlobalBatch:
    """One rank's part of a global batch.

    Attributes:
        micro_batches: of this rank; every rank has the same number.
        samples: int64 [n, 2], dataset and number of each sample of the whole global batch; fewer than its size where a
            single pass ends.
        document_lengths: int64 [d], inputs of each document of the whole global batch.
    """

    micro_batches: list[MicroBatch]
    samples: Array
    document_lengths: Array


@dataclass(frozen=True, kw_only=True)
class GlobalBatches:
    """Global batches of a stream of samples, for one data-parallel rank.

    Attributes:
        stream: the samples.
        rows: how samples become rows.
        packing: a key of `LAYOUTS`.
        data_parallel_rank: this rank.
        data_parallel_size: of so many.
        prefetching: build the next batch in a thread while the caller uses this one.
    """

    stream: SampleStream
    rows: RowOptions
    packing: str = "none"
    data_parallel_rank: int = 0
    data_parallel_size: int = 1
    prefetching: bool = False
    _prefetcher: "Prefetcher" = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_prefetcher", Prefetcher(self._build))

    def batch(self, consumed_samples: int, global_batch_size: int) -> GlobalBatch:
        """The global batch that starts after `consumed_samples`.

        Raises:
            OSError, ValueError: the data cannot be read.
        """
        if self.prefetching:
            return self._prefetcher.get(consumed_samples, global_batch_size)
        return self._build(consumed_samples, global_batch_size)

    def _build(self, consumed_samples: int, global_batch_size: int) -> GlobalBatch:
        layout = LAYOUTS[self.packing]
        samples = self.stream.choose(consumed_samples, global_batch_size)
        lengths = self.stream.lengths(samples)
        mine = layout.deal(lengths, self.rows, self.data_parallel_size)[self.data_parallel_rank]
        return GlobalBatch(
            micro_batches=[layout.rows(self.stream.read(samples[part]), self.rows) for part in mine],
            samples=samples,
            document_lengths=self._document_lengths(samples, self.rows.input_tokens(lengths)),
        )

    def _document_lengths(self, samples: Array, inputs: Array) -> Array:
        starts = self.stream.document_starts(samples)
        bounds = [np.append(s[s < size], size) for s, size in zip(starts, inputs, strict=True)]
        return np.concatenate([np.empty(0, np.int64), *map(np.diff, bounds)])


class Prefetcher:
    """Builds the batch after the one asked for in a thread; an error comes up when its batch is asked for."""

    def __init__(self, build: Callable[[int, int], GlobalBatch]) -> None:
        self._build = build
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="next-batch")
        self._next: tuple[tuple[int, int], Future[GlobalBatch]] | None = None

    def get(self, consumed_samples: int, global_batch_size: int) -> GlobalBatch:
        """The batch asked for; starts the one that follows it."""
        wanted = (consumed_samples, global_batch_size)
        if self._next is None or self._next[0] != wanted:
            self._next = wanted, self._thread.submit(self._build, *wanted)
        batch = self._next[1].result()
        following = (consumed_samples + global_batch_size, global_batch_size)
        self._next = following, self._thread.submit(self._build, *following)
        return batch
