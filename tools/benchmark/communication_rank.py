"""A rank of the communication benchmark: trains, counts its collectives, and runs the same ones alone.

`torchrun --nproc_per_node 2 -m tools.benchmark.communication_rank JOB FIGURES`, where JOB has the options of the run as
JSON; the main rank writes what it found to FIGURES.
"""

import gc
import json
import os
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from megatron.config import RunConfig, resolve_run
from megatron.data import MicroBatch
from megatron.parallel.costs import collectives, cross_entropy_collectives
from megatron.parallel.engine import Engine
from megatron.parallel.mesh import Mesh, leaves_no_group, open_mesh, plan_layout, world_size_of
from megatron.verification.course import Course
from megatron.verification.yardstick import RandomSamples
from tools.benchmark.random_llama import VOCABULARY
from tools.benchmark.timing import seconds

REPEATS = 5
FUNCTIONAL = {
    "_c10d_functional::all_reduce": "all_reduce",
    "_c10d_functional::all_gather_into_tensor": "all_gather",
    "_c10d_functional::reduce_scatter_tensor": "reduce_scatter",
}
PLAIN = {
    "c10d::allreduce_": "all_reduce",
    "c10d::_allgather_base_": "all_gather",
    "c10d::_reduce_scatter_base_": "reduce_scatter",
    "c10d::send": "send",
}
"""What the profiler calls them: those of the process group, and around some a functional one, which tells the shape. A
receive is the other rank's send."""
VALUE_BYTES = {"float": 4, "c10::BFloat16": 2}
Counts = Counter[tuple[str, int]]
"""(collective, bytes of its whole tensor; 0 where the profiler does not tell) -> how often."""


def counted(work: Callable[[], object]) -> Counts:
    """The collectives that this rank runs meanwhile."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    functional = [event for event in events if event.name() in FUNCTIONAL]
    counts: Counts = Counter()
    for event in events:
        if event.name().startswith("c10d::"):
            around = [one for one in functional if one.start_ns() <= event.start_ns() < one.end_ns()]
            told = max(around, key=lambda one: one.start_ns()) if around else event
            if name := FUNCTIONAL.get(told.name()) or PLAIN.get(told.name()):
                counts[name, whole_bytes(name, told)] += 1
    return counts


def whole_bytes(name: str, event: Any) -> int:
    """Of the tensor that a gather ends with and the others begin with, which is the largest that the profiler saw."""
    sizes = [
        torch.Size(shape).numel() * VALUE_BYTES.get(dtype, 0)
        for shape, dtype in zip(event.shapes(), event.dtypes(), strict=True)
        if shape
    ]
    saw_part = name == "all_gather" and event.name() in FUNCTIONAL
    return max(sizes, default=0) * (dist.get_world_size() if saw_part else 1)


def predicted(config: RunConfig, batches: list[MicroBatch], value_bytes: int) -> Counts:
    """What the formulas say of tensor parallelism, for a step."""
    counts: Counts = Counter()
    hidden, layers = config.model.hidden_size, config.model.num_layers
    assert hidden and layers
    tensor = config.parallel.tensor_model_parallel_size
    for batch in batches if tensor > 1 else []:
        for part, number in {"embedding": 1, "layer": layers, "head": 1}.items():
            for direction in ("forward", "backward"):
                found = collectives(
                    part,
                    direction,
                    hidden_bytes=len(batch.tokens) * hidden * value_bytes,
                    sequence_parallel=config.parallel.sequence_parallel,
                )
                counts += Counter({key: number * count for key, count in found.items()})
        counts += cross_entropy_collectives(int(np.count_nonzero(batch.weights)), VOCABULARY // tensor)
    return counts


def alone(name: str, size: int) -> float:
    """Seconds that a collective takes with nothing beside it."""
    ranks = dist.get_world_size()
    whole = torch.zeros(max(size // 4 // ranks, 1) * ranks)
    part = whole[: len(whole) // ranks].clone()
    other = 1 - dist.get_rank()
    calls: dict[str, Callable[[], object]] = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole),
        "send": lambda: dist.send(whole, other) if dist.get_rank() == 0 else dist.recv(whole, other),
    }
    dist.barrier()
    return statistics.median(seconds(calls[name]) for _ in range(REPEATS))


def measure(config: RunConfig, steps: int, mesh: Mesh) -> dict[str, Any]:
    """Step time, and each collective: how often, how often by the formulas, and how long it takes alone."""
    assert config.data.seq_length
    course = Course(config, VOCABULARY, RandomSamples(64, config.data.seq_length, VOCABULARY, config.data), mesh)
    course.trainer.engine = Engine(course.model, mesh, seed=1, per_token=True)  # one that keeps no gradients
    batches = course.micro_batches()
    formulas = predicted(config, batches, course.model.compute_dtype.itemsize)
    counts = counted(course.trainer.step)  # the first: its micro batches are those of the formulas
    times = [seconds(course.trainer.step) for _ in range(steps)]
    every: Counter[tuple[str, int]] = Counter()
    for found in mesh_counts(counts, mesh):
        every |= found
    figures = [
        {
            "collective": name,
            "bytes": size,
            "counted": every[name, size],
            "formula": formulas.get((name, size)),
            "seconds alone": alone(name, size) * every[name, size],
        }
        for name, size in sorted(every)
    ]
    return {"step": statistics.median(times), "missing": len(formulas - counts), "collectives": figures}


def mesh_counts(counts: Counts, mesh: Mesh) -> list[Counts]:
    """Those of all ranks, the same on each: ranks of a pipeline run different ones."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, list(counts.items()))
    return [Counter(dict(items)) for items in found]


@leaves_no_group
def main(job: str, figures: str) -> None:
    """Train on the layout of the job."""
    options = json.loads(Path(job).read_text())
    config = resolve_run(options["run"])
    layout = plan_layout(world_size_of(os.environ), config.parallel, config.model)
    with open_mesh(layout, config.parallel) as mesh:
        found = measure(config, options["steps"], mesh)
        gc.collect()  # a group that tensors outlive may abort the process
        if mesh.is_main:
            Path(figures).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
