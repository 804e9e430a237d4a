"""Logits and hidden states of micro batches, whole, on the main rank, whatever the layout.

Each rank that holds a part sends it there: of logits the tensor-parallel ranks of the last stage their rows of the
vocabulary, of a hidden state those of its layer's stage their tokens (without sequence parallelism the first one all).

t tokens of the micro batch   h hidden   v vocabulary
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.data import MicroBatch
from megatron.model import Model
from megatron.model.attention import Documents
from megatron.model.rotary import Rotary
from megatron.parallel.build import sharded_modules
from megatron.parallel.device import to_device
from megatron.parallel.engine import Engine
from megatron.parallel.mesh import Mesh
from megatron.parallel.pipeline import run_pipeline
from megatron.parallel.plan import chunk
from megatron.parallel.schedule import Action

EMBEDDING = -1
"""Stands for the embedding among the numbers of layers."""
MAIN = 0
"""The main rank."""


@torch.no_grad()
def whole_logits(engine: Engine, micro_batches: Sequence[MicroBatch], vocab_size: int) -> list[Tensor]:
    """Logits [t, v] of each of `micro_batches` on the main rank; elsewhere nothing. All ranks call it together.

    Args:
        engine: of the model, without dropout here.
        micro_batches: one for each data-parallel rank.
        vocab_size: v.
    """
    mesh, size = engine.mesh, engine.mesh.size("tp")
    mine = _forward(engine, micro_batches[mesh.rank("dp")])
    columns = [chunk(vocab_size, size, rank)[1] for rank in range(size)]
    return [
        whole
        for number, rows in enumerate(micro_batches)
        for whole in _collect(
            mesh,
            mine if mesh.rank("dp") == number else None,
            (mesh.size("pp") - 1, number),
            [torch.Size((len(rows.tokens), count)) for count in columns],
            engine.model.compute_dtype,
            dim=1,
        )
    ]


@torch.no_grad()
def hidden_states(
    engine: Engine, micro_batches: Sequence[MicroBatch], data_rank: int, layers_of_stages: Sequence[range]
) -> dict[int, Tensor]:
    """The hidden state [t, h] after the embedding (`EMBEDDING`) and after each layer, by number, on the main rank.

    Args:
        engine: of the model, without dropout here.
        micro_batches: one for each data-parallel rank.
        data_rank: whose hidden states are wanted.
        layers_of_stages: the layers of each virtual stage, from the first.
    """
    mesh, model = engine.mesh, engine.model
    kept: dict[int, Tensor] = {}
    parts = cast("Sequence[Model]", model.chunks)
    usual = [part.run_layers for part in parts]
    for part in parts:
        part.run_layers = partial(_run_and_keep, [int(number) for number in part.layers], kept)
    _forward(engine, micro_batches[mesh.rank("dp")])
    for part, run_layers in zip(parts, usual, strict=True):
        part.run_layers = run_layers
    shape = model.hidden_shape(len(micro_batches[data_rank].tokens))
    places = [(EMBEDDING, 0), *((n, v % mesh.size("pp")) for v, layers in enumerate(layers_of_stages) for n in layers)]
    whole = {}
    for number, stage in places:
        mine = kept.pop(number, None) if mesh.rank("dp") == data_rank else None
        for state in _collect(mesh, mine, (stage, data_rank), [shape] * model.token_ranks, model.hidden_dtype, dim=0):
            whole[number] = state
    return whole


def _forward(engine: Engine, micro_batch: MicroBatch) -> Tensor | None:
    """One micro batch through the pipeline: this rank's part of the logits on the last stage."""
    engine.model.chunks.eval()
    passes = _LogitPasses(engine, micro_batch)
    run_pipeline(engine.pipeline, passes, 1, engine.mail, with_backward=False)
    for module in sharded_modules(engine.model.chunks):
        module.reshard()
    return passes.logits


class _LogitPasses:
    """The forward passes of one micro batch through the chunks of this stage."""

    def __init__(self, engine: Engine, micro_batch: MicroBatch) -> None:
        self.engine, self.micro_batch = engine, micro_batch
        self.logits: Tensor | None = None

    def compute(self, action: Action, received: Tensor | None) -> Tensor | None:
        """The hidden state for the next virtual stage; the last one keeps the logits."""
        engine, rows = self.engine, self.micro_batch
        tokens, positions, bounds = (
            to_device(array, engine.mesh.device) for array in (rows.tokens, rows.positions, rows.cu_seqlens)
        )
        part = engine.model.chunks[engine.pipeline.chunk(action)]
        result: Tensor = part(tokens, positions, bounds, rows.max_seqlen, hidden=received)
        if engine.pipeline.consumer(action):
            return result
        self.logits = result
        return None

    def room(self, action: Action) -> Tensor:
        """For a hidden state, this rank's tokens of it."""
        return self.engine.model.hidden_room(len(self.micro_batch.tokens), self.engine.mesh.device)


def _run_and_keep(
    numbers: Sequence[int],
    kept: dict[int, Tensor],
    layers: Iterable[nn.Module],
    x: Tensor,
    rotary: Rotary | None,
    documents: Documents,
) -> Tensor:
    """Pass x through `layers`, whose numbers are `numbers`, and keep what comes out of each."""
    if 0 in numbers:
        kept[EMBEDDING] = x
    for number, layer in zip(numbers, layers, strict=True):
        kept[number] = x = layer(x, rotary, documents)
    return x


def _collect(
    mesh: Mesh, mine: Tensor | None, place: tuple[int, int], shapes: Sequence[torch.Size], dtype: torch.dtype, dim: int
) -> list[Tensor]:
    """On the main rank one tensor, put together along `dim` from the parts of the ranks at `place`; elsewhere none.

    Args:
        mesh: the ranks.
        mine: this rank's part, if it is at `place`.
        place: pipeline stage and data-parallel rank.
        shapes: of the parts of the tensor-parallel ranks at `place`, in order; those beyond them send nothing.
        dtype: of the parts.
        dim: along which the tensor is divided.
    """
    here, parts = dist.get_rank(), []
    for tensor_rank, shape in enumerate(shapes):
        source = int(mesh.ranks.mesh[(*place, tensor_rank)])
        if not shape.numel() or here not in (MAIN, source):
            continue
        if here == source:
            assert mine is not None and mine.shape == shape and mine.dtype == dtype
            part = mine.contiguous()
            if here != MAIN:
                dist.send(part, MAIN)
        else:
            part = torch.empty(shape, dtype=dtype, device=mesh.device)
            dist.recv(part, source)
        parts.append(part)
    return [torch.cat(parts, dim)] if here == MAIN else []
