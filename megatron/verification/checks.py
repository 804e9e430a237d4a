"""The comparisons: every rank compares its own parts, and notes how far they are."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron.parallel.build import Part
from megatron.verification.course import MeshStep
from megatron.verification.rows import LOSS, NORM, PACKED, RESUMED, WEIGHTS, Notes, kind_of
from megatron.verification.yardstick import PlainStep


def relative(found: float | Tensor, expected: float | Tensor, scale: float) -> float:
    """The largest difference over `scale`; infinite where it is not a number."""
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    if not found.numel():
        return 0.0
    difference = float((found - expected).abs().max())
    share = difference / scale if scale else (math.inf if difference else 0.0)
    return math.inf if math.isnan(share) else share


def compare_with_plain(
    notes: Notes, parts: Sequence[Part], steps: Sequence[MeshStep], plain: Sequence[PlainStep]
) -> None:
    """Loss, gradients, their norm and weights of each step against plain training."""
    for number, (step, wanted) in enumerate(zip(steps, plain, strict=True)):
        notes.add(LOSS, number, relative(step.loss, wanted.loss, abs(wanted.loss)))
        notes.add(NORM, number, relative(step.norm, wanted.norm, wanted.norm))
        for name, difference in gradient_differences(parts, step.gradients, wanted).items():
            notes.add(kind_of(name), number, difference, name)
        for name, difference in differences(parts, step.weights, wanted.weights).items():
            notes.add(WEIGHTS, number, difference, name)


def gradient_differences(parts: Sequence[Part], found: Mapping[str, Tensor], plain: PlainStep) -> dict[str, float]:
    """The difference of each part's gradient from the plain one; without a gradient it counts as 0."""
    present = {part.name: found.get(part.name, torch.zeros(part.local.shape)) for part in parts}
    return differences(parts, present, plain.gradients)


def differences(parts: Sequence[Part], found: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> dict[str, float]:
    """The difference of each part from that part of the whole tensor, relative as `scales` says."""
    scale = scales(whole)
    return {part.name: relative(found[part.name], whole[part.name][part.ranges], scale[part.name]) for part in parts}


def compare_packings(notes: Notes, step: MeshStep, other: MeshStep, plain: PlainStep) -> None:
    """Gradients of one step with `--packing` padding_free and with none."""
    scale = scales(plain.gradients)
    for name, gradient in step.gradients.items():
        found = other.gradients.get(name, torch.zeros_like(gradient))
        notes.add(PACKED, 0, relative(found, gradient, scale[name]), name)


def compare_resumed(
    notes: Notes, steps: Sequence[MeshStep], resumed: Sequence[MeshStep], start: int, plain: PlainStep
) -> None:
    """Losses of the steps after `start`, and the last weights, against those of the run that went on."""
    for number, (step, again) in enumerate(zip(steps[start:], resumed, strict=True), start):
        notes.add(RESUMED, number, relative(again.loss, step.loss, abs(step.loss)), LOSS)
    scale = scales(plain.weights)
    for name, weight in steps[-1].weights.items():
        notes.add(RESUMED, len(steps) - 1, relative(resumed[-1].weights[name], weight, scale[name]), name)


def scales(whole: Mapping[str, Tensor]) -> dict[str, float]:
    """What differences of each tensor are relative to: its largest element, or a hundredth of the largest of all.

    Gradients that are 0 but for rounding exist, such as that of a bias of k: it does not change the softmax.
    """
    largest = {name: float(tensor.abs().max()) for name, tensor in whole.items()}
    least = 0.01 * max(largest.values())
    return {name: max(size, least) for name, size in largest.items()}
