"""Forward and backward of a global batch: what turns micro batches into gradients and a loss.

Loss of a step = sum of weighted token losses / sum of weights, both over the *global* batch, so that it does not depend
on how the batch is divided into micro batches and ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.data import MicroBatch
from megatron.parallel.build import ParallelModel, local_tensor
from megatron.parallel.mesh import Mesh


@dataclass(frozen=True)
class BatchLoss:
    """The loss of a global batch.

    Attributes:
        mean: weighted mean over its tokens; 0 where no token has weight.
        weight: sum of the loss weights.
        useful_tokens: tokens of samples, padding left out.
        tokens: tokens computed, padding included.
    """

    mean: float
    weight: float
    useful_tokens: int
    tokens: int


class Engine:
    """Runs global batches through a model.

    Args:
        model: this rank's part.
        mesh: the grid of ranks.
        seed: of dropout; its masks are a pure function of (seed, consumed samples, micro batch, data-parallel rank).
        per_token: in training, divide by the weights of the global batch; else, as the reference does, take the mean
            of the micro batches' means.
    """

    def __init__(self, model: ParallelModel, mesh: Mesh, *, seed: int, per_token: bool = True) -> None:
        self.model = model
        self.mesh = mesh
        self.seed = seed
        self.per_token = per_token

    def forward_backward(
        self, micro_batches: Sequence[MicroBatch], consumed_samples: int, loss_scale: float = 1.0
    ) -> BatchLoss:
        """Leave the gradient of the global batch's loss times `loss_scale` in the parameters, and return the loss.

        Where no token of the global batch has weight there is nothing to learn: no pass is run, no gradient is left.
        """
        self.model.module.train()
        return self._run(micro_batches, consumed_samples, loss_scale)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> BatchLoss:
        """The loss alone, without dropout."""
        self.model.module.eval()
        loss = self._run(micro_batches, 0, None)
        for module in self.model.sharded_modules():
            module.reshard()
        return loss

    def _run(self, micro_batches: Sequence[MicroBatch], consumed_samples: int, loss_scale: float | None) -> BatchLoss:
        counts = [_counts(rows) for rows in micro_batches]
        weight, useful, tokens, batches = self.mesh.sum(
            [*map(sum, zip(*counts, strict=True)), len(micro_batches)], "dp"
        )
        total = torch.zeros((), device=self.mesh.device)
        if weight:
            for number, (rows, (own_weight, *_)) in enumerate(zip(micro_batches, counts, strict=True)):
                by_token = self.per_token or loss_scale is None
                divisor = weight if by_token else batches * (own_weight or 1.0)
                self._prepare(number, len(micro_batches), consumed_samples)
                loss = self._loss_sum(rows) / divisor
                total += loss.detach()
                if loss_scale is not None:
                    (loss * loss_scale).backward()
            if loss_scale is not None:
                self._sum_partial_gradients()
        (mean,) = self.mesh.sum([float(total)], "dp")
        return BatchLoss(mean, weight, int(useful), int(tokens))

    def _loss_sum(self, rows: MicroBatch) -> Tensor:
        tokens, positions, bounds, labels, weights = (
            torch.as_tensor(array).to(self.mesh.device, non_blocking=True)
            for array in (rows.tokens, rows.positions, rows.cu_seqlens, rows.labels, rows.weights)
        )
        return (self.model.module(tokens, positions, bounds, rows.max_seqlen, labels) * weights).sum()

    def _prepare(self, number: int, micro_batches: int, consumed_samples: int) -> None:
        """Seed dropout, and let gradients be reduced and gathered weights be freed only after the last micro batch.

        Full sharding does both after each one, which is what it saves memory by.
        """
        numbers = (self.seed, consumed_samples, number, self.mesh.rank("dp"))
        torch.manual_seed(hash(numbers) % 2**63)
        last = number == micro_batches - 1
        reduces = last or self.model.full_sharding
        for module in self.model.sharded_modules():
            module.set_requires_gradient_sync(reduces, recurse=False)
            module.set_reshard_after_backward(reduces, recurse=False)
            module.set_is_last_backward(last)

    def _sum_partial_gradients(self) -> None:
        """Complete gradients of which each tensor-parallel rank has one summand: one collective for all of them."""
        gradients = [
            local_tensor(part.parameter.grad)
            for part in self.model.parts
            if part.gradient_is_partial and part.parameter.grad is not None
        ]
        if not gradients:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, group=self.mesh.group("tp"))
        for gradient, whole in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(whole.view_as(gradient))


def _counts(rows: MicroBatch) -> tuple[float, int, int]:
    weights = torch.as_tensor(rows.weights)
    return float(weights.sum(dtype=torch.float64)), rows.useful_tokens, weights.numel()
