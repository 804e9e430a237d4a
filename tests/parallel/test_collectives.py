"""The collectives of a micro batch, counted on real ranks, equal the formulas of `docs/costs.md`."""

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from test_activation_memory import GRANULARITIES, SMALL, TOKENS, VOCAB_SIZE, Case, loss, spread_model
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from worlds import World

from megatron.model.cross_entropy import output_loss
from megatron.parallel.costs import collectives, cross_entropy_collectives
from megatron.parallel.tensor import column_products

Counts = Counter[tuple[str, int]]
"""(collective, bytes of its whole tensor) -> how often."""

GATHER = "_c10d_functional::all_gather_into_tensor"
NAMES = {
    "_c10d_functional::all_reduce": "all_reduce",
    "_c10d_functional::reduce_scatter_tensor": "reduce_scatter",
    GATHER: "all_gather",
}
VALUE_BYTES = {"float": 4, "c10::BFloat16": 2}
CHUNK_VALUES = TOKENS * VOCAB_SIZE // 5
"""Of three chunks, whose sizes differ, on two ranks."""
ELSEWHERE = ("not a functional collective", 0)
CASES = [Case(2, split, torch.float32, recompute) for split in (False, True) for recompute in GRANULARITIES]
CASES += [Case(4, True, torch.bfloat16, "full")]


def counted(run: Callable[[], Any]) -> tuple[Any, Counts]:
    """The result of `run`, and the collectives that this rank ran meanwhile, as the profiler saw them.

    Every collective, of whatever kind and however deep inside other operations, ends in one of the process group's,
    `c10d::`. The functional one around it tells the shape: the innermost, because the profiler sees an operation twice
    under selective recomputation.
    """
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        result = run()
    events = profiler.profiler.kineto_results.events()
    functional_events = [event for event in events if event.name() in NAMES]
    counts: Counts = Counter()
    for event in events:
        if event.name().startswith("c10d::"):
            around = [outer for outer in functional_events if outer.start_ns() <= event.start_ns() < outer.end_ns()]
            counts[_described(max(around, key=lambda outer: outer.start_ns())) if around else ELSEWHERE] += 1
    return result, counts


def _described(event: Any) -> tuple[str, int]:
    values = torch.Size(event.shapes()[0]).numel() * VALUE_BYTES[event.dtypes()[0]]
    return NAMES[event.name()], values * dist.get_world_size() if event.name() == GATHER else values


def passes(case: Case, *layers: int) -> list[dict[str, Counts]]:
    """What forward and backward pass of models of several numbers of layers run."""
    counts = []
    for number in layers:
        model = spread_model(case, number)
        result, forward = counted(lambda model=model: loss(model))
        _, backward = counted(result.backward)
        counts.append({"forward": forward, "backward": backward})
    return counts


def expected(case: Case, part: str, direction: str) -> Counts:
    """The formula."""
    return collectives(
        part,
        direction,
        hidden_bytes=TOKENS * SMALL.hidden_size * case.dtype.itemsize,
        sequence_parallel=case.sequence_parallel,
        recompute=case.recompute,
    )


def times(number: int, counts: Counts) -> Counts:
    return Counter({key: number * count for key, count in counts.items()})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_collectives_equal_the_formula(world: World, case: Case) -> None:
    """A third layer adds a layer's; what two layers leave is of embedding, head and cross entropy."""
    for two, three in world(case.ranks, passes, case, 2, 3):
        for direction in ("forward", "backward"):
            layer = expected(case, "layer", direction)
            assert three[direction] == two[direction] + layer
            ends = expected(case, "embedding", direction) + expected(case, "head", direction)
            if direction == "forward":
                ends += cross_entropy_collectives(TOKENS, VOCAB_SIZE // case.ranks)
            assert two[direction] == times(2, layer) + ends


def end_passes(case: Case) -> dict[str, list[Counts]]:
    """Forward and backward of embedding and head, each by itself, with few tokens of the head a chunk."""
    model = spread_model(case, 1)
    own_tokens = TOKENS // case.ranks if case.sequence_parallel else TOKENS
    hidden = torch.randn(own_tokens, SMALL.hidden_size, dtype=case.dtype, requires_grad=True)
    ids = torch.arange(TOKENS) % VOCAB_SIZE
    runs: dict[str, Callable[[], Tensor]] = {
        "embedding": lambda: model.spread.embed(ids, model.embedding.weight),
        "head": lambda: output_loss(model.spread, hidden, model.lm_head.weight, ids, torch.ones(TOKENS)),
    }
    counts = {}
    with patch("megatron.model.cross_entropy.CHUNK_VALUES", CHUNK_VALUES):
        for name, run in runs.items():
            result, forward = counted(run)
            _, backward = counted(result.sum().backward)
            counts[name] = [forward, backward]
    return counts


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_ends_equal_the_formula(world: World, sequence_parallel: bool) -> None:
    case = Case(2, sequence_parallel, torch.bfloat16)
    with patch("megatron.model.cross_entropy.CHUNK_VALUES", CHUNK_VALUES):
        cross_entropy = cross_entropy_collectives(TOKENS, VOCAB_SIZE // case.ranks)
    assert cross_entropy.total() == 2 * 3
    for counts in world(2, end_passes, case):
        embedding, head = ([expected(case, part, way) for way in ("forward", "backward")] for part in counts)
        assert counts["embedding"] == embedding
        assert counts["head"] == [head[0] + cross_entropy, head[1]]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_longer_run_of_recomputed_layers_repeats_all_but_its_last_product(
    world: World, sequence_parallel: bool
) -> None:
    case = Case(2, sequence_parallel, torch.float32, "full", recompute_num_layers=2)
    plain = Case(2, sequence_parallel, torch.float32)
    last = "reduce_scatter" if sequence_parallel else "all_reduce"
    forward, backward = (expected(plain, "layer", direction) for direction in ("forward", "backward"))
    for two, four in world(2, passes, case, 2, 4):
        assert four["forward"] == two["forward"] + times(2, forward)
        saved = Counter({(last, TOKENS * SMALL.hidden_size * 4): 1})
        assert four["backward"] + saved == two["backward"] + times(2, backward) + times(2, forward)


def planted() -> dict[str, Counts]:
    """Collectives of known kind and size."""
    group = dist.group.WORLD
    x = torch.ones(3, 5)
    weight = torch.ones(2, 5)
    runs = {
        "all_reduce": lambda: functional.all_reduce(x, "sum", group).sum(),
        "hidden all_gather": lambda: column_products(x, [weight], group.group_name, True),
        "another all_reduce": lambda: dist.all_reduce(x),
        "broadcast": lambda: dist.broadcast(x, 0),
        "nothing": lambda: x @ weight.t(),
    }
    return {name: counted(run)[1] for name, run in runs.items()}


def test_the_counter_sees_what_is_planted(world: World) -> None:
    """Also inside a custom operation; a collective that is not a functional one is seen, though not its size."""
    for counts in world(2, planted):
        assert counts == {
            "all_reduce": {("all_reduce", 60): 1},
            "hidden all_gather": {("all_gather", 120): 1},
            "another all_reduce": {ELSEWHERE: 1},
            "broadcast": {ELSEWHERE: 1},
            "nothing": {},
        }
