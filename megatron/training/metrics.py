"""Metrics of an evaluation: each is a sum over its tokens divided by another sum, the same on any layout of ranks.

To add one: a function of `Tokens` that says what is added up, a row in `METRICS`, and its name in
`megatron.config.log.METRICS`, the choices of `--metrics`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from megatron.config import UsageError
from megatron.data import Array, MicroBatch
from megatron.parallel.device import to_device
from megatron.tokenizer import Tokenizer
from megatron.tokenizer.chat import MESSAGE_END, MESSAGE_START, Role, render_body
from megatron.training.log import perplexity


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The t tokens of a micro batch that went through the model, and what each should have predicted.

    Attributes:
        rows: the micro batch.
        losses: fp32 [t].
        predict: computes the likeliest id at each position, int64 [t].
        marker_lengths: see `own_words`.
    """

    rows: MicroBatch
    losses: Tensor
    predict: Callable[[], Tensor]
    marker_lengths: Mapping[int, int]

    @cached_property
    def weights(self) -> Tensor:
        """Of the losses, fp32 [t]."""
        return to_device(self.rows.weights, self.losses.device)

    @cached_property
    def is_predicted(self) -> Tensor:
        """Whether the label is the likeliest id, bool [t]."""
        return self.predict() == to_device(self.rows.labels, self.losses.device)

    @cached_property
    def is_own_word(self) -> Tensor:
        """Whether the label is one of a message's own words, bool [t]."""
        return to_device(own_words(self.rows, self.marker_lengths), self.losses.device)


Count = Callable[[Tokens], Tensor]
"""What each token [t] adds to a sum: bool or a number."""


def loss_weight(tokens: Tokens) -> Tensor:
    """The weight of each token's loss."""
    return tokens.weights


def weighted_loss(tokens: Tokens) -> Tensor:
    """The loss of each token times its weight."""
    return tokens.losses * tokens.weights


def supervised(tokens: Tokens) -> Tensor:
    """Tokens whose loss has weight."""
    return tokens.weights != 0


def supervised_predicted(tokens: Tokens) -> Tensor:
    """Those of them that the model predicts."""
    return supervised(tokens) & tokens.is_predicted


def instructed(tokens: Tokens) -> Tensor:
    """Tokens whose loss has weight, without the markers and headers of messages."""
    return supervised(tokens) & tokens.is_own_word


def instructed_predicted(tokens: Tokens) -> Tensor:
    """Those of them that the model predicts."""
    return instructed(tokens) & tokens.is_predicted


@dataclass(frozen=True)
class Metric:
    """A figure of an evaluation: a sum over all its tokens, divided by another.

    Attributes:
        label: in the log and the curves.
        count: what is added up.
        over: what is added up to divide by; None: the number of samples.
        reads: makes the figure of the quotient.
        needs_markers: `count` asks for a message's own words.
    """

    label: str
    count: Count
    over: Count | None = None
    reads: Callable[[float], float] = float
    needs_markers: bool = False


LOSS = Metric("lm loss", weighted_loss, over=loss_weight)
METRICS = {
    "perplexity": Metric("ppl", weighted_loss, over=loss_weight, reads=perplexity),
    "accuracy": Metric("lm accuracy", supervised_predicted, over=supervised),
    "instruct_accuracy": Metric("instruct accuracy", instructed_predicted, over=instructed, needs_markers=True),
    "count_loss_mask": Metric("count loss mask", supervised),
    "count_instruct_mask": Metric("count instruct mask", instructed, needs_markers=True),
}
"""A name that `--metrics` takes -> the metric."""


@dataclass(frozen=True, kw_only=True)
class Meter:
    """What an evaluation adds up (the engine's `Measure`), and the figures that come of it.

    Attributes:
        metrics: besides the loss.
        marker_lengths: see `own_words`.
    """

    metrics: tuple[Metric, ...] = ()
    marker_lengths: Mapping[int, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """How many sums there are."""
        return len(self._counts)

    def sums(self, rows: MicroBatch, losses: Tensor, predict: Callable[[], Tensor]) -> Tensor:
        """Those of a micro batch, float64 [size]."""
        tokens = Tokens(rows=rows, losses=losses, predict=predict, marker_lengths=self.marker_lengths)
        return torch.stack([count(tokens).sum(dtype=torch.float64) for count in self._counts])

    def figures(self, sums: Sequence[float], samples: int) -> dict[str, float]:
        """The loss and the metrics by label, of the sums over an evaluation of so many samples.

        Empty where no token has weight; a metric for which no token counts is not a number.
        """
        totals = dict(zip(self._counts, sums, strict=True))
        if not totals[loss_weight]:
            return {}
        divisors = [totals[metric.over] if metric.over else samples for metric in self._figures]
        return {
            metric.label: metric.reads(totals[metric.count] / divisor) if divisor else math.nan
            for metric, divisor in zip(self._figures, divisors, strict=True)
        }

    @property
    def _figures(self) -> tuple[Metric, ...]:
        return LOSS, *self.metrics

    @cached_property
    def _counts(self) -> list[Count]:
        """What is added up, each once, in the order of the sums."""
        counts = [count for metric in self._figures for count in (metric.count, metric.over) if count]
        return list(dict.fromkeys(counts))


def build_meter(names: Sequence[str], tokenizer: Tokenizer) -> Meter:
    """The meter for the metrics that `--metrics` names.

    Raises:
        UsageError: one of them is about messages, and the tokenizer has no markers of messages.
    """
    chosen = METRICS if "all" in names else dict.fromkeys(names)
    about_messages = [name for name in chosen if METRICS[name].needs_markers]
    missing = [marker for marker in (MESSAGE_START, MESSAGE_END) if marker not in tokenizer.special_tokens]
    if about_messages and missing:
        raise UsageError(
            f"--metrics {' '.join(names)}: {' and '.join(about_messages)} cannot be told, since the tokenizer has no "
            f"{' and '.join(missing)}; add them by --vocab_extra_ids_list, or name other metrics"
        )
    return Meter(
        metrics=tuple(METRICS[name] for name in chosen),
        marker_lengths=marker_lengths(tokenizer) if about_messages else {},
    )


def marker_lengths(tokenizer: Tokenizer) -> dict[int, int]:
    """Id of a message marker -> how many tokens from it on are no words: an answer's header, or the newline after."""
    texts = (MESSAGE_START + render_body(Role.ASSISTANT, ""), MESSAGE_END + "\n")
    return {ids[0]: len(ids) for ids in map(tokenizer.encode, texts)}


def own_words(rows: MicroBatch, marker_lengths: Mapping[int, int]) -> Array:
    """Which labels of a micro batch are neither a message marker nor belong to one, bool [t].

    Args:
        rows: the micro batch; a marker reaches no further than its sample.
        marker_lengths: id of a marker -> how many tokens from it on belong to it, itself included.
    """
    own = np.ones(len(rows.labels), bool)
    for marker, length in marker_lengths.items():
        own &= rows.labels != marker
        for back in range(min(length - 1, len(own))):  # a label is the token after the one at its position
            is_marker = rows.tokens[: len(own) - back] == marker
            own[back:] &= ~(is_marker & (rows.positions[back:] >= back))
    return own
