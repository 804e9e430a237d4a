"""Dropout: how much, where, and that its masks are what layouts and recomputation need."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from worlds import World

from megatron.config import ModelConfig
from megatron.model import Spread
from megatron.model.layer import layer_dropout
from megatron.parallel.tensor import TensorSpread


def test_lima_dropout_rises_linearly() -> None:
    config = ModelConfig(num_layers=5, hidden_dropout=0.4, lima_dropout=True)
    assert [layer_dropout(config, n) for n in range(5)] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert layer_dropout(ModelConfig(num_layers=5, hidden_dropout=0.4), 0) == 0.4


def test_drops_the_asked_share_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    x = Spread().dropout(torch.ones(200, 100), 0.3)
    assert float((x == 0).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert float(x.mean()) == pytest.approx(1.0, abs=0.02)
    assert Spread().dropout(x, 0.0) is x


def masks(sequence_parallel: bool) -> dict[str, Any]:
    """Where each rank's masks over hidden states and heads are zero, twice from one seed."""
    spread = TensorSpread(dist.group.WORLD, sequence_parallel=sequence_parallel, vocab_size=8, key_value_heads=2)
    found: dict[str, Any] = {}
    for turn in ("first", "again"):
        torch.manual_seed(5)
        hidden = spread.dropout(torch.ones(64), 0.5)
        with spread.head_randomness():
            heads = torch.dropout(torch.ones(64), 0.5, True)
        found[turn] = [hidden.tolist(), heads.tolist(), spread.dropout(torch.ones(64), 0.5).tolist()]
    return found


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_masks_differ_where_ranks_hold_different_things(world: World, sequence_parallel: bool) -> None:
    first, second = world(2, masks, sequence_parallel)
    for rank in (first, second):
        assert rank["first"] == rank["again"]
    hidden, heads, later = zip(first["first"], second["first"], strict=True)
    assert (hidden[0] == hidden[1]) == (not sequence_parallel)
    assert heads[0] != heads[1]
    assert (later[0] == later[1]) == (not sequence_parallel)
