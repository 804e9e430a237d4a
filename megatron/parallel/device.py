"""Everything that differs between a CPU and a GPU."""

import torch


def rank_device(local_rank: int) -> torch.device:
    """The device of this process: its own GPU where there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def synchronize(device: torch.device) -> None:
    """Wait for the device's queued work, so that a clock read afterwards is honest."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_statistics(device: torch.device) -> dict[str, float]:
    """`torch.cuda.memory_stats()`; empty on a CPU, which keeps none."""
    return torch.cuda.memory_stats(device) if device.type == "cuda" else {}
