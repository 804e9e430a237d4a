"""What a layout costs, as formulas: the collectives of a micro batch, and the activations it keeps.

`docs/costs.md` derives them; tests count and measure both on real ranks, and find what is said here.
t tokens of a micro batch   h hidden   f MLP size   n heads   g key/value heads   d head size
"""

from collections import Counter
from dataclasses import dataclass

from megatron.config import ModelConfig
from megatron.model.cross_entropy import chunks

FLOAT32 = 4
"""Bytes."""

PRODUCTS = {
    "embedding": {"row": 1},
    "layer": {"column": 2, "row": 2},  # q, k, v; o; gate, up; down
    "head": {"output": 1},
}
"""Part of the model -> the products it is made of."""

STEPS = {
    ("column", "forward"): ["open"],
    ("column", "backward"): ["open", "close"],
    ("row", "forward"): ["close"],
    ("row", "backward"): ["open"],
    ("output", "forward"): ["open", "close"],  # the gradients are computed at once
    ("output", "backward"): [],
}
"""What a product does with [t, h], as in `megatron.parallel.tensor`: `open` makes it whole in t, `close` sums it."""

REPEATED = ["open", "open", "close"]
"""What full recomputation of a layer repeats: its forward pass up to the input of its last product."""

COLLECTIVES = {
    False: {"close": "all_reduce"},
    True: {"open": "all_gather", "close": "reduce_scatter"},
}
"""With sequence parallelism or without -> the collective of a step, where it has one."""


def collectives(
    part: str, direction: str, *, hidden_bytes: int, sequence_parallel: bool, recompute: str | None = None
) -> Counter[tuple[str, int]]:
    """How often a tensor-parallel rank runs each (collective, bytes of its whole tensor) for one micro batch.

    Args:
        part: "embedding", "layer" or "head".
        direction: "forward" or "backward"; what is recomputed belongs to the latter.
        hidden_bytes: of all hidden states of the micro batch, [t, h].
        sequence_parallel: as `--sequence_parallel`.
        recompute: as `--recompute_granularity`, a layer at a time.
    """
    steps = [step for product, count in PRODUCTS[part].items() for step in STEPS[product, direction] * count]
    if (part, direction, recompute) == ("layer", "backward", "full"):
        steps += REPEATED
    names = COLLECTIVES[sequence_parallel]
    return Counter((names[step], hidden_bytes) for step in steps if step in names)


def cross_entropy_collectives(tokens: int, vocab_size: int) -> Counter[tuple[str, int]]:
    """The same for the cross entropy, forward, in fp32, where no rank has more of the vocabulary than `vocab_size`.

    `tokens` are those that have a loss weight.
    In each chunk of them: the largest log-sum-exp of each token, then the sum of all and the label's logit.
    """
    counts: Counter[tuple[str, int]] = Counter()
    for part in chunks(tokens, vocab_size):
        size = (part.stop - part.start) * FLOAT32
        counts += Counter([("all_reduce", size), ("all_reduce", 2 * size)])
    return counts


@dataclass(frozen=True)
class Kept:
    """Tensors that a layer keeps from the forward to the backward pass.

    Attributes:
        what: they are.
        values: of one token on one rank.
        value_bytes: bytes of a value.
        recompute: the granularities under which they are kept.
    """

    what: str
    values: float
    value_bytes: int
    recompute: tuple[str, ...]


def kept_tensors(
    model: ModelConfig, *, compute_bytes: int, tensor_size: int, sequence_parallel: bool
) -> tuple[Kept, ...]:
    """Everything a layer may keep on one of `tensor_size` ranks, on the CPU and without dropout.

    `compute_bytes` are those of a value in the precision of the products.
    """
    h, f, n, d = model.hidden_size, model.ffn_hidden_size, model.num_attention_heads, model.kv_channels
    g = model.num_attention_heads_kv
    assert h and f and n and d and g
    heads, groups, inner = n // tensor_size, max(g // tensor_size, 1), f // tensor_size
    tokens = 1 / tensor_size if sequence_parallel else 1  # this rank's share of them between the products
    return (
        Kept("input of the layer", h * tokens, compute_bytes, ("selective", "full")),
        Kept("inputs of the norms", 2 * h * tokens, compute_bytes, ("none",)),
        Kept("reciprocal root mean squares", 2 * tokens, FLOAT32, ("none",)),
        Kept("outputs of the norms", 2 * h * tokens, compute_bytes, ("none",)),
        Kept("q, k, v", (heads + 2 * groups) * d, compute_bytes, ("none", "selective")),
        Kept("attention's output", heads * d, compute_bytes, ("none", "selective")),
        Kept("attention's log-sum-exp", heads, FLOAT32, ("none", "selective")),
        Kept("gate, up", 2 * inner, compute_bytes, ("none", "selective")),
        Kept("silu(gate), and its product with up", 2 * inner, compute_bytes, ("none",)),
        Kept("products with o and down", 2 * h * tokens, compute_bytes, ("selective",)),
    )


def activation_bytes(kept: tuple[Kept, ...], tokens: int, recompute: str | None) -> float:
    """Bytes that a layer keeps of a micro batch of `tokens`."""
    granularity = recompute or "none"
    return tokens * sum(row.values * row.value_bytes for row in kept if granularity in row.recompute)
