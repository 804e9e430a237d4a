"""Which samples make a global batch, and how they are dealt to micro batches and data-parallel ranks.

Which samples: a pure function of (seed, consumed samples, number of samples, global batch size), the same on any layout
of ranks. How they are dealt: by the row of `LAYOUTS` that `--packing` names.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from megatron.data.batch import Dealt, MicroBatch, RowOptions, Sample, packed_rows, padded_rows
from megatron.data.indexed import Array
from megatron.data.instruction import InstructionDataset
from megatron.data.order import SampleOrder
from megatron.data.packing import deal_by_tokens


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
        sample_indices: int64 [n], dataset rows of the whole global batch; fewer than its size where a single pass ends.
        input_tokens: int64 [n], of each of them, cut off at `seq_length`.
        truncated: how many samples of the whole global batch are longer than `seq_length` inputs and were cut.
    """

    micro_batches: list[MicroBatch]
    sample_indices: Array
    input_tokens: Array
    truncated: int


@dataclass(frozen=True, kw_only=True)
class InstructionBatches:
    """Global batches of instruction rows, for one data-parallel rank.

    Attributes:
        dataset: all rows.
        indices: int64, those that belong to this split.
        rows: how samples become rows.
        packing: a key of `LAYOUTS`.
        data_parallel_rank: this rank.
        data_parallel_size: of so many.
        seed: of the shuffle.
        shuffled: endless shuffled epochs, or one pass in file order.
        prefetching: build the next batch in a thread while the caller uses this one.
    """

    dataset: InstructionDataset
    indices: Array
    rows: RowOptions
    packing: str = "none"
    data_parallel_rank: int = 0
    data_parallel_size: int = 1
    seed: int = 1234
    shuffled: bool = True
    prefetching: bool = False
    _order: SampleOrder = field(init=False, repr=False)
    _prefetcher: "Prefetcher" = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_order", SampleOrder(len(self.indices), self.seed, shuffled=self.shuffled))
        object.__setattr__(self, "_prefetcher", Prefetcher(self._build))

    def __len__(self) -> int:
        """Number of samples of one pass."""
        return len(self.indices)

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
        samples = self.indices[self._order.indices(consumed_samples, global_batch_size)]
        lengths = self.dataset.lengths[samples]
        mine = layout.deal(lengths, self.rows, self.data_parallel_size)[self.data_parallel_rank]
        return GlobalBatch(
            micro_batches=[layout.rows([self.dataset[int(i)] for i in samples[part]], self.rows) for part in mine],
            sample_indices=samples,
            input_tokens=self.rows.input_tokens(lengths),
            truncated=int((lengths > self.rows.seq_length + 1).sum()),
        )


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
