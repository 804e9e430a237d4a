"""Everything that differs between a CPU and a GPU."""

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

PEAK_TFLOPS = {
    "B200": 2250,
    "GH200": 989,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H800": 989,
    "H20": 148,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "A40": 150,
    "A30": 165,
    "A10G": 70,
    "A10": 125,
    "V100": 125,
    "T4": 65,
    "RTX 4090": 165,
    "RTX 3090": 71,
    "MI300X": 1307,
    "MI250X": 191.5,
}
"""Words in a GPU's name -> dense bf16 or fp16 teraflops with fp32 accumulation, by the makers' data sheets."""


def rank_device(local_rank: int) -> torch.device:
    """The device of this process: its own GPU where there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The most teraflops this device can do in `dtype`, where that is known."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for words, peak in PEAK_TFLOPS.items() if re.search(rf"\b{words}\b", name)), None)


def to_device(array: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """The array on the device; on a GPU the host goes on while it is copied."""
    tensor = torch.as_tensor(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def host_memory(tensor: Tensor) -> Tensor:
    """Host memory for copies of a tensor; taking it, which this does, is several times slower than filling it."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda).zero_()


def host_copy(tensor: Tensor, memory: Tensor) -> Tensor:
    """`memory`, in which a copy of the tensor is after `synchronize`."""
    return memory.copy_(tensor.detach(), non_blocking=True)


def synchronize(device: torch.device) -> None:
    """Wait for the device's queued work, so that a clock read afterwards is honest."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_statistics(device: torch.device) -> dict[str, float]:
    """`torch.cuda.memory_stats()`; empty on a CPU, which keeps none."""
    return torch.cuda.memory_stats(device) if device.type == "cuda" else {}
