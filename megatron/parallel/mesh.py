"""The grid of ranks: pipeline x data x tensor, tensor-parallel ranks next to each other.

world of 8, --tensor_model_parallel_size 2           stage 0                 stage 1
          --pipeline_model_parallel_size 2:     tensor 0   tensor 1     tensor 0   tensor 1
                                    data 0          0          1            4          5
                                    data 1          2          3            6          7
"""

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property, wraps
from typing import ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout as set_timeout

from megatron.config import ModelConfig, ParallelConfig, UsageError
from megatron.parallel.device import rank_device
from megatron.parallel.plan import check_layout, virtual_stages
from megatron.parallel.processes import join

P = ParamSpec("P")
R = TypeVar("R")
DIMENSIONS = ("pp", "dp", "tp")


@dataclass(frozen=True)
class Layout:
    """How many ranks in each direction; known before any process group exists."""

    tensor: int
    pipeline: int
    data: int


def plan_layout(world_size: int, parallel: ParallelConfig, model: ModelConfig) -> Layout:
    """Divide `world_size` ranks.

    Raises:
        UsageError: a size does not divide, with what would.
    """
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    check_layout(model, tensor, pipeline)
    assert model.num_layers
    virtual_stages(parallel, model.num_layers)
    if world_size % (tensor * pipeline):
        raise UsageError(
            f"{world_size} processes cannot be divided by --tensor_model_parallel_size {tensor} x "
            f"--pipeline_model_parallel_size {pipeline}; start a multiple of {tensor * pipeline} "
            "(torchrun --nproc_per_node)"
        )
    return Layout(tensor, pipeline, world_size // (tensor * pipeline))


def world_size_of(environment: Mapping[str, str]) -> int:
    """Number of processes that torchrun started; 1 without it.

    Raises:
        UsageError: Slurm started several, which do not know of each other.
    """
    if "WORLD_SIZE" not in environment and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise UsageError("srun started several tasks without torchrun; use srun torchrun, one task a node")
    return int(environment.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Mesh:
    """This process' place in the grid.

    Attributes:
        ranks: the device mesh, dimensions ("pp", "dp", "tp").
        device: where this rank computes.
    """

    ranks: DeviceMesh
    device: torch.device

    def __str__(self) -> str:
        sizes = f"{self.size('tp')} tensor x {self.size('pp')} pipeline x {self.size('dp')} data"
        return f"{self.ranks.size()} ranks on {self.device.type}: {sizes}"

    def size(self, dimension: str) -> int:
        """Number of ranks along "pp", "dp" or "tp"."""
        return self._lines[dimension].size()

    def rank(self, dimension: str) -> int:
        """This rank's coordinate along "pp", "dp" or "tp"."""
        return self._lines[dimension].get_local_rank()

    def group(self, dimension: str) -> dist.ProcessGroup:
        """The ranks that differ from this one along `dimension` only."""
        return self._lines[dimension].get_group()

    @cached_property
    def _lines(self) -> dict[str, DeviceMesh]:
        """This rank's line along each dimension; kept, since making one takes a while."""
        return {dimension: self.ranks[dimension] for dimension in DIMENSIONS}

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks and writes for all."""
        return dist.get_rank() == 0

    def sum(self, values: list[float], dimension: str | None = None) -> list[float]:
        """Each value summed over the ranks of a dimension, or over all ranks."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self.group(dimension) if dimension else None)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank."""
        return self.sum([float(flag)])[0] > 0

    def gather(self, values: list[float], dimension: str | None = None) -> list[list[float]]:
        """The values of every rank of a dimension, or of all ranks, in rank order."""
        group = self.group(dimension) if dimension else None
        mine = torch.tensor(values, dtype=torch.float64, device=self.device)
        ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(ranks, mine, group=group)
        return [rank.tolist() for rank in ranks]

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum([0.0])


@contextmanager
def open_mesh(layout: Layout, parallel: ParallelConfig) -> Iterator[Mesh]:
    """The grid of ranks, in the process group that is there, or in one made for it and left afterwards.

    Without a launcher the group is a world of one. `--distributed_backend nccl` becomes gloo where there is no GPU.

    Raises:
        UsageError: gloo is asked for on GPUs.
    """
    device = rank_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend, timeout = parallel.distributed_backend, timedelta(minutes=parallel.distributed_timeout_minutes)
    if device.type == "cuda" and backend == "gloo":
        raise UsageError("--distributed_backend gloo exchanges no messages between GPUs; leave the flag out")
    joins = not dist.is_initialized()
    if joins:
        join("gloo" if device.type == "cpu" else backend, timeout)
    shape = (layout.pipeline, layout.data, layout.tensor)
    ranks = init_device_mesh(device.type, shape, mesh_dim_names=DIMENSIONS)
    for group in ranks.get_all_groups():
        set_timeout(timeout, group)  # init_device_mesh gives each the default of its backend
    yield Mesh(ranks, device)
    if joins:  # not after an error: leaving a group in which others wait would wait for them, and hide the error
        dist.destroy_process_group()


def leaves_no_group(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates what opens a mesh, so that nothing of it is left when it has returned.

    A process group of gloo that lives on to the end of the process may abort it there (torch 2.13).
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        result = function(*args, **kwargs)
        gc.collect()
        return result

    return run
