"""How far our logits and hidden states are from Hugging Face's, row by row and layer by layer, and how it is told.

n tokens of the row   h hidden   v vocabulary
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.data import Array
from megatron.parallel.logits import EMBEDDING


@dataclass(frozen=True)
class Tolerance:
    """The largest differences allowed.

    Attributes:
        logits: of a logit, absolute.
        loss: absolute.
        hidden: of a token's hidden state, relative to its norm.
    """

    logits: float
    loss: float
    hidden: float

    def with_logits(self, logits: float | None) -> "Tolerance":
        """This, but with another tolerance for logits, if there is one."""
        return self if logits is None else replace(self, logits=logits)


TOLERANCES = {
    torch.float32: Tolerance(logits=1e-3, loss=1e-3, hidden=1e-4),
    torch.bfloat16: Tolerance(logits=0.5, loss=2e-2, hidden=1e-1),
    torch.float16: Tolerance(logits=0.1, loss=5e-3, hidden=2e-2),
}
"""Precision of our products -> how far from a model in fp32 is rounding.

Measured on small models of 2 to 5 layers, on a CPU: logits, loss and hidden states up to 3e-6, 3e-7 and 2e-6 in fp32,
0.34, 3e-3 and 5e-2 in bf16, 0.05, 2e-3 and 9e-3 in fp16.
"""
HEADER = (
    f"{'row':>5} {'tokens':>8} {'max error':>10} {'mean error':>10} {'same top':>9} {'our loss':>10} {'theirs':>10}"
)


@dataclass(frozen=True)
class RowDifference:
    """What a row has shown.

    Attributes:
        number: of the row.
        tokens: n.
        largest: absolute error of a logit; infinite if one is not a number.
        mean: absolute error.
        same_top: at how many tokens both think the same next one most likely.
        weight: sum of the loss weights.
        loss: weighted mean over the tokens, ours; 0 without weight.
        their_loss: the same, theirs.
    """

    number: int
    tokens: int
    largest: float
    mean: float
    same_top: int
    weight: float
    loss: float
    their_loss: float


def compare_row(number: int, ours: Tensor, theirs: Tensor, labels: Array, weights: Array) -> RowDifference:
    """Compare logits [n, v] of a row with `labels` [n] of loss weights [n]."""
    ours, theirs = ours.float(), theirs.float()
    error = (ours - theirs).abs()
    target, weight = (torch.as_tensor(array, device=ours.device) for array in (labels, weights))
    total = float(weight.sum())
    losses = [
        float((F.cross_entropy(x, target, reduction="none") * weight).sum() / (total or 1)) for x in (ours, theirs)
    ]
    return RowDifference(
        number,
        len(ours),
        finite_or_infinite(float(error.max())),
        finite_or_infinite(float(error.mean())),
        int((ours.argmax(-1) == theirs.argmax(-1)).sum()),
        total,
        *losses,
    )


def finite_or_infinite(value: float) -> float:
    """The value; infinite where it is not a number, so that it compares as the worst."""
    return math.inf if math.isnan(value) else value


def report_rows(rows: Sequence[RowDifference], loss: float, tolerance: Tolerance) -> tuple[str, bool]:
    """The table, with the verdict below; and whether it passes. `loss` is ours of all rows, as training computes it."""
    tokens, weight = sum(row.tokens for row in rows), sum(row.weight for row in rows)
    whole = RowDifference(
        number=-1,
        tokens=tokens,
        largest=max(row.largest for row in rows),
        mean=sum(row.mean * row.tokens for row in rows) / tokens,
        same_top=sum(row.same_top for row in rows),
        weight=weight,
        loss=loss,
        their_loss=sum(row.their_loss * row.weight for row in rows) / (weight or 1),
    )
    difference = finite_or_infinite(abs(whole.loss - whole.their_loss))
    passes = whole.largest <= tolerance.logits and difference <= tolerance.loss
    lines = [
        HEADER,
        *map(_line, [*rows, whole]),
        "",
        f"{'ok' if passes else 'FAILED'}: largest error of a logit {whole.largest:.1e} (tolerance "
        f"{tolerance.logits:.0e}), of the loss {difference:.1e} ({tolerance.loss:.0e})",
    ]
    return "\n".join(lines), passes


def _line(row: RowDifference) -> str:
    losses = f"{row.loss:>10.6f} {row.their_loss:>10.6f}" if row.weight else f"{'-':>10} {'-':>10}"
    return (
        f"{'all' if row.number < 0 else row.number:>5} {row.tokens:>8} {row.largest:>10.1e} {row.mean:>10.1e} "
        f"{row.same_top / row.tokens:>9.2%} {losses}"
    )


def layer_differences(ours: Mapping[int, Tensor], theirs: Mapping[int, Tensor]) -> dict[int, float]:
    """Number of a layer -> the largest error of a token's hidden state [h] after it, over its norm in theirs."""
    found = {}
    for number, state in ours.items():
        expected = theirs[number].to(state.device).float()
        error = (state.float() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-12)
        found[number] = finite_or_infinite(float(error.max()))
    return found


def report_layers(found: Mapping[int, float], tolerance: Tolerance) -> str:
    """The error after each layer, and which is the first to differ."""
    names = {number: "embedding" if number == EMBEDDING else f"layer {number}" for number in found}
    lines = [f"{names[number]:>12} {error:>10.1e}" for number, error in found.items()]
    wrong = [number for number, error in found.items() if error > tolerance.hidden]
    if wrong:
        error = f"relative error {found[wrong[0]]:.1e}, tolerance {tolerance.hidden:.0e}"
        return "\n".join([*lines, f"first layer that differs: {names[wrong[0]]} ({error})"])
    return "\n".join([*lines, "all layers agree: the difference is in the final norm, the output layer or the loss"])
