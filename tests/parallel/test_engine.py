"""The engine's own corners: batches that weigh nothing, weights that are freed, and launchers that are not there."""

from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from plain import VOCAB_SIZE, tiny_config
from torch import nn
from worlds import World

from megatron.config import UsageError
from megatron.data import MicroBatch
from megatron.model.initialization import initial_weight
from megatron.optim.gradients import gradient_norm
from megatron.parallel.build import ParallelModel, build_model, sharded_modules
from megatron.parallel.engine import Engine
from megatron.parallel.mesh import Mesh, open_mesh, plan_layout, world_size_of


def rows(weight: float, size: int = 8) -> MicroBatch:
    """One document of counted tokens, all of one weight."""
    ids = np.arange(size, dtype=np.int64)
    weights = np.full(size, weight, np.float32)
    return MicroBatch(ids, ids + 1, weights, ids, np.array([0, size], np.int32), size, size)


def build(flags: dict[str, Any], mesh: Mesh) -> ParallelModel:
    config = tiny_config(**flags)
    model = build_model(config, VOCAB_SIZE, mesh)
    model.fill(lambda name, shape, ranges: initial_weight(name, shape, config.model, 1)[ranges])
    return model


def norms_with_an_empty_micro_batch(loss_scale: float) -> list[float]:
    """Gradient norms of three micro batches, one without weight, averaged by micro batch."""
    config = tiny_config()
    with open_mesh(plan_layout(dist.get_world_size(), config.parallel, config.model), config.parallel) as mesh:
        model = build({}, mesh)
        engine = Engine(model, mesh, seed=1, per_token=False)
        loss = engine.forward_backward([rows(1.0), rows(0.0), rows(1.0)], 0, loss_scale)
        return [loss.mean, gradient_norm(model.parts, mesh) / loss_scale]


def test_a_micro_batch_without_weight_is_nothing_at_any_loss_scale(world: World) -> None:
    (expected,), (found,) = (world(1, norms_with_an_empty_micro_batch, scale) for scale in (1.0, 2.0**20))
    assert found == pytest.approx(expected, rel=1e-5)


def gathered_between_micro_batches(full_sharding: bool) -> list[int]:
    """How many layers still hold gathered weights when each micro batch begins."""
    flags = {"full_sharding": full_sharding}
    config, counts = tiny_config(**flags), []
    with open_mesh(plan_layout(dist.get_world_size(), config.parallel, config.model), config.parallel) as mesh:
        model = build(flags, mesh)
        (chunk,) = model.chunks
        layers = [module for module in sharded_modules(chunk) if module is not chunk]

        def count(module: nn.Module, args: Any) -> None:
            counts.append(sum(not layer._get_fsdp_state()._fsdp_param_group.is_sharded for layer in layers))

        chunk.register_forward_pre_hook(count)
        Engine(model, mesh, seed=1).forward_backward([rows(1.0)] * 3, 0)
    return counts


def test_full_sharding_frees_weights_after_every_micro_batch(world: World) -> None:
    assert world(2, gathered_between_micro_batches, True)[0] == [0, 0, 0]
    assert world(2, gathered_between_micro_batches, False)[0] == [0, 2, 2]


def test_tasks_of_slurm_without_a_launcher_are_refused() -> None:
    assert world_size_of({}) == 1
    assert world_size_of({"WORLD_SIZE": "4", "SLURM_STEP_NUM_TASKS": "2"}) == 4
    with pytest.raises(UsageError, match="use srun torchrun"):
        world_size_of({"SLURM_STEP_NUM_TASKS": "2"})
