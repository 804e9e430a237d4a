"""What a layer keeps of the forward pass equals the formula of `docs/costs.md`; `pytest -s` prints the page's table."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from worlds import World

from megatron.config import ModelConfig, RecomputeConfig
from megatron.model import Model, Spread
from megatron.model.cross_entropy import output_loss
from megatron.parallel.costs import activation_bytes, kept_tensors
from megatron.parallel.plan import tensor_ranges
from megatron.parallel.recompute import recomputing
from megatron.parallel.tensor import TensorSpread

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "costs.md").read_text(encoding="utf-8")
TOKENS, VOCAB_SIZE = 256, 96
SMALL = ModelConfig(
    model_name="llama2",
    hidden_size=64,
    ffn_hidden_size=176,
    num_attention_heads=8,
    num_attention_heads_kv=4,
    kv_channels=8,
    position_embedding_type="rotary",
    use_rms_norm=True,
    glu_activation="swiglu",
    tie_embed_logits=False,
    attention_dropout=0.0,
    hidden_dropout=0.0,
)
GRANULARITIES = (None, "selective", "full")


@dataclass(frozen=True)
class Case:
    """How a model is spread over ranks, and what it keeps."""

    ranks: int
    sequence_parallel: bool
    dtype: torch.dtype
    recompute: str | None = None
    recompute_num_layers: int = 1
    model: ModelConfig = SMALL

    def formula(self) -> float:
        """Bytes that a layer should keep."""
        kept = kept_tensors(
            self.model,
            compute_bytes=self.dtype.itemsize,
            tensor_size=self.ranks,
            sequence_parallel=self.sequence_parallel,
        )
        return activation_bytes(kept, TOKENS, self.recompute)

    def __str__(self) -> str:
        split = "-sequence" if self.sequence_parallel else ""
        return f"{self.ranks}{split}-{self.dtype}-{self.recompute}".replace("torch.", "")

    def row(self, measured: float) -> str:
        """A row of the page's table, in bytes a token."""
        layout = f"{self.ranks}{', sequence parallel' if self.sequence_parallel else ''}"
        dtype = str(self.dtype).removeprefix("torch.")
        formula = self.formula() / TOKENS
        return f"| {layout} | {dtype} | {self.recompute or 'none'} | {formula:g} | {measured / TOKENS:g} |"


LAYOUTS = [(1, False), (2, False), (2, True)]
CASES = [
    Case(ranks, sequence_parallel, dtype, recompute)
    for ranks, sequence_parallel in LAYOUTS
    for dtype in (torch.float32, torch.bfloat16)
    for recompute in GRANULARITIES
]


def spread_model(case: Case, layers: int) -> Model:
    """This rank's part of a model of `layers` layers."""
    config, spread = replace(case.model, num_layers=layers), Spread()
    if case.ranks > 1:
        spread = TensorSpread(
            dist.group.WORLD,
            sequence_parallel=case.sequence_parallel,
            vocab_size=VOCAB_SIZE,
            key_value_heads=config.num_attention_heads_kv,
            sums_rows_at_once=case.recompute == "selective",
        )
    model = Model(config, VOCAB_SIZE, spread=spread)
    for name, parameter in list(model.named_parameters()):
        ranges = tensor_ranges(name, tuple(parameter.shape), config, case.ranks, dist.get_rank())
        part = nn.Parameter(parameter.detach()[ranges].to(case.dtype, copy=True))
        model.get_submodule(name.rpartition(".")[0]).weight = part
    model.run_layers = recomputing(
        RecomputeConfig(recompute_granularity=case.recompute, recompute_num_layers=case.recompute_num_layers), layers
    )
    return model


def loss(model: Model) -> Tensor:
    """The forward pass of a micro batch of one document."""
    positions = torch.arange(TOKENS)
    ids = positions % VOCAB_SIZE
    head = partial(output_loss, model.spread, labels=ids, factors=torch.ones(TOKENS))
    return model(ids, positions, torch.tensor([0, TOKENS], dtype=torch.int32), TOKENS, head)


class LiveStorages(TorchDispatchMode):
    """Knows the memory of every tensor that an operation returns while the mode is on, without keeping it alive.

    Autograd's hooks would miss what selective recomputation keeps: it lies in a cache of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if type(tensor) is Tensor:
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self._storages[reference.cdata] = reference, storage.nbytes()
        return result

    def live_bytes(self, *, besides: Any = ()) -> int:
        """What is still allocated, `besides` some tensors."""
        known = {StorageWeakRef(tensor.untyped_storage()).cdata for tensor in besides}
        live = (
            size for key, (reference, size) in self._storages.items() if key not in known and not reference.expired()
        )
        return sum(live)


def measured_forward(model: Model) -> Callable[[], int]:
    """A measure of what the forward pass, which is made here, still keeps."""
    with LiveStorages() as storages:
        result = loss(model)
    return lambda: storages.live_bytes(besides=[*model.parameters(), result])


def kept_by_layers(case: Case, fewer: int, more: int) -> int:
    """What the layers keep that one model has more than another.

    On a busy machine gloo's threads let go of a message later than it is there; the measure waits for them.
    """
    measures = [measured_forward(spread_model(case, layers)) for layers in (fewer, more)]
    deadline = time.monotonic() + 10
    while True:
        small, large = (measure() for measure in measures)
        if large - small == case.formula() or time.monotonic() > deadline:
            return large - small


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_a_layer_keeps_equals_the_formula(world: World, case: Case) -> None:
    """Per layer: the difference between models of 3 and 2 layers, which takes out embedding and head."""
    for kept in world(case.ranks, kept_by_layers, case, 2, 3):
        row = case.row(kept)
        assert kept == case.formula(), row
    print(row)
    assert row in PAGE


def test_kept_key_value_heads_are_whole_where_they_are_fewer_than_ranks(world: World) -> None:
    case = Case(2, True, torch.float32, model=replace(SMALL, num_attention_heads_kv=1))
    assert world(2, kept_by_layers, case, 2, 3) == [case.formula()] * 2


def test_full_recomputation_keeps_the_input_of_each_run_of_layers(world: World) -> None:
    case = Case(1, False, torch.float32, "full", recompute_num_layers=2)
    assert world(1, kept_by_layers, case, 2, 4) == world(1, kept_by_layers, case, 4, 6) == [case.formula()]


def test_the_page_names_every_kept_tensor() -> None:
    kept = kept_tensors(SMALL, compute_bytes=2, tensor_size=2, sequence_parallel=True)
    assert [row.what for row in kept if f"| {row.what} |" not in PAGE] == []


def allocated_bytes(run: Callable[[], Any]) -> int:
    """What the allocator gave out minus what it got back during `run`, while its result is alive."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    assert result is not None
    return sum(event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")


def both_measures(case: Case) -> tuple[int, int]:
    """What a third layer adds to live storages, and to the allocator's own count."""
    models = [spread_model(case, layers) for layers in (2, 3)]
    allocated = [allocated_bytes(lambda model=model: loss(model)) for model in models]
    return kept_by_layers(case, 2, 3), allocated[1] - allocated[0]


@pytest.mark.parametrize("recompute", GRANULARITIES)
def test_the_measure_equals_the_allocator(world: World, recompute: str | None) -> None:
    """Only on one rank: there no other thread frees memory. A recomputed layer keeps the generator's state besides."""
    ((live, allocated),) = world(1, both_measures, Case(1, False, torch.bfloat16, recompute))
    assert allocated - live == (torch.get_rng_state().nbytes if recompute else 0)


def test_the_measure_counts_by_hand() -> None:
    x = torch.ones(10, requires_grad=True)
    with LiveStorages() as storages:
        kept = x * 2.0
        view, dropped = kept[:3], x + 1.0
        in_place = torch.zeros(5, dtype=torch.bfloat16).add_(1.0)
        assert storages.live_bytes() == 40 + 40 + 10
        del dropped
        assert storages.live_bytes() == 40 + 10
        assert storages.live_bytes(besides=[view]) == 10
        del in_place, kept
        assert storages.live_bytes() == 40
        del view
        assert storages.live_bytes() == 0


def test_the_measure_sees_what_selective_recomputation_caches() -> None:
    weight = torch.ones(4, 4, requires_grad=True)

    def contexts() -> Any:
        return create_selective_checkpoint_contexts([torch.ops.aten.mm.default])

    with LiveStorages() as storages:
        result = checkpoint(
            lambda x: (x @ weight).sin().cos(), torch.ones(2, 4), use_reentrant=False, context_fn=contexts
        )
    assert storages.live_bytes(besides=[result, weight]) == 2 * 2 * 4 * 4  # the input, and the cached product
