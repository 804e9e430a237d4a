"""Padding changes nothing: gradients of a packed global batch are those of the padded one."""

from typing import Any

import pytest
import torch
from test_law import assembled, train_on_mesh
from torch import Tensor
from worlds import World

TOLERANCE = 1e-6
"""Norm of the difference over norm of the gradient, fp32."""


def gradients(world: World, size: int, flags: dict[str, Any]) -> dict[str, Tensor]:
    """Of the first step, whole."""
    return assembled([steps[0]["gradients"] for steps in world(size, train_on_mesh, flags, 1)])


@pytest.mark.parametrize(
    ("size", "flags"),
    [
        (1, {}),
        (1, {"micro_batch_size": 8}),
        (2, {"micro_batch_size": 1}),
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        (2, {"pipeline_model_parallel_size": 2}),
    ],
    ids=str,
)
def test_packed_equals_padded(world: World, size: int, flags: dict[str, Any]) -> None:
    packed, padded = (gradients(world, size, {**flags, "packing": packing}) for packing in ("padding_free", "none"))
    assert packed.keys() == padded.keys()
    for name, gradient in padded.items():
        assert float(torch.norm(packed[name] - gradient) / torch.norm(gradient)) <= TOLERANCE, name
