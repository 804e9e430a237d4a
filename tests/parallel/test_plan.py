"""The plan: every parameter has one split, parts cover the whole once, and layouts that do not divide are refused."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from plain import tiny_config

from megatron.config import ModelConfig, ParallelConfig, UsageError
from megatron.model import Model
from megatron.parallel.mesh import plan_layout
from megatron.parallel.plan import chunk, split_of, stage_layers, stage_of, tensor_ranges, virtual_stages

LLAMA_70B = ModelConfig(
    model_name="llama2",
    num_layers=80,
    hidden_size=8192,
    ffn_hidden_size=28672,
    num_attention_heads=64,
    num_attention_heads_kv=8,
    kv_channels=128,
    tie_embed_logits=False,
    use_rms_norm=True,
    glu_activation="swiglu",
    position_embedding_type="rotary",
)


def test_parts_of_a_70b_model_cover_it_once() -> None:
    """On the meta device: no memory, real shapes; a vocabulary that divides by nothing."""
    with torch.device("meta"):
        model = Model(LLAMA_70B, 32003)
    for size in (1, 2, 4, 8, 16):
        for name, parameter in model.named_parameters():
            shape = tuple(parameter.shape)
            parts = [tensor_ranges(name, shape, LLAMA_70B, size, rank) for rank in range(size)]
            counts = [torch.Size([r.stop - r.start for r in part]).numel() for part in parts]
            is_whole = split_of(name, LLAMA_70B, size).dim is None
            assert sum(counts) == parameter.numel() * (size if is_whole else 1), name
            assert is_whole or all(a != b for a, b in pairwise(parts))


@pytest.mark.parametrize(("size", "parts"), [(10, 4), (32007, 8), (3, 4), (8, 8)])
def test_chunks_are_those_of_torch(size: int, parts: int) -> None:
    expected = [(int(part[0]), len(part)) for part in torch.arange(size).chunk(parts)]
    found = [chunk(size, parts, index) for index in range(parts)]
    assert found[: len(expected)] == expected
    assert all(length == 0 for _, length in found[len(expected) :])


def test_stages_take_all_layers_in_order() -> None:
    for layers, stages in [(8, 4), (7, 3), (5, 5), (3, 1), (11, 4)]:
        parts = stage_layers(layers, stages)
        assert [layer for part in parts for layer in part] == list(range(layers))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert [len(part) for part in stage_layers(11, 4)] == [3, 3, 3, 2]
    assert [len(part) for part in stage_layers(10, 4)] == [2, 3, 3, 2]
    assert stage_of("embedding.weight", 7, 3) == 0
    assert stage_of("layers.6.mlp.up.weight", 7, 3) == 2
    assert stage_of("lm_head.weight", 7, 3) == stage_of("final_norm.weight", 7, 3) == 2


@pytest.mark.parametrize(
    ("flags", "world_size", "message"),
    [
        ({"tensor_model_parallel_size": 3}, 3, "--tensor_model_parallel_size 3 does not divide the 4 attention heads"),
        ({"tensor_model_parallel_size": 2}, 3, "3 processes cannot be divided"),
        ({"tensor_model_parallel_size": 4, "ffn_hidden_size": 50}, 4, "does not divide --ffn_hidden_size 50"),
        (
            {
                "tensor_model_parallel_size": 4,
                "num_attention_heads": 24,
                "num_attention_heads_kv": 6,
                "hidden_size": 96,
            },
            4,
            "neither divides nor is a multiple of the 6 key/value heads",
        ),
    ],
)
def test_sizes_that_do_not_divide_name_the_flag_and_what_would(
    flags: dict[str, int], world_size: int, message: str
) -> None:
    config = tiny_config(**flags)
    with pytest.raises(UsageError, match=message):
        plan_layout(world_size, config.parallel, config.model)


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        ({}, [4, 4]),
        ({"num_layers_per_virtual_pipeline_stage": 2}, [2, 2, 2, 2]),
        ({"num_layers_per_virtual_pipeline_stage": 3}, [2, 2, 2, 2]),
        ({"num_layers_per_virtual_pipeline_stage": 4}, [4, 4]),
        ({"num_layers_per_virtual_pipeline_stage": 1, "pipeline_model_parallel_size": 1}, [8]),
        ({"layers_per_pipeline_stage": (5, 3)}, [5, 3]),
        ({"layers_per_pipeline_stage": (1, 2, 3, 2)}, [1, 2, 3, 2]),
    ],
)
def test_layers_of_virtual_stages(flags: dict[str, Any], sizes: list[int]) -> None:
    parallel = ParallelConfig(**({"pipeline_model_parallel_size": 2} | flags))
    assert [len(layers) for layers in virtual_stages(parallel, 8)] == sizes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"pipeline_model_parallel_size": 3}, "--pipeline_model_parallel_size 3 is more than the 2 layers"),
        (
            {"num_layers": 5, "pipeline_model_parallel_size": 3, "num_layers_per_virtual_pipeline_stage": 1},
            "cuts 5 layers into 2 chunks for each of 3 pipeline stages",
        ),
        (
            {"num_layers": 6, "pipeline_model_parallel_size": 3, "layers_per_pipeline_stage": (2, 2, 1)},
            "--layers_per_pipeline_stage 2 2 1 should be 3 numbers .* with a sum of 6 layers",
        ),
        ({"layers_per_pipeline_stage": (1, 1)}, "--layers_per_pipeline_stage 1 1 should be 1 numbers"),
    ],
)
def test_stages_that_do_not_fit_the_layers(flags: dict[str, Any], message: str) -> None:
    config = tiny_config(**flags)
    with pytest.raises(UsageError, match=message):
        plan_layout(3, config.parallel, config.model)
