"""What training makes of rows: micro batches, and how much of them is padding."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron.data import Array, RowOptions
from megatron.data.batch import Sample
from megatron.data.order import SampleOrder
from megatron.data.plan import LAYOUTS
from megatron.inspection.figures import Limit

MOST_BATCHES = 100
"""Global batches that are laid out; later ones look the same."""
WAYS: dict[str, tuple[str, Mapping[str, Any]]] = {
    "padded to --seq_length": ("none", {"variable_seq_lengths": False}),
    "padded to the longest of the micro batch": ("none", {"variable_seq_lengths": True}),
    "padding-free": ("padding_free", {"variable_seq_lengths": True}),
}
"""What a layout is called -> `--packing`, and further row options."""


@dataclass(frozen=True)
class Batching:
    """How training takes rows.

    Attributes:
        rows: how they become micro batches.
        global_batch_size: samples in a global batch.
        ranks: data-parallel ranks that share it.
        seed: of the shuffle.
    """

    rows: RowOptions
    global_batch_size: int
    ranks: int
    seed: int


@dataclass(frozen=True)
class LaidOut:
    """Global batches, laid out in one way.

    Attributes:
        name: of the way.
        micro_batches: of a rank in a global batch, on average.
        tokens: of a micro batch, on average, padding included.
        padded_share: of all tokens that are computed.
        imbalance: by how much the busiest rank's useful tokens are above the average, as a share.
    """

    name: str
    micro_batches: float
    tokens: float
    padded_share: float
    imbalance: float


def lay_out(lengths: Array, limit: Limit, batching: Batching) -> list[LaidOut]:
    """The first global batches of training on rows of `lengths` tokens, by the code that training uses, in each way."""
    indices = np.flatnonzero(limit.keeps(lengths))
    if not len(indices):
        return []
    order, size = SampleOrder(len(indices), batching.seed), batching.global_batch_size
    count = min(MOST_BATCHES, -(-len(indices) // size))
    batches = [lengths[indices[order.indices(start, size)]] for start in range(0, count * size, size)]
    return [_in_one_way(name, batches, batching) for name in WAYS]


def _in_one_way(name: str, batches: list[Array], batching: Batching) -> LaidOut:
    packing, changes = WAYS[name]
    layout, options = LAYOUTS[packing], replace(batching.rows, **changes)
    blank = np.zeros(max(int(lengths.max()) for lengths in batches), np.int64)
    computed, useful = [], []
    for lengths in batches:
        for dealt in layout.deal(lengths, options, batching.ranks):
            # Only lengths matter.
            rows = [layout.rows([Sample(blank[:n], blank[1:n]) for n in lengths[part]], options) for part in dealt]
            computed.append([len(row.tokens) for row in rows])
            useful.append(sum(row.useful_tokens for row in rows))
    of_ranks = np.array(useful, np.float64).reshape(len(batches), batching.ranks)
    means = of_ranks.mean(1)
    total, count = sum(map(sum, computed)), sum(map(len, computed))
    return LaidOut(
        name,
        micro_batches=count / len(computed),
        tokens=total / count,
        padded_share=1 - float(of_ranks.sum()) / total,
        imbalance=float((of_ranks.max(1)[means > 0] / means[means > 0] - 1).mean()) if means.any() else 0.0,
    )
