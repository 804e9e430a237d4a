"""Ranks that are started again meet each other, not what earlier ones left behind."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from plain import tiny_config
from worlds import World

from megatron.parallel.mesh import DIMENSIONS, open_mesh, plan_layout
from megatron.parallel.processes import number_of_start

SOON = timedelta(seconds=2)


def start(store: dist.Store, size: int = 3) -> list[int]:
    """The number that each rank finds."""
    with ThreadPoolExecutor(size) as ranks:
        return list(ranks.map(lambda rank: number_of_start(store, rank, size, timedelta(minutes=1)), range(size)))


def test_every_start_has_a_number_of_its_own() -> None:
    store = dist.HashStore()
    assert [start(store) for _ in range(3)] == [[1] * 3, [2] * 3, [3] * 3]


def test_a_rank_that_greeted_and_died_is_waited_for_in_its_next_life() -> None:
    store = dist.HashStore()
    store.set_timeout(timedelta(milliseconds=10))
    with pytest.raises(dist.DistStoreError):
        number_of_start(store, 2, 3, SOON)
    store.set_timeout(timedelta(minutes=1))
    assert start(store) == [1] * 3
    with pytest.raises(dist.DistStoreError, match="rank 1 did not start within 0:00:00"):
        number_of_start(store, 0, 3, timedelta(seconds=0))
    assert start(store) == [3] * 3


def timeouts() -> list[timedelta]:
    """Of each dimension's group."""
    config = tiny_config(tensor_model_parallel_size=2, distributed_timeout_minutes=7.5)
    with open_mesh(plan_layout(4, config.parallel, config.model), config.parallel) as mesh:
        return [mesh.group(name)._get_backend(torch.device("cpu")).options._timeout for name in DIMENSIONS]


def test_every_group_gives_up_in_time(world: World) -> None:
    for found in world(4, timeouts):
        assert found == [timedelta(minutes=7.5)] * 3
