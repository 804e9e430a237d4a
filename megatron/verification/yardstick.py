"""Training on one device, as plainly as it can be said: one sample at a time, in fp32, on the CPU."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.config import DataConfig, RunConfig
from megatron.data import Array, MicroBatch, Sample, Samples, SampleStream
from megatron.data.batch import ONE_DOCUMENT
from megatron.data.instruction import loss_weights
from megatron.model import Model
from megatron.model.initialization import initial_weight


class RandomSamples:
    """Random samples of various lengths, some longer than a row; documents in them by the flags for pretraining."""

    name = "random"

    def __init__(self, count: int, longest: int, vocab_size: int, data: DataConfig) -> None:
        random = np.random.default_rng(7)
        self._lengths = random.integers(3, longest, count)
        rows = [(random.integers(0, vocab_size, n), np.sort(random.integers(0, 3, n))) for n in self._lengths]
        starts = [np.flatnonzero(np.append(0, random.integers(0, 6, n - 1)) == 0) for n in self._lengths]
        self._samples = [
            Sample(
                tokens,
                _weights(roles, borders[1:], data),
                document_starts=borders if data.reset_attention_mask else ONE_DOCUMENT,
                position_starts=borders if data.reset_position_ids else ONE_DOCUMENT,
            )
            for (tokens, roles), borders in zip(rows, starts, strict=True)
        ]

    def __len__(self) -> int:
        return len(self._samples)

    def lengths(self, numbers: Array) -> Array:
        """Tokens of each."""
        return self._lengths[numbers % len(self)]

    def document_starts(self, number: int) -> Array:
        """See `Sample`."""
        return self[number].document_starts

    def place(self, number: int) -> str:
        """None in particular."""
        return f"sample {number % len(self)}"

    def __getitem__(self, number: int) -> Sample:
        return self._samples[number % len(self)]


def _weights(roles: Array, borders: Array, data: DataConfig) -> Array:
    weights = loss_weights(roles, data.scalar_loss_mask)
    if data.eod_mask_loss:
        weights[borders - 1] = 0
    return weights


@dataclass(frozen=True)
class PlainStep:
    """A step of plain training.

    Attributes:
        loss: of the global batch.
        norm: of the gradient, before clipping.
        gradients: by parameter name, before clipping.
        weights: the same, after the step.
    """

    loss: float
    norm: float
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def plain_model(config: RunConfig, vocab_size: int) -> Model:
    """The whole model with its initial weights."""
    model = Model(config.model, vocab_size)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_weight(name, tuple(parameter.shape), config.model, config.training.seed))
    return model


def sample_loss(model: Model, config: RunConfig, sample: Sample, zero_positions: bool = False) -> tuple[Tensor, Tensor]:
    """(weighted sum of token losses, sum of weights) of one sample alone; with `zero_positions` none is turned."""
    tokens = torch.as_tensor(sample.tokens)[: config.data.seq_length + 1]  # type: ignore[operator]
    size = len(tokens) - 1
    weights, positions = torch.as_tensor(sample.weights)[:size], torch.arange(size)
    for start in sample.position_starts.tolist():
        positions[start:] = torch.arange(size - min(start, size))
    bounds = [*(start for start in sample.document_starts.tolist() if start < size), size]
    losses = [
        _document_loss(model, tokens[a:b], tokens[1:][a:b], weights[a:b], positions[a:b] * (not zero_positions))
        for a, b in pairwise(bounds)
    ]
    return torch.stack(losses).sum(), weights.sum()


def micro_batch_losses(model: Model, rows: MicroBatch) -> Iterator[tuple[Tensor, Tensor]]:
    """The same of each document of a micro batch."""
    arrays = [torch.as_tensor(array) for array in (rows.tokens, rows.labels, rows.weights, rows.positions)]
    for start, stop in pairwise(rows.cu_seqlens.tolist()):
        tokens, labels, weights, positions = (array[start:stop] for array in arrays)
        yield _document_loss(model, tokens, labels, weights, positions), weights.sum()


def _document_loss(model: Model, tokens: Tensor, labels: Tensor, weights: Tensor, positions: Tensor) -> Tensor:
    size = len(tokens)
    logits = model(tokens, positions, torch.tensor([0, size], dtype=torch.int32), size)
    return (F.cross_entropy(logits, labels, reduction="none") * weights).sum()


def global_batch(config: RunConfig, samples: Samples, step: int) -> list[Sample]:
    """The samples of a step."""
    size = config.training.global_batch_size
    assert size
    stream = SampleStream([samples], seed=config.training.seed, shuffled=True)
    return stream.read(stream.choose(step * size, size))


def batch_loss(model: Model, config: RunConfig, batch: Sequence[Sample], zero_positions: bool = False) -> Tensor:
    """Mean over the tokens of the batch; by `--no_calculate_per_token_loss` mean of the micro batches' means."""
    training = config.training
    size = len(batch) if training.calculate_per_token_loss else training.micro_batch_size
    assert size
    means = []
    for start in range(0, len(batch), size):
        pairs = [sample_loss(model, config, sample, zero_positions) for sample in batch[start : start + size]]
        losses, weights = (torch.stack(column).sum() for column in zip(*pairs, strict=True))
        means.append(losses / weights if weights else 0.0 * losses)
    return torch.stack(means).mean()


def train_plainly(config: RunConfig, vocab_size: int, samples: Samples, steps: int) -> list[PlainStep]:
    """The first steps of a run, from its initial weights."""
    model = plain_model(config, vocab_size)
    optimizer = _optimizer(config, model)
    reports = []
    for step in range(steps):
        loss = batch_loss(model, config, global_batch(config, samples, step))
        optimizer.zero_grad()
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        largest = config.optimizer.clip_grad or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), largest)
        optimizer.step()
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        reports.append(PlainStep(loss.item(), float(norm), gradients, weights))
    return reports


def _optimizer(config: RunConfig, model: Model) -> torch.optim.Optimizer:
    options = config.optimizer
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    assert config.schedule.lr
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.schedule.lr, momentum=options.sgd_momentum)
    betas = (options.adam_beta1, options.adam_beta2)
    return torch.optim.AdamW(groups, lr=config.schedule.lr, betas=betas, eps=options.adam_eps)
