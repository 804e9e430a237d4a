"""Tiny random Llamas of `transformers`, in its own folders."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from megatron.checkpoint import Checkpoint
from megatron.model import Model

SIZES: dict[str, Any] = {
    "vocab_size": 103,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped-query": {},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "theta 1e6": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "linear scaling": {"rope_parameters": LINEAR},
    "head size apart": {"head_dim": 16},
    "tied": {"tie_word_embeddings": True},
    "epsilon": {"rms_norm_eps": 1e-2},
}


def save_llama(folder: Path, **changes: Any) -> LlamaForCausalLM:
    """A model with random weights, saved in `folder`."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(1.0, 0.3)
    model.save_pretrained(folder)
    return model


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def filled_model(checkpoint: Checkpoint) -> Model:
    """Our model with the checkpoint's weights."""
    model = Model(checkpoint.model, checkpoint.vocab_size).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(checkpoint.weights.read(name))
    return model


def logits(model: Model, *documents: Tensor) -> Tensor:
    """Our logits of documents packed into one row."""
    lengths = [len(document) for document in documents]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])
    with torch.no_grad():
        return model(torch.cat(documents), positions, bounds, max(lengths))
