"""The norm computed by blocks equals PyTorch's, in value and gradients."""

import pytest
import torch
import torch.nn.functional as F

from megatron.model import rms_norm
from megatron.model.rms_norm import RMSNormByBlock

EPSILON = 1e-2


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rms_norm, "BLOCK_VALUES", 40)


@pytest.mark.parametrize("shape", [(23, 8), (7, 3, 8), (2, 64)])
@pytest.mark.parametrize(
    ("input_type", "weight_type", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-5),
        (torch.float32, torch.bfloat16, 1e-2),
        (torch.bfloat16, torch.bfloat16, 1e-2),
    ],
    ids=str,
)
def test_equals_rms_norm_in_fp64(
    shape: tuple[int, ...], input_type: torch.dtype, weight_type: torch.dtype, tolerance: float
) -> None:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(shape[::-1], generator=random).permute(*reversed(range(len(shape)))).to(input_type)
    weight = torch.randn(shape[-1], generator=random).to(weight_type)
    upstream = torch.randn(shape, generator=random).to(weight_type)
    inputs = [tensor.detach().requires_grad_() for tensor in (x, weight)]
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    found, expected = RMSNormByBlock.apply(*inputs, EPSILON), F.rms_norm(exact[0], shape[-1:], exact[1], EPSILON)
    assert not x.is_contiguous() and found.dtype == weight_type
    gradients = torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(expected, exact, upstream.double())
    for ours, theirs in zip([found, *gradients[0]], [expected, *gradients[1]], strict=True):
        torch.testing.assert_close(
            ours.double(), theirs, rtol=tolerance, atol=tolerance * float(theirs.detach().abs().max())
        )
