"""The law: training on any layout equals training on one device, in loss, every gradient, gradient norm and weights."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from plain import VOCAB_SIZE, tiny_config, training_samples
from torch import Tensor
from worlds import World

from megatron.config import RunConfig
from megatron.data import GlobalBatches, IndexedWriter, RowOptions, SampleStream
from megatron.model.initialization import initial_weight
from megatron.optim.gradients import clip, gradient_norm
from megatron.optim.groups import build_optimizer, set_hyperparameters
from megatron.parallel.build import build_model, local_tensor
from megatron.parallel.engine import Engine
from megatron.parallel.mesh import Mesh, open_mesh, plan_layout
from megatron.verification.checks import scales
from megatron.verification.yardstick import train_plainly

STEPS = 3
TOLERANCE = 1e-5
TP2 = {"tensor_model_parallel_size": 2}
TP4 = {"tensor_model_parallel_size": 4}
SP = {"sequence_parallel": True}
SELECTIVE = {"recompute_granularity": "selective"}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform"}
TIED = {"tie_embed_logits": True}
UNPACKED = {"packing": "none"}
PP2 = {"pipeline_model_parallel_size": 2, "num_layers": 4}
PP4 = {"pipeline_model_parallel_size": 4, "num_layers": 5}
INTERLEAVED = {**PP2, "num_layers_per_virtual_pipeline_stage": 1}
POSITIONS, ATTENTION = {"reset_position_ids": True}, {"reset_attention_mask": True}
BORDERS = {**POSITIONS, **ATTENTION, "eod_mask_loss": True}

LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (1, {"micro_batch_size": 8}),
    (1, {"micro_batch_size": 1}),
    (1, SELECTIVE),
    (1, FULL),
    (1, {**FULL, "recompute_method": "block"}),
    (1, {**FULL, "recompute_num_layers": 2}),
    (1, TIED),
    (1, {"fp32_residual_connection": True, "variable_seq_lengths": False}),
    (1, UNPACKED),
    (2, {}),
    (2, {"full_sharding": True}),
    (2, {"full_sharding": True, **FULL}),
    (2, TP2),
    (2, {**TP2, **SP}),
    (2, {**TP2, **SP, "micro_batch_size": 1}),
    (2, {**TP2, **SP, **SELECTIVE}),
    (2, {**TP2, **SP, **UNPACKED, "micro_batch_size": 4}),
    (2, {**TP2, **FULL}),
    (2, {**TP2, **SP, **TIED}),
    (4, TP4),
    (4, {**TP4, **SP}),
    (4, TP2),
    (4, {**TP2, **SP}),
    (4, {**TP2, **SP, **SELECTIVE, "full_sharding": True}),
    (4, {**TP2, **SP, **FULL, **TIED}),
    (4, {**UNPACKED, "global_batch_size": 7}),
    (2, PP2),
    (2, {**PP2, **UNPACKED, "micro_batch_size": 1}),
    (2, {**PP2, "micro_batch_size": 4, **TIED}),
    (2, INTERLEAVED),
    (2, {**INTERLEAVED, "micro_batch_size": 1, **FULL}),
    (2, {**PP2, **SELECTIVE, "layers_per_pipeline_stage": (1, 3)}),
    (2, {**PP2, "layers_per_pipeline_stage": (1, 2, 1, 1), "num_layers": 5}),
    (4, PP4),
    (4, {**PP4, "micro_batch_size": 1, **TIED}),
    (4, {**PP2, **TP2, **SP, **TIED}),
    (4, {**INTERLEAVED, **TIED}),
    (4, {**PP2, "full_sharding": True, **TIED}),
    (4, {**INTERLEAVED, "full_sharding": True, "micro_batch_size": 1}),
    (8, {**INTERLEAVED, **TP2, **SP}),
    (8, {**PP4, **TP2}),
]


def train_on_mesh(flags: dict[str, Any], steps: int) -> list[dict[str, Any]]:
    """On each rank: loss and gradient norm of each step, and this rank's parts of gradients and weights."""
    config = tiny_config(**flags)
    with open_mesh(plan_layout(dist.get_world_size(), config.parallel, config.model), config.parallel) as mesh:
        model = build_model(config, VOCAB_SIZE, mesh)
        seed = config.training.seed
        model.fill(lambda name, shape, ranges: initial_weight(name, shape, config.model, seed)[ranges])
        batches = training_batches(config, mesh)
        engine, optimizer = Engine(model, mesh, seed=seed), build_optimizer(model.chunks, config.optimizer)
        set_hyperparameters(optimizer, config.schedule.lr, config.optimizer.weight_decay)
        size, reports = config.training.global_batch_size, []
        for step in range(steps):
            optimizer.zero_grad()
            loss = engine.forward_backward(batches.batch(step * size, size).micro_batches, step * size)
            gradients = [(p.name, p.shape, p.ranges, numpy(local_tensor(p.parameter.grad))) for p in model.parts]
            norm = gradient_norm(model.parts, mesh)
            clip(model.parts, norm, config.optimizer.clip_grad)
            optimizer.step()
            weights = [(p.name, p.shape, p.ranges, numpy(p.local)) for p in model.parts]
            reports.append({"loss": loss.mean, "norm": norm, "gradients": gradients, "weights": weights})
        return reports


def numpy(tensor: Tensor) -> Any:
    """A copy that crosses between processes as plain bytes."""
    return tensor.detach().clone().numpy()


def training_batches(config: RunConfig, mesh: Mesh) -> GlobalBatches:
    """This rank's share of the samples."""
    return GlobalBatches(
        stream=SampleStream([training_samples(config)], seed=config.training.seed, shuffled=True),
        rows=RowOptions(
            micro_batch_size=config.training.micro_batch_size,
            seq_length=config.data.seq_length,
            variable_seq_lengths=config.data.variable_seq_lengths,
            row_multiple=mesh.size("tp"),
            least_micro_batches=mesh.size("pp"),
        ),
        packing=config.data.packing,
        data_parallel_rank=mesh.rank("dp"),
        data_parallel_size=mesh.size("dp"),
    )


def assembled(ranks: list[list[Any]]) -> dict[str, Tensor]:
    """Whole tensors from the parts of all ranks; where ranks hold the same part they must agree."""
    whole: dict[str, Tensor] = {}
    for parts in ranks:
        for name, shape, ranges, tensor in parts:
            tensor, target = torch.as_tensor(tensor), whole.setdefault(name, torch.full(shape, torch.nan))[ranges]
            known = ~target.isnan()
            torch.testing.assert_close(tensor[known], target[known], rtol=1e-5, atol=1e-7)
            target.copy_(tensor)
    return whole


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """Every tensor equal, relative to its largest element, or a hundredth of the largest of all."""
    assert found.keys() == expected.keys()
    for name, scale in scales(expected).items():
        difference = float((found[name] - expected[name]).abs().max() / scale)
        assert difference <= TOLERANCE, f"{what} of {name} differs by {difference:.1e} of its largest element"


def assert_law(
    world: World, size: int, flags: dict[str, Any], train: Callable[..., list[dict[str, Any]]] = train_on_mesh
) -> None:
    config = tiny_config(**flags)
    expected = train_plainly(config, VOCAB_SIZE, training_samples(config), STEPS)
    ranks = world(size, train, flags, STEPS)
    for step, report in enumerate(expected):
        for rank in ranks:
            assert rank[step]["loss"] == pytest.approx(report.loss, rel=TOLERANCE)
            assert rank[step]["norm"] == pytest.approx(report.norm, rel=TOLERANCE)
        for what, whole in {"gradients": report.gradients, "weights": report.weights}.items():
            assert_equal(assembled([rank[step][what] for rank in ranks]), whole, f"{what} of step {step}")


@pytest.mark.parametrize(("size", "flags"), LAYOUTS, ids=lambda value: str(value))
def test_any_layout_equals_one_device(world: World, size: int, flags: dict[str, Any]) -> None:
    assert_law(world, size, flags)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prefix of documents to pretrain on, in which an epoch ends within the steps; some are longer than a sample."""
    prefix, random = tmp_path_factory.mktemp("text") / "text", np.random.default_rng(7)
    with IndexedWriter(prefix, "<u2") as writer:
        for length in random.integers(1, 40, 25):
            writer.append(random.integers(0, VOCAB_SIZE, length).astype("<u2"))
    return str(prefix)


@pytest.mark.parametrize(
    ("size", "flags"),
    [
        (1, {}),
        (1, BORDERS),
        (1, {**BORDERS, **UNPACKED}),
        (1, {**POSITIONS, **UNPACKED}),
        (2, {**TP2, **SP, **BORDERS, **UNPACKED}),
        (2, {**TP2, **SP, **ATTENTION, "micro_batch_size": 3}),
        (2, {**PP2, **BORDERS, **UNPACKED}),
        (2, {**BORDERS, **UNPACKED, "global_batch_size": 7}),
        (2, {**BORDERS, "full_sharding": True}),
        (4, {**TP2, **SP, **PP2, **BORDERS}),
    ],
    ids=lambda value: str(value),
)
def test_pretraining_equals_one_device(world: World, text: str, size: int, flags: dict[str, Any]) -> None:
    """Documents are apart, or only their positions, or only attention; samples cross their borders."""
    assert_law(world, size, {**flags, "data_type": "gpt", "train_data_path": (text,)})
