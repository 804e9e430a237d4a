"""`--compile` changes speed and memory, and nothing else."""

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from plain import tiny_config
from test_law import FULL, PP2, SELECTIVE, SP, TP2, assert_law, train_on_mesh
from torch import Tensor, nn
from torch.fx import GraphModule
from worlds import World

from megatron.config import UsageError
from megatron.model import AttentionKernel, Model
from megatron.model.attention import BY_DOCUMENT, Documents
from megatron.parallel.compile import check_compiler, compilable, compile_layers

NO_KERNELS = "aot_eager"
"""A backend that traces and divides into forward and backward graphs, but runs PyTorch's own operations."""


def train_compiled(flags: dict[str, Any], steps: int, backend: Any = NO_KERNELS) -> list[dict[str, Any]]:
    """On each rank: `train_on_mesh` with compiled layers."""
    torch.compiler.reset()
    with patch.object(torch, "compile", partial(torch.compile, backend=backend)):
        return train_on_mesh({**flags, "compile": True}, steps)


@pytest.mark.parametrize(("size", "flags"), [(2, {**PP2, **FULL}), (4, {**TP2, **SP})], ids=lambda value: str(value))
def test_compiled_layers_equal_one_plain_device(world: World, size: int, flags: dict[str, Any]) -> None:
    assert_law(world, size, flags, train_compiled)


def test_compiled_kernels_equal_one_plain_device(world: World) -> None:
    try:
        check_compiler(torch.device("cpu"))
    except UsageError as error:
        pytest.skip(str(error))
    assert_law(world, 1, {}, partial(train_compiled, backend="inductor"))


def graphs_of(steps: int, layers: int) -> int:
    """How many graphs `steps` batches take, whose rows differ in length, in a model of so many layers."""
    graphs: list[GraphModule] = []

    def keep(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    train_compiled({"num_layers": layers}, steps, keep)
    return len(graphs)


def test_layers_share_graphs_and_the_third_length_of_rows_needs_no_new_one(world: World) -> None:
    one, two, five, more_layers = (world(1, graphs_of, *sizes)[0] for sizes in ((1, 2), (2, 2), (5, 2), (2, 4)))
    assert 0 < one < two == five == more_layers


def attend_whole(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, dropout: float, window: int | None = None
) -> Tensor:
    """Attention within the only document. It asks for no lengths, as kernels of GPUs do not."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def kept_and_gradients(granularity: str | None) -> tuple[int, list[Tensor]]:
    """Bytes that compiled layers keep for the backward pass, and the gradients that it computes of them."""
    torch.manual_seed(0)
    torch.compiler.reset()
    tokens, bounds = torch.arange(48), torch.tensor([0, 48], dtype=torch.int32)
    model = Model(tiny_config().model, len(tokens), kernel=AttentionKernel("whole", attend_whole))
    parameters = list(model.parameters())
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.1)
    with patch.object(torch, "compile", partial(torch.compile, backend=NO_KERNELS)):
        compile_layers(model, granularity)
    kept, known = dict[int, int](), {parameter.untyped_storage().data_ptr() for parameter in parameters}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = 0 if storage.data_ptr() in known else storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(tokens, tokens, bounds, len(tokens))
    return sum(kept.values()), list(torch.autograd.grad(logits.square().mean(), parameters))


def test_selective_recomputation_is_compiled_with_the_layer() -> None:
    (everything, expected), (selected, found) = map(kept_and_gradients, (None, "selective"))
    assert selected < 0.8 * everything
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_selective_recomputation_needs_a_layer_in_one_graph() -> None:
    with pytest.raises(UsageError, match="--compile does not go with --recompute_granularity selective"):
        compilable(BY_DOCUMENT, 0.0, SELECTIVE["recompute_granularity"])


def test_where_nothing_can_be_compiled_the_flag_is_named() -> None:
    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("\nNo working C++ compiler found\nwhat to set for more information")

    with (
        patch.object(torch, "compile", lambda function: fail),
        pytest.raises(UsageError, match=r"--compile: .*\(No working C\+\+ compiler found\).* leave --compile out"),
    ):
        check_compiler(torch.device("cpu"))
