"""From a plain model to this rank's part of it: cut by the plan, sharded over data-parallel ranks, and filled.

Model of this stage's layers, on the meta device ──cut──▶ this tensor rank's rows or columns
                     ──fully_shard──▶ this data rank's rows of those ──fill──▶ values, slice by slice
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from megatron.config import ModelConfig, RunConfig
from megatron.model import Model, Spread, choose_attention_kernel
from megatron.parallel.compile import check_compiler, compilable, compile_layers
from megatron.parallel.mesh import Mesh
from megatron.parallel.plan import Split, key_value_heads, split_of, tensor_ranges, virtual_stages
from megatron.parallel.plan import chunk as chunk_of_rows
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
        other_stage: of the pipeline, holds a copy of this parameter and computes another summand of its gradient.
        is_primary: of the ranks that hold this same part, this is the one that counts and writes it.
    """

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    ranges: tuple[slice, ...]
    split: Split
    gradient_is_partial: bool
    other_stage: int | None
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
        chunks: the runs of layers of this pipeline stage, in order; one, unless the pipeline is interleaved.
        parts: every parameter stored here.
        compute_dtype: of weights and activations inside the model; what is stored is fp32.
        hidden_size: of the hidden state between the layers.
        hidden_dtype: of it.
        kernel: name of the attention kernel.
        token_ranks: over how many ranks the tokens of the hidden state are divided.
        full_sharding: weights are gathered layer by layer, and freed after use.
    """

    chunks: nn.ModuleList
    parts: Sequence[Part]
    compute_dtype: torch.dtype
    hidden_size: int
    hidden_dtype: torch.dtype
    kernel: str
    token_ranks: int = 1
    full_sharding: bool = False

    def hidden_shape(self, tokens: int) -> torch.Size:
        """Of this rank's part of the hidden state of a micro batch of `tokens`."""
        return torch.Size((tokens // self.token_ranks, self.hidden_size))

    def hidden_room(self, tokens: int, device: torch.device) -> Tensor:
        """An empty tensor for this rank's part of a hidden state, or of its gradient."""
        return torch.empty(self.hidden_shape(tokens), dtype=self.hidden_dtype, device=device)

    @torch.no_grad()
    def fill(self, read: Read) -> None:
        """Give every parameter its values; `read` is asked only for what this rank holds."""
        for part in self.parts:
            part.local.copy_(read(part.name, part.shape, part.ranges))


def sharded_modules(module: nn.Module) -> Iterator[FSDPModule]:
    """The modules inside that gather their weights and reduce their gradients as one."""
    return (part for part in module.modules() if isinstance(part, FSDPModule))


def compute_dtype(config: RunConfig) -> torch.dtype:
    """The precision of the products."""
    return torch.bfloat16 if config.precision.bf16 else torch.float16 if config.precision.fp16 else torch.float32


def build_model(config: RunConfig, vocab_size: int, mesh: Mesh) -> ParallelModel:
    """This rank's part of the model that `config` describes; its values are not set yet."""
    assert config.model.num_layers and config.model.hidden_size
    dtype = compute_dtype(config)
    kernel = choose_attention_kernel(mesh.device, dtype, config.kernel.use_flash_attn)
    granularity = config.recompute.recompute_granularity
    if config.kernel.compile:
        kernel = compilable(kernel, config.model.attention_dropout, granularity)
        check_compiler(mesh.device)
    chunks, parts = nn.ModuleList(), list[Part]()
    for layers in virtual_stages(config.parallel, config.model.num_layers)[mesh.rank("pp") :: mesh.size("pp")]:
        with torch.device("meta"):
            chunk = Model(
                config.model,
                vocab_size,
                layers=layers,
                spread=_spread(config, vocab_size, mesh),
                kernel=kernel,
                float32_residual=config.precision.fp32_residual_connection,
            )
        chunk.run_layers = recomputing(config.recompute, len(layers))
        shapes = {name: tuple(parameter.shape) for name, parameter in chunk.named_parameters()}
        _cut(chunk, shapes, config.model, mesh)
        if config.kernel.compile:
            compile_layers(chunk, granularity)
        _shard_over_data(chunk, dtype, mesh, config.parallel.full_sharding)
        chunk.to_empty(device=mesh.device)
        chunks.append(chunk)
        parts += [_part(name, p, shapes[name], config, mesh) for name, p in chunk.named_parameters()]
    return ParallelModel(
        chunks,
        parts,
        compute_dtype=dtype,
        hidden_size=config.model.hidden_size,
        hidden_dtype=torch.float32 if config.precision.fp32_residual_connection else dtype,
        kernel=kernel.name,
        token_ranks=mesh.size("tp") if config.parallel.sequence_parallel else 1,
        full_sharding=config.parallel.full_sharding,
    )


def _cut(module: Model, shapes: Mapping[str, tuple[int, ...]], model: ModelConfig, mesh: Mesh) -> None:
    """Leave only this tensor-parallel rank's rows or columns of each parameter."""
    for name, shape in shapes.items():
        local = [r.stop - r.start for r in tensor_ranges(name, shape, model, mesh.size("tp"), mesh.rank("tp"))]
        owner, _, kind = name.rpartition(".")
        setattr(module.get_submodule(owner), kind, nn.Parameter(torch.empty(local, device="meta")))


def _spread(config: RunConfig, vocab_size: int, mesh: Mesh) -> Spread:
    if mesh.size("tp") == 1:
        return Spread()
    return TensorSpread(
        mesh.group("tp"),
        sequence_parallel=config.parallel.sequence_parallel,
        vocab_size=vocab_size,
        key_value_heads=key_value_heads(config.model),
        sums_rows_at_once=config.recompute.recompute_granularity == "selective",
    )


def _shard_over_data(module: Model, dtype: torch.dtype, mesh: Mesh, full_sharding: bool) -> None:
    """FSDP2 over the data-parallel ranks: fp32 is stored, accumulated and reduced, `dtype` is gathered and computed.

    Gradients are summed, not averaged: the loss is divided by the global batch's weight beforehand. Without full
    sharding a step gathers the weights once and reduces the gradients once, whatever the number of micro batches. What
    is outside the layers is needed again at once where forward and backward pass follow each other.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in [*module.layers.values(), module]:
        frees = full_sharding and (part is not module or mesh.size("pp") > 1)
        sharded = fully_shard(part, mesh=mesh.ranks["dp"], mp_policy=policy, reshard_after_forward=frees)
        sharded.set_force_sum_reduction_for_comms(True)
        if mesh.size("dp") > 1:  # alone, FSDP2 would divide by 1 in a pass of its own
            sharded.set_gradient_divide_factor(1.0)


def _part(name: str, parameter: nn.Parameter, shape: tuple[int, ...], config: RunConfig, mesh: Mesh) -> Part:
    tensor_size, tensor_rank = mesh.size("tp"), mesh.rank("tp")
    split = split_of(name, config.model, tensor_size)
    rows, *rest = tensor_ranges(name, shape, config.model, tensor_size, tensor_rank)
    start, length = chunk_of_rows(rows.stop - rows.start, mesh.size("dp"), mesh.rank("dp"))
    start += rows.start
    other_stage = _other_stage(name, config.model, mesh)
    return Part(
        name=name,
        parameter=parameter,
        shape=shape,
        ranges=(slice(start, start + length), *rest),
        split=split,
        gradient_is_partial=tensor_size > 1
        and split.dim is None
        and (config.parallel.sequence_parallel or split.gradient_by_heads),
        other_stage=other_stage,
        is_primary=(split.dim is not None or tensor_rank == 0) and other_stage in (None, mesh.size("pp") - 1),
    )


def _other_stage(name: str, model: ModelConfig, mesh: Mesh) -> int | None:
    """Where the copy of a tied embedding is: the first stage embeds with it, the last one computes logits."""
    last = mesh.size("pp") - 1
    if not (name == "embedding.weight" and model.tie_embed_logits and last):
        return None
    return last if mesh.rank("pp") == 0 else 0
