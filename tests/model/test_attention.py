"""Attention stays within documents, and every way to compute it gives the same."""

import pytest
import torch

from megatron.model.attention import BY_DOCUMENT, Documents, choose_attention_kernel


def masked_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Softmax over a whole matrix of scores, with a mask for causality and documents."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    allowed = (document[:, None] == document) & torch.ones(len(document), len(document)).tril().bool()
    scores = torch.einsum("qnd,knd->nqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("nqk,knd->qnd", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v)


def documents(lengths: list[int], device: str = "cpu") -> Documents:
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    return Documents(bounds, max(lengths))


@pytest.mark.parametrize("lengths", [[7], [4, 4, 4], [5, 1, 9, 2]])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_attention_with_a_mask(lengths: list[int], kv_heads: int) -> None:
    torch.manual_seed(0)
    tokens = sum(lengths)
    inputs = [torch.randn(tokens, heads, 8, requires_grad=True) for heads in (4, kv_heads, kv_heads)]
    found = BY_DOCUMENT.attend(*inputs, documents(lengths), 0.0)
    expected = masked_attention(*inputs, lengths)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, weights), torch.autograd.grad(expected, inputs, weights), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_cpu_run_has_the_exact_kernel_whatever_is_installed() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert choose_attention_kernel(torch.device("cpu"), dtype, use_flash_attn=True) is BY_DOCUMENT


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("use_flash_attn", [True, False])
def test_gpu_kernels_equal_the_exact_one(use_flash_attn: bool) -> None:
    lengths = [33, 128, 5]
    kernel = choose_attention_kernel(torch.device("cuda"), torch.bfloat16, use_flash_attn)
    q, k, v = (torch.randn(sum(lengths), heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))
    found = kernel.attend(q, k, v, documents(lengths, "cuda"), 0.0)
    expected = BY_DOCUMENT.attend(q.float(), k.float(), v.float(), documents(lengths, "cuda"), 0.0)
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)
