"""From a plain model to this rank's part of it: cut by the plan, sharded over data-parallel ranks, and filled.

Model on the meta device ──cut──▶ this tensor rank's rows or columns ──fully_shard──▶ this data rank's rows of those
                                                                                 ──fill──▶ values, slice by slice
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from megatron.config import RunConfig
from megatron.model import Model, Spread, choose_attention_kernel
from megatron.parallel.mesh import Mesh
from megatron.parallel.plan import Split, chunk, key_value_heads, split_of, tensor_ranges
from megatron.parallel.recompute import recomputing
from megatron.parallel.tensor import TensorSpread

Read = Callable[[str, tuple[int, ...], tuple[slice, ...]], Tensor]
"""(parameter name, global shape, ranges) -> that part of the whole tensor."""


@dataclass(frozen=True)
class Part:
    """What this rank holds of one parameter.

    Attributes:
        name: as in the plain model.
        parameter: the stored parameter; its local tensor is the part.
        shape: of the whole parameter.
        ranges: which part of the whole is stored here.
        split: over tensor-parallel ranks.
        gradient_is_partial: each tensor-parallel rank computes one summand of the gradient.
        is_primary: of the ranks that hold this same part, this is the one that counts and writes it.
    """

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    ranges: tuple[slice, ...]
    split: Split
    gradient_is_partial: bool
    is_primary: bool

    @property
    def local(self) -> Tensor:
        """The values stored on this rank."""
        return local_tensor(self.parameter)


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's values of a tensor that may be sharded over data-parallel ranks."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class ParallelModel:
    """This rank's part of a model, ready to compute.

    Attributes:
        module: the model; calling it computes this rank's share.
        parts: every parameter stored here.
        compute_dtype: of weights and activations inside the model; what is stored is fp32.
        kernel: name of the attention kernel.
        full_sharding: weights are gathered layer by layer, and freed after use.
    """

    module: nn.Module
    parts: Sequence[Part]
    compute_dtype: torch.dtype
    kernel: str
    full_sharding: bool = False

    def sharded_modules(self) -> Iterator[FSDPModule]:
        """The modules that gather their weights and reduce their gradients as one."""
        return (module for module in self.module.modules() if isinstance(module, FSDPModule))

    @torch.no_grad()
    def fill(self, read: Read) -> None:
        """Give every parameter its values; `read` is asked only for what this rank holds."""
        for part in self.parts:
            part.local.copy_(read(part.name, part.shape, part.ranges))


def compute_dtype(config: RunConfig) -> torch.dtype:
    """The precision of the products."""
    return torch.bfloat16 if config.precision.bf16 else torch.float16 if config.precision.fp16 else torch.float32


def build_model(config: RunConfig, vocab_size: int, mesh: Mesh) -> ParallelModel:
    """This rank's part of the model that `config` describes; its values are not set yet."""
    model, tensor_size = config.model, mesh.size("tp")
    dtype = compute_dtype(config)
    kernel = choose_attention_kernel(mesh.device, dtype, config.kernel.use_flash_attn)
    with torch.device("meta"):
        module = Model(
            model,
            vocab_size,
            spread=_spread(config, vocab_size, mesh),
            kernel=kernel,
            float32_residual=config.precision.fp32_residual_connection,
        )
    assert model.num_layers
    module.run_layers = recomputing(config.recompute, model.num_layers)
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    for name, shape in shapes.items():
        local = [r.stop - r.start for r in tensor_ranges(name, shape, model, tensor_size, mesh.rank("tp"))]
        owner = module.get_submodule(name.rpartition(".")[0])
        owner.weight = nn.Parameter(torch.empty(local, device="meta"))
    _shard_over_data(module, dtype, mesh, config.parallel.full_sharding)
    module.to_empty(device=mesh.device)
    parts = [_part(name, p, shapes[name], config, mesh) for name, p in module.named_parameters()]
    return ParallelModel(module, parts, dtype, kernel.name, config.parallel.full_sharding)


def _spread(config: RunConfig, vocab_size: int, mesh: Mesh) -> Spread:
    if mesh.size("tp") == 1:
        return Spread()
    return TensorSpread(
        mesh.group("tp"),
        sequence_parallel=config.parallel.sequence_parallel,
        vocab_size=vocab_size,
        key_value_heads=key_value_heads(config.model),
    )


def _shard_over_data(module: Model, dtype: torch.dtype, mesh: Mesh, full_sharding: bool) -> None:
    """FSDP2 over the data-parallel ranks: fp32 is stored, accumulated and reduced, `dtype` is gathered and computed.

    Gradients are summed, not averaged: the loss is divided by the global batch's weight beforehand. Without full
    sharding a step gathers the weights once and reduces the gradients once, whatever the number of micro batches.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in [*module.layers.values(), module]:
        sharded = fully_shard(part, mesh=mesh.ranks["dp"], mp_policy=policy, reshard_after_forward=full_sharding)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)


def _part(name: str, parameter: nn.Parameter, shape: tuple[int, ...], config: RunConfig, mesh: Mesh) -> Part:
    tensor_size, tensor_rank = mesh.size("tp"), mesh.rank("tp")
    split = split_of(name, config.model, tensor_size)
    rows, *rest = tensor_ranges(name, shape, config.model, tensor_size, tensor_rank)
    start, length = chunk(rows.stop - rows.start, mesh.size("dp"), mesh.rank("dp"))
    start += rows.start
    return Part(
        name=name,
        parameter=parameter,
        shape=shape,
        ranges=(slice(start, start + length), *rest),
        split=split,
        gradient_is_partial=tensor_size > 1
        and split.dim is None
        and (config.parallel.sequence_parallel or ".attention." in name),
        is_primary=split.dim is not None or tensor_rank == 0,
    )
