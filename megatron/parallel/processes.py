"""Joining the other processes of a run, and telling when they are lost."""

import faulthandler
import os
import re
import time
from datetime import timedelta

import torch.distributed as dist

NCCL_DEFAULTS = {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1", "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000"}
"""Environment variable -> value unless the user sets another: what each rank last exchanged is kept, and written down
when a collective does not end."""
GLOO = re.compile(r"\[[^\]]*/gloo/[^\]]*\] (.*)")
"""In its messages: the line of its source, and what happened."""
LOOK_AGAIN = timedelta(seconds=0.2)


def join(backend: str, timeout: timedelta) -> None:
    """Make the process group of all ranks that a launcher started; without one, of this process alone."""
    if "RANK" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    if backend == "nccl":
        faulthandler.enable()  # its watchdog aborts a process that waits for too long; this tells where that waited
        for name, value in NCCL_DEFAULTS.items():
            os.environ.setdefault(name, value)
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = dist.PrefixStore(f"start/{number_of_start(store, rank, size, timeout)}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def number_of_start(store: dist.Store, rank: int, size: int, timeout: timedelta) -> int:
    """Number of this start of all ranks, the same on each; no earlier start of theirs has used it.

    torchrun starts ranks again with the store they had before, where they find addresses of processes that are gone
    until each has written its own: who reads too early waits for the dead. Its count of restarts does not help, since
    machines count apart. So the first rank numbers its starts, and tells the number to those who prove to be alive.
    """
    if rank:
        greeting = store.add("greetings", 1)
        store.set(f"greeting/{rank}", str(greeting))
        number = int(store.get(f"reply/{greeting}"))
        store.set(f"here/{number}/{rank}", "")
        return number
    number = store.add("starts", 1)
    deadline = time.monotonic() + timeout.total_seconds()
    for other in range(1, size):
        while not _is_here(store, number, other):
            if time.monotonic() > deadline:
                raise dist.DistStoreError(f"rank {other} did not start within {timeout}")
    return number


def _is_here(store: dist.Store, number: int, other: int) -> bool:
    """Reply to the newest greeting of a rank, and see whether whoever wrote it takes notice."""
    greeting = int(store.get(f"greeting/{other}"))
    store.set(f"reply/{greeting}", str(number))
    try:
        store.wait([f"here/{number}/{other}"], LOOK_AGAIN)
    except dist.DistStoreError:
        return False
    return True


def lost_peers(error: BaseException) -> str | None:
    """What an error says of other ranks, if it is their doing: they ended, or did not answer in time."""
    message = str(error).partition("\n")[0]
    if isinstance(error, dist.DistError):
        return message
    if found := GLOO.search(message):  # in plain RuntimeErrors
        return found[1].partition(". ")[0]
    return None
