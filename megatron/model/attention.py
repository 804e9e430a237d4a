"""Causal attention within documents: one door, several kernels behind it.

t tokens   n heads   g key/value heads   d head size
"""

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Where the documents of a micro batch begin and end.

    Attributes:
        cu_seqlens: int32 [documents + 1], first 0, last t.
        max_seqlen: length of the longest.
    """

    cu_seqlens: Tensor
    max_seqlen: int

    @cached_property
    def lengths(self) -> list[int]:
        """Length of each document; waits for the device, so only kernels that loop over documents ask."""
        return self.cu_seqlens.diff().tolist()


Attend = Callable[[Tensor, Tensor, Tensor, Documents, float, int | None], Tensor]
"""(q [t, n, d], k [t, g, d], v [t, g, d], documents, dropout, window) -> [t, n, d].

With a window a token attends to so many tokens at most, itself included; without one, to all before it.
"""


@dataclass(frozen=True)
class AttentionKernel:
    """A way to compute attention, and its name for the log."""

    name: str
    attend: Attend


def attend_by_document(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, dropout: float, window: int | None = None
) -> Tensor:
    """PyTorch's causal attention, one call a document; documents of one length go in one call. Exact on any device."""
    lengths = documents.lengths
    if len(set(lengths)) == 1:
        q, k, v = (x.unflatten(0, (len(lengths), lengths[0])) for x in (q, k, v))  # [documents, length, heads, d]
        return _causal(q, k, v, dropout, window).flatten(0, 1)
    pieces = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([_causal(q[None], k[None], v[None], dropout, window)[0] for q, k, v in pieces])


def _causal(q: Tensor, k: Tensor, v: Tensor, dropout: float, window: int | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    seen = None
    if window is not None and q.shape[2] > window:
        seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril().triu(1 - window)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, is_causal=seen is None, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2)


def _flash_window(window: int | None) -> tuple[int, int]:
    """How many tokens before and after itself a token sees, in the words of the flash kernels; -1 is all."""
    return (-1 if window is None else window - 1, 0)


def _torch_varlen() -> Attend:
    from torch.nn.attention.varlen import varlen_attn

    accepts_grouping = "enable_gqa" in inspect.signature(varlen_attn).parameters

    def attend(
        q: Tensor, k: Tensor, v: Tensor, documents: Documents, dropout: float, window: int | None = None
    ) -> Tensor:
        if dropout:
            return attend_by_document(q, k, v, documents, dropout, window)
        bounds, longest = documents.cu_seqlens, documents.max_seqlen
        options: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1]} if accepts_grouping else {}
        out = varlen_attn(q, k, v, bounds, bounds, longest, longest, window_size=_flash_window(window), **options)
        return cast(Tensor, out)

    return attend


def _flash_attn(module: str) -> Attend:
    flash_attn_varlen_func = importlib.import_module(module).flash_attn_varlen_func
    accepts_dropout = "dropout_p" in inspect.signature(flash_attn_varlen_func).parameters

    def attend(
        q: Tensor, k: Tensor, v: Tensor, documents: Documents, dropout: float, window: int | None = None
    ) -> Tensor:
        if dropout and not accepts_dropout:
            return attend_by_document(q, k, v, documents, dropout, window)
        bounds, longest = documents.cu_seqlens, documents.max_seqlen
        options: dict[str, Any] = {"window_size": _flash_window(window)} if window is not None else {}
        if accepts_dropout:
            options["dropout_p"] = dropout
        out = flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest, causal=True, **options)
        return out[0] if isinstance(out, tuple) else out

    return attend


FLASH_ATTENTION = {"flash-attn 3": "flash_attn_interface", "flash-attn 2": "flash_attn"}
"""Name in the log -> module of the optional package."""

AMPERE = (8, 0)
"""Oldest compute capability of the flash kernels."""

BY_DOCUMENT = AttentionKernel("PyTorch causal attention by document", attend_by_document)


def choose_attention_kernel(device: torch.device, dtype: torch.dtype, use_flash_attn: bool) -> AttentionKernel:
    """The kernel for a run.

    flash-attn where asked for and installed, else PyTorch's variable-length attention on CUDA in half precision, else
    its causal attention document by document.
    """
    if device.type != "cuda" or dtype == torch.float32 or torch.cuda.get_device_capability(device) < AMPERE:
        return BY_DOCUMENT
    if use_flash_attn:
        for name, module in FLASH_ATTENTION.items():
            if importlib.util.find_spec(module):
                return AttentionKernel(name, _flash_attn(module))
    return AttentionKernel("PyTorch varlen_attn", _torch_varlen())
