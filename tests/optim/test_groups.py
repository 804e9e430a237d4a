import pytest
import torch
from torch import nn

from megatron.config import OptimizerConfig
from megatron.optim.groups import build_optimizer, parameter_groups, set_hyperparameters


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3, bias=False))


def train(model, step, steps=3):
    x = torch.linspace(-1, 1, 20).reshape(5, 4)
    for _ in range(steps):
        model.zero_grad()
        model(x).square().sum().backward()
        step()
    return [p.detach().clone() for p in model.parameters()]


def test_biases_and_norms_do_not_decay():
    names = {id(p): n for n, p in small_model().named_parameters()}
    model = small_model()
    names = {id(p): n for n, p in model.named_parameters()}
    groups = parameter_groups(model.named_parameters())
    assert [[names[id(p)] for p in group["params"]] for group in groups] == [
        ["0.weight", "2.weight"],
        ["0.bias", "1.weight", "1.bias"],
    ]
    assert [group["wd_mult"] for group in groups] == [1.0, 0.0]


def test_frozen_parameters_and_empty_groups_are_left_out():
    model = nn.Linear(3, 3)
    model.bias.requires_grad_(False)
    groups = parameter_groups(model.named_parameters())
    assert [len(group["params"]) for group in groups] == [1]


def test_hyperparameters_honour_the_multipliers():
    optimizer = build_optimizer(small_model(), OptimizerConfig())
    optimizer.param_groups[1]["lr_mult"] = 0.5
    set_hyperparameters(optimizer, 1e-3, 0.1)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(1e-3, 0.1), (5e-4, 0.0)]


def test_adam_is_decoupled_and_equals_torch():
    ours, theirs = small_model(), small_model()
    optimizer = build_optimizer(ours, OptimizerConfig(adam_beta2=0.95, adam_eps=1e-6))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["fused"]
    decayed, undecayed = (group["params"] for group in parameter_groups(theirs.named_parameters()))
    reference = torch.optim.AdamW(
        [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}],
        lr=1e-2, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1, fused=False, foreach=False,
    )  # fmt: skip
    set_hyperparameters(optimizer, 1e-2, 0.1)
    for mine, other in zip(train(ours, optimizer.step), train(theirs, reference.step), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


def test_sgd_equals_torch():
    ours, theirs = small_model(), small_model()
    optimizer = build_optimizer(ours, OptimizerConfig(optimizer="sgd", sgd_momentum=0.8))
    reference = torch.optim.SGD(theirs.parameters(), lr=1e-3, momentum=0.8)
    set_hyperparameters(optimizer, 1e-3, 0.0)
    for mine, other in zip(train(ours, optimizer.step), train(theirs, reference.step), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_dtensor_parameters_step_as_plain_ones(name, one_rank_mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    plain, distributed = small_model(), small_model()
    for module in distributed.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            tensor = distribute_tensor(parameter.detach(), one_rank_mesh, [Shard(0)])
            module.register_parameter(key, nn.Parameter(tensor))
    optimizers = [build_optimizer(model, OptimizerConfig(optimizer=name)) for model in (plain, distributed)]
    for optimizer in optimizers:
        set_hyperparameters(optimizer, 1e-2, 0.1)
    for _ in range(3):
        for mine, theirs in zip(plain.parameters(), distributed.parameters(), strict=True):
            gradient = torch.sin(torch.arange(mine.numel(), dtype=torch.float32)).reshape(mine.shape)
            mine.grad = gradient
            theirs.grad = distribute_tensor(gradient, one_rank_mesh, [Shard(0)])
        for optimizer in optimizers:
            optimizer.step()
    for mine, theirs in zip(plain.parameters(), distributed.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.full_tensor(), rtol=0, atol=0)


@pytest.fixture(scope="module")
def one_rank_mesh(tmp_path_factory):
    """A mesh of this process alone, so that DTensors exist without other ranks."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()
