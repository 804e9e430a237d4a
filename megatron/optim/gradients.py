"""Norms and clipping over all ranks: every parameter counted once, wherever its parts are."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from megatron.parallel.build import Part, local_tensor
from megatron.parallel.mesh import Mesh


def gradients(parts: Iterable[Part]) -> list[Tensor]:
    """This rank's gradients."""
    return [local_tensor(part.parameter.grad) for part in parts if part.parameter.grad is not None]


@torch.no_grad()
def unscale(parts: Sequence[Part], loss_scale: float) -> None:
    """Divide the gradients by the loss scale."""
    if loss_scale != 1.0:
        torch._foreach_mul_(gradients(parts), 1.0 / loss_scale)


@torch.no_grad()
def gradient_norm(parts: Sequence[Part], mesh: Mesh) -> float:
    """Euclidean norm of the whole model's gradient; not finite if any element is not."""
    return _norm(gradients(part for part in parts if part.is_primary), mesh)


@torch.no_grad()
def parameter_norm(parts: Sequence[Part], mesh: Mesh) -> float:
    """Euclidean norm of the whole model's weights."""
    return _norm([part.local for part in parts if part.is_primary], mesh)


@torch.no_grad()
def zero_count(parts: Sequence[Part], mesh: Mesh) -> float:
    """How many elements of the whole model's gradient are exactly zero."""
    own = sum(int((g == 0).sum()) for g in gradients(part for part in parts if part.is_primary))
    return mesh.sum([float(own)])[0]


@torch.no_grad()
def clip(parts: Sequence[Part], norm: float, largest: float) -> None:
    """Scale the gradients down so that their norm is at most `largest`; 0 means no bound."""
    if largest and norm > largest:
        torch._foreach_mul_(gradients(parts), largest / (norm + 1e-6))


def _norm(tensors: list[Tensor], mesh: Mesh) -> float:
    norms: Callable[[list[Tensor]], list[Tensor]] = lambda values: list(torch._foreach_norm(values))  # noqa: E731
    square = float(torch.stack(norms(tensors)).double().square().sum()) if tensors else 0.0
    return mesh.sum([square])[0] ** 0.5
