"""The rows of the table: what is compared, how near it has to be, and the worst over all ranks."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from megatron.parallel.mesh import Mesh
from megatron.verification.yardstick import PlainStep

LOSS, NORM, WEIGHTS = "loss", "gradient norm", "weights after a step"
PACKED, RESUMED = "packed = unpacked, gradients", "resumed = straight, weights and loss"
GRADIENTS = {
    "gradient of embedding": r"(position_)?embedding\..*",
    "gradient of attention q, k, v": r"layers\.\d+\.attention\.[qkv]\..*",
    "gradient of attention output": r"layers\.\d+\.attention\.o\..*",
    "gradient of MLP gate, up": r"layers\.\d+\.mlp\.(gate|up)\..*",
    "gradient of MLP down": r"layers\.\d+\.mlp\.down\..*",
    "gradient of norms": r".*norm\..*",
    "gradient of output layer": r"lm_head\..*",
}
"""Check -> the parameters whose gradients it compares."""


@dataclass(frozen=True)
class Tolerance:
    """The largest differences allowed.

    Attributes:
        loss: relative to the loss.
        norm: relative to the gradient norm.
        gradient: relative to the tensor's largest element.
        weight: likewise.
        resumed: likewise, and relative to the loss; here both sides compute in the same precision.
    """

    loss: float
    norm: float
    gradient: float
    weight: float
    resumed: float

    def of(self, check: str) -> float:
        """That of a row of the table."""
        by_check = {LOSS: self.loss, NORM: self.norm, WEIGHTS: self.weight, RESUMED: self.resumed}
        return by_check.get(check, self.gradient)


TOLERANCES = {
    torch.float32: Tolerance(loss=1e-5, norm=1e-5, gradient=1e-4, weight=2e-5, resumed=2e-5),
    torch.bfloat16: Tolerance(loss=5e-3, norm=2e-2, gradient=3e-1, weight=3e-2, resumed=3e-3),
    torch.float16: Tolerance(loss=1e-3, norm=3e-3, gradient=4e-2, weight=8e-3, resumed=3e-3),
}
"""Precision of the products -> how far training in it may be from the yardstick, which is always in fp32.

Each is about twice the worst that was measured on CPUs with 12 layers, by precision (loss, norm, gradient, weight):

    fp32   3e-7     1e-6     3e-5     5e-6     2 tensor x 4 pipeline ranks, 3 seeds, and with 24 layers
    bf16   2e-3     6e-3     1e-1     2e-2     1 rank, 4 seeds
    fp16   3e-4     1e-3     2e-2     4e-3     the same

The first step is ten times nearer in fp32; then weights drift apart, since Adam makes whole steps where a gradient is
only rounding. Half precision shows that its kernels work and finds gross errors; fp32 finds all.
"""


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        check: what was compared.
        difference: the worst over all ranks and steps.
        tolerance: the largest allowed.
        step: where it was found, from 1.
        name: of the parameter, where it is one.
        first: the worst of the first step, before errors spread.
        left_out: why nothing was compared.
    """

    check: str
    difference: float
    tolerance: float
    step: int = 0
    name: str = ""
    first: float = 0.0
    left_out: str = ""

    @property
    def ok(self) -> bool:
        """Whether it is as it should be, or was not compared."""
        return bool(self.left_out) or self.difference <= self.tolerance

    @property
    def is_wrong_at_first(self) -> bool:
        """Whether the first step, whose weights are still right, goes wrong."""
        return self.first > self.tolerance


class Notes:
    """The worst difference of each check on this rank.

    Args:
        checks: all there will be.
        names: of all parameters.
    """

    def __init__(self, checks: Sequence[str], names: Sequence[str]) -> None:
        self._names = ["", LOSS, *names]
        self._worst: dict[str, tuple[float, int, int]] = dict.fromkeys(checks, (0.0, 0, 0))
        self._first = dict.fromkeys(checks, 0.0)

    def add(self, check: str, step: int, difference: float, name: str = "") -> None:
        """Note a difference found in `step`, counted from 0."""
        if difference >= self._worst[check][0]:
            self._worst[check] = difference, step + 1, self._names.index(name)
        if step == 0:
            self._first[check] = max(self._first[check], difference)

    def rows(self, mesh: Mesh, tolerance: Tolerance) -> list[Row]:
        """The worst over all ranks; the same on every rank."""
        mine = [value for check, worst in self._worst.items() for value in (*worst, self._first[check])]
        ranks = mesh.gather(mine)
        rows = []
        for number, check in enumerate(self._worst):
            found = [rank[4 * number : 4 * number + 4] for rank in ranks]
            difference, step, name, _ = max(found)
            first = max(one[3] for one in found)
            rows.append(Row(check, difference, tolerance.of(check), int(step), self._names[int(name)], first))
        return rows


def kind_of(name: str) -> str:
    """The check that compares the gradient of parameter `name`."""
    (kind,) = [kind for kind, pattern in GRADIENTS.items() if re.fullmatch(pattern, name)]
    return kind


def new_notes(plain: PlainStep) -> Notes:
    """Notes for all checks of a model with the parameters of `plain`."""
    kinds = {kind_of(name) for name in plain.weights}
    return Notes([LOSS, *(k for k in GRADIENTS if k in kinds), NORM, WEIGHTS, PACKED, RESUMED], list(plain.weights))


def left_out(rows: Sequence[Row], reasons: Mapping[str, str]) -> list[Row]:
    """The rows, with the reasons why some compare nothing."""
    return [replace(row, left_out=reasons.get(row.check, "")) for row in rows]
