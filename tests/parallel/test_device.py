"""What differs between a CPU and a GPU is the same to whoever asks."""

import pytest
import torch

from megatron.parallel.device import host_copy, host_memory, synchronize

GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)


@pytest.mark.parametrize("kind", ["cpu", GPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_host_copy_stays_as_it_was(kind: str, dtype: torch.dtype) -> None:
    """Its memory is taken again for the next one."""
    device = torch.device(kind)
    tensor = torch.randn(1000, 33, device=device).to(dtype).t()
    before = tensor.cpu().clone()
    memory = host_memory(tensor)
    copy = host_copy(tensor, memory)
    synchronize(device)
    tensor.zero_()
    assert copy.device.type == "cpu"
    assert torch.equal(copy, before)
    again = host_copy(tensor, memory)
    synchronize(device)
    assert again is copy is memory
    assert not copy.any()
