"""Real ranks for tests: pools of processes, started once per size and kept, which gloo joins over a file store."""

import itertools
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

World = Callable[..., list[Any]]


class WorldPools:
    """`run(size, function, *args)` calls an importable function on each rank of a world; results by rank."""

    def __init__(self) -> None:
        self._pools: dict[int, _Pool] = {}

    def run(self, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call `function(*args)` on every rank of a world of `size`; the first rank's error is raised here."""
        if size not in self._pools:
            self._pools[size] = _Pool(size)
        try:
            return self._pools[size].run(function, args)
        except RuntimeError:
            self._pools.pop(size).close()  # ranks that failed apart may be out of step
            raise

    def close(self) -> None:
        """End all processes."""
        for pool in self._pools.values():
            pool.close()


class _Pool:
    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._pipes, self._processes = [], []
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, size, os.path.join(self._folder.name, "store")), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((function, args))
        results = []
        for rank, pipe in enumerate(self._pipes):
            succeeded, result = pipe.recv()
            if not succeeded:
                raise RuntimeError(f"rank {rank} failed:\n{result}")
            results.append(result)
        return results

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _serve(pipe: Connection, rank: int, size: int, store: str) -> None:
    """Every call gets groups of its own: each group of gloo has a thread that wakes up a hundred times a second."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    for number in itertools.count():
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        dist.init_process_group("gloo", store=dist.FileStore(f"{store}{number}", size), rank=rank, world_size=size)
        try:
            result = function(*args)
        except BaseException:
            pipe.send((False, traceback.format_exc()))
            return
        dist.destroy_process_group()
        pipe.send((True, result))
