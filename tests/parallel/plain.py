"""Training on one device, as plainly as it can be said: the yardstick of the law."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.config import RunConfig, resolve_run
from megatron.data.order import SampleOrder
from megatron.model import Model
from megatron.model.initialization import initial_weight

VOCAB_SIZE = 101
TINY: dict[str, Any] = {
    "model_name": "llama2",
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_attention_heads_kv": 2,
    "max_position_embeddings": 64,
    "seq_length": 24,
    "init_method_std": 0.1,  # larger, rounding grows from layer to layer
    "micro_batch_size": 2,
    "global_batch_size": 8,
    "train_iters": 10,
    "lr": 0.003,
    "lr_decay_style": "constant",
    "clip_grad": 0.5,
    "adam_eps": 1e-4,  # so that Adam does not blow up the rounding of gradients near zero
    "weight_decay": 0.1,
    "data_type": "instruction",
    "variable_seq_lengths": True,
    "tokenizer_type": "SentencePieceTokenizer",
    "scalar_loss_mask": 0.25,
}
"""Flags of a run small enough for real ranks on two cores."""


class RandomRows:
    """A stand-in for `InstructionDataset`: random tokens and roles of various lengths, some longer than a row."""

    def __init__(self, count: int = 40, longest: int = 30) -> None:
        random = np.random.default_rng(7)
        self.lengths = random.integers(3, longest, count).astype(np.int32)
        self.rows = [(random.integers(0, VOCAB_SIZE, n), np.sort(random.integers(0, 3, n))) for n in self.lengths]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.rows[index]


def tiny_config(**flags: Any) -> RunConfig:
    """A tiny run with some flags changed."""
    return resolve_run({**TINY, **flags})


def plain_model(config: RunConfig) -> Model:
    """The whole model with its initial weights."""
    model = Model(config.model, VOCAB_SIZE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_weight(name, tuple(parameter.shape), config.model, config.training.seed))
    return model


def sample_losses(model: Model, config: RunConfig, tokens: Any, roles: Any) -> tuple[Tensor, Tensor]:
    """(weighted sum of token losses, sum of weights) of one sample alone."""
    tokens, roles = torch.as_tensor(tokens)[: config.data.seq_length + 1], torch.as_tensor(roles)
    size = len(tokens) - 1
    logits = model(tokens[:-1], torch.arange(size), torch.tensor([0, size], dtype=torch.int32), size)
    weights = torch.where(roles[1 : size + 1] == 2, 1.0, config.data.scalar_loss_mask)
    return (F.cross_entropy(logits, tokens[1:], reduction="none") * weights).sum(), weights.sum()


def train_plainly(flags: Mapping[str, Any], steps: int) -> list[dict[str, Any]]:
    """Loss, gradients (before clipping), gradient norm and weights of each step: one sample at a time, one device."""
    config, rows = tiny_config(**flags), RandomRows()
    model = plain_model(config)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    options = config.optimizer
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.schedule.lr,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_eps,
    )
    order, reports = SampleOrder(len(rows), config.training.seed), []
    for step in range(steps):
        batch: Sequence[int] = order.indices(
            step * config.training.global_batch_size, config.training.global_batch_size
        )
        sums = [sample_losses(model, config, *rows[int(i)]) for i in batch]
        loss = sum(s for s, _ in sums) / sum(w for _, w in sums)
        optimizer.zero_grad()
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_grad)
        optimizer.step()
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        reports.append({"loss": loss.item(), "norm": float(norm), "gradients": gradients, "weights": weights})
    return reports
