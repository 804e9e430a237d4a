"""Forward and backward of a global batch: what turns micro batches into gradients and a loss.

Loss of a step = sum of weighted token losses / sum of weights, both over the *global* batch, so that it does not depend
on how the batch is divided into micro batches and ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.data import MicroBatch
from megatron.model import Model, Spread
from megatron.model.cross_entropy import likeliest, output_loss, token_losses
from megatron.parallel.build import ParallelModel, local_tensor, sharded_modules
from megatron.parallel.device import to_device
from megatron.parallel.mesh import Mesh
from megatron.parallel.pipeline import Mail, run_pipeline
from megatron.parallel.schedule import Action, Pipeline


@dataclass(frozen=True)
class BatchLoss:
    """The loss of a global batch.

    Attributes:
        mean: weighted mean over its tokens; 0 where no token has weight.
        weight: sum of the loss weights.
        useful_tokens: tokens of samples, padding left out.
        tokens: tokens computed, padding included.
        imbalance: tokens of the data-parallel rank that has most, over their mean, less 1.
        sums: what a `Measure` added up, over its micro batches on all ranks.
    """

    mean: float
    weight: float
    useful_tokens: int
    tokens: int
    imbalance: float
    sums: tuple[float, ...] = ()


class Measure(Protocol):
    """Sums over tokens that an evaluation wants beside the loss."""

    @property
    def size(self) -> int:
        """How many sums."""

    def sums(self, rows: MicroBatch, losses: Tensor, predict: Callable[[], Tensor]) -> Tensor:
        """The sums over the tokens of a micro batch, float64 [size] on the device; called on the last stage.

        Args:
            rows: the micro batch.
            losses: of each token, fp32 [t].
            predict: computes the likeliest id at each position, int64 [t]; all tensor-parallel ranks call it, or none.
        """


class Engine:
    """Runs global batches through a model.

    Args:
        model: this rank's part.
        mesh: the grid of ranks.
        seed: of dropout; its masks are a pure function of (seed, consumed samples, micro batch, data-parallel rank,
            virtual stage).
        per_token: in training, divide by the weights of the global batch; else, as the reference does, take the mean
            of the micro batches' means.
    """

    def __init__(self, model: ParallelModel, mesh: Mesh, *, seed: int, per_token: bool = True) -> None:
        self.model = model
        self.mesh = mesh
        self.seed = seed
        self.per_token = per_token
        self.pipeline = Pipeline(mesh.size("pp"), len(model.chunks))
        self.mail = Mail(mesh.group("pp"))
        mesh.sum([0.0], "pp")  # NCCL wants all ranks of a group in its first call, and an exchange is of two

    def forward_backward(
        self, micro_batches: Sequence[MicroBatch], consumed_samples: int, loss_scale: float = 1.0
    ) -> BatchLoss:
        """Leave the gradient of the global batch's loss times `loss_scale` in the parameters, and return the loss.

        Where no token of the global batch has weight there is nothing to learn: no pass is run, no gradient is left.
        """
        self.model.chunks.train()
        return self._run(micro_batches, consumed_samples, loss_scale)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch], measure: Measure | None = None) -> BatchLoss:
        """The loss, and what `measure` adds up, without dropout."""
        self.model.chunks.eval()
        loss = self._run(micro_batches, 0, None, measure)
        for module in sharded_modules(self.model.chunks):
            module.reshard()
        return loss

    def _run(
        self,
        micro_batches: Sequence[MicroBatch],
        consumed_samples: int,
        loss_scale: float | None,
        measure: Measure | None = None,
    ) -> BatchLoss:
        counts = [_counts(rows) for rows in micro_batches]
        ranks = self.mesh.gather([*map(sum, zip(*counts, strict=True)), len(micro_batches)], "dp")
        weight, useful, tokens, batches = map(sum, zip(*ranks, strict=True))
        total, sums = 0.0, [0.0] * (measure.size if measure else 0)
        if weight:
            by_token = self.per_token or loss_scale is None
            divisors = [weight if by_token else batches * (own or 1.0) for own, *_ in counts]
            passes = _StagePasses(
                model=self.model,
                pipeline=self.pipeline,
                device=self.mesh.device,
                micro_batches=micro_batches,
                divisors=divisors,
                seeds=(self.seed, consumed_samples, self.mesh.rank("dp")),
                loss_scale=loss_scale,
                measure=measure,
            )
            run_pipeline(self.pipeline, passes, len(micro_batches), self.mail, with_backward=loss_scale is not None)
            total, sums = float(passes.loss), passes.sums.tolist()
            if loss_scale is not None:
                self._complete_gradients()
        mean, *sums = self.mesh.sum(self.mesh.sum([total, *sums], "dp"), "pp")
        imbalance = max(rank[2] for rank in ranks) * len(ranks) / tokens - 1 if tokens else 0.0
        return BatchLoss(mean, weight, int(useful), int(tokens), imbalance, tuple(sums))

    def _complete_gradients(self) -> None:
        """Add up gradients of which ranks hold summands: one collective for all that tensor-parallel ranks share."""
        gradients = {
            part.name: (part, local_tensor(part.parameter.grad))
            for part in self.model.parts
            if part.parameter.grad is not None
        }
        partial = [gradient for part, gradient in gradients.values() if part.gradient_is_partial]
        if partial:
            flat = torch.cat([gradient.flatten() for gradient in partial])
            dist.all_reduce(flat, group=self.mesh.group("tp"))
            for gradient, whole in zip(partial, flat.split([g.numel() for g in partial]), strict=True):
                gradient.copy_(whole.view_as(gradient))
        for part, gradient in gradients.values():
            if part.other_stage is not None:
                gradient += self.mail.swap(gradient, part.other_stage)


@dataclass(kw_only=True)
class _StagePasses:
    """The passes of one global batch through the chunks of this stage.

    A micro batch's sum of weighted token losses is divided by its divisor; without `loss_scale` there is no backward.
    """

    model: ParallelModel
    pipeline: Pipeline
    device: torch.device
    micro_batches: Sequence[MicroBatch]
    divisors: Sequence[float]
    seeds: tuple[int, ...]
    loss_scale: float | None
    measure: Measure | None

    def __post_init__(self) -> None:
        self.loss = torch.zeros((), device=self.device)
        self.sums = torch.zeros(self.measure.size if self.measure else 0, dtype=torch.float64, device=self.device)
        self._kept: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}

    def compute(self, action: Action, received: Tensor | None) -> Tensor | None:
        """A forward pass gives the hidden state, a backward pass the gradient of what the forward pass received."""
        return self._forward(action, received) if action.is_forward else self._backward(action, received)

    def room(self, action: Action) -> Tensor:
        """For a hidden state or its gradient, this rank's tokens of it."""
        return self.model.hidden_room(len(self.micro_batches[action.micro_batch].tokens), self.device)

    def _forward(self, action: Action, hidden: Tensor | None) -> Tensor | None:
        torch.manual_seed(hash((*self.seeds, action.micro_batch, action.virtual_stage)) % 2**63)
        if hidden is not None:
            hidden.requires_grad_(self.loss_scale is not None)
        rows = self.micro_batches[action.micro_batch]
        is_last = self.pipeline.consumer(action) is None
        tokens, positions, bounds = (
            to_device(array, self.device) for array in (rows.tokens, rows.positions, rows.cu_seqlens)
        )
        chunk = cast(Model, self.model.chunks[self.pipeline.chunk(action)])
        head = self._evaluation_losses if self.loss_scale is None else self._training_loss
        at_end = partial(head, action) if is_last else None
        result = chunk(tokens, positions, bounds, rows.max_seqlen, at_end, hidden)
        if self.loss_scale is not None:
            self._kept[action.virtual_stage, action.micro_batch] = hidden, result
        return None if is_last else result.detach()

    def _training_loss(self, action: Action, x: Tensor, weight: Tensor) -> Tensor:
        """The micro batch's part of the loss, scaled."""
        spread, labels, weights = self._supervision(action)
        assert self.loss_scale
        factors = weights * (self.loss_scale / self.divisors[action.micro_batch])
        which = np.flatnonzero(self.micro_batches[action.micro_batch].weights)
        supervised = to_device(which, self.device) if len(which) < len(labels) else None
        loss = output_loss(spread, x, weight, labels, factors, supervised)
        self.loss += loss.detach() / self.loss_scale
        return loss

    def _evaluation_losses(self, action: Action, x: Tensor, weight: Tensor) -> Tensor:
        """The losses of its tokens; what is wanted beside the loss is added up while there is the hidden state."""
        spread, labels, weights = self._supervision(action)
        losses = token_losses(spread, x, weight, labels)
        self.loss += losses @ weights / self.divisors[action.micro_batch]
        if self.measure:
            rows = self.micro_batches[action.micro_batch]
            self.sums += self.measure.sums(rows, losses, lambda: likeliest(spread, x, weight))
        return losses

    def _supervision(self, action: Action) -> tuple[Spread, Tensor, Tensor]:
        """How the last chunk is spread; labels and weights of the micro batch."""
        rows = self.micro_batches[action.micro_batch]
        chunk = cast(Model, self.model.chunks[self.pipeline.chunk(action)])
        return chunk.spread, to_device(rows.labels, self.device), to_device(rows.weights, self.device)

    def _backward(self, action: Action, gradient: Tensor | None) -> Tensor | None:
        self._prepare_backward(action)
        hidden, result = self._kept.pop((action.virtual_stage, action.micro_batch))
        torch.autograd.backward(result, gradient)
        return None if hidden is None else hidden.grad

    def _prepare_backward(self, action: Action) -> None:
        """Let gradients be reduced and gathered weights be freed only after the last micro batch.

        Full sharding does both after each one, which is what it saves memory by.
        """
        last = action.micro_batch == len(self.micro_batches) - 1
        reduces = last or self.model.full_sharding
        for module in sharded_modules(self.model.chunks[self.pipeline.chunk(action)]):
            module.set_requires_gradient_sync(reduces, recurse=False)
            module.set_reshard_after_backward(reduces, recurse=False)
            module.set_is_last_backward(last)


def _counts(rows: MicroBatch) -> tuple[float, int, int]:
    weights = torch.as_tensor(rows.weights)
    return float(weights.sum(dtype=torch.float64)), rows.useful_tokens, weights.numel()
