"""Why a layout differs from one device: known errors, each confirmed by a probe before it is named.

All ranks make the same probes together; what they are asked for is the same on every rank.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megatron.verification.checks import differences, gradient_differences
from megatron.verification.evidence import Evidence
from megatron.verification.loss_probes import divisor, factor, rotary
from megatron.verification.rows import GRADIENTS, NORM, PACKED, RESUMED, WEIGHTS, kind_of


def causes(evidence: Evidence) -> list[str]:
    """What is wrong, in words; at least one sentence.

    The first probe that finds something has the word: what the later ones would find may follow from it.
    """
    return next((found for probe in PROBES if (found := probe(evidence))), [_unknown(evidence)])


def not_summed(evidence: Evidence) -> list[str]:
    """Gradients that are right once they are summed over the ranks that should have done it."""
    parts, tied = evidence.course.parts, evidence.config.model.tie_embed_logits
    partial = sorted(part.name for part in parts if part.gradient_is_partial)
    copies = ["embedding.weight"] if tied and evidence.mesh.size("pp") > 1 else []
    summands = {
        "tp": (partial, "gradients of {} are not summed over tensor-parallel ranks"),
        "pp": (copies, "gradients of the tied {} are not summed over the first and the last stage"),
    }
    found = []
    for dimension, (names, sentence) in summands.items():
        before, after = _summed(evidence, dimension, names)
        if before > evidence.tolerance[1] >= after:
            what = sorted({kind_of(name).removeprefix("gradient of ") for name in names})
            found.append(f"{sentence.format(' and '.join(what))}: summed, they are right")
    return found


def _summed(evidence: Evidence, dimension: str, names: Sequence[str]) -> tuple[float, float]:
    """The worst difference of the first step's gradients of `names`, as they are and summed over `dimension`."""
    plain, mesh = evidence.plain[0], evidence.mesh
    gradients = evidence.steps[0].gradients
    parts = [part for part in evidence.course.parts if part.name in names]
    ranges = {part.name: part.ranges for part in parts}
    sums = {}
    for name in names:
        whole = torch.zeros(plain.gradients[name].shape)
        if name in ranges and name in gradients:
            whole[ranges[name]] = gradients[name]
        whole = whole.to(mesh.device)
        dist.all_reduce(whole, group=mesh.group(dimension))
        sums[name] = whole.cpu()
    summed = {name: sums[name][ranges[name]] for name in ranges}
    before = evidence.worst(gradient_differences(parts, gradients, plain).values())
    return before, evidence.worst(differences(parts, summed, plain.gradients).values())


def crossing(evidence: Evidence) -> list[str]:
    """Packed rows are wrong, padded ones are right."""
    if not evidence.fails(PACKED) or evidence.other_packing is None:
        return []
    steps = [evidence.steps[0], evidence.other_packing]
    if evidence.config.data.packing == "none":
        steps.reverse()
    packed, unpacked = (evidence.gradient_error(step.gradients) for step in steps)
    if packed <= evidence.tolerance[1] or unpacked > evidence.tolerance[1]:
        return []
    return [
        "samples of a packed row see each other: attention, positions or labels cross from one to the next "
        "(rows of one sample each are right)"
    ]


def resumption(evidence: Evidence) -> list[str]:
    """The checkpoint lost something: settings in run.json, weights, or the optimizer's state."""
    resumed = evidence.resumption
    if resumed is None or not evidence.fails(RESUMED):
        return []
    if resumed.error:
        return [f"the checkpoint cannot be resumed: {resumed.error}"]
    if resumed.changed:
        changes = ", ".join(f"{flag} {value} became {changed}" for flag, value, changed in resumed.changed)
        return [f"settings lost in the checkpoint's run.json: {changes}"]
    saved = evidence.steps[len(evidence.steps) - len(resumed.steps) - 1].weights
    wrong = sorted(name for name, weight in resumed.loaded.items() if not torch.equal(weight, saved[name]))
    if evidence.mesh.any(bool(wrong)):
        return [f"weights of the checkpoint are not those that were saved: {', '.join(wrong[:3]) or 'on other ranks'}"]
    return ["the optimizer's state: weights and settings came back, but the next step is another one"]


def _unknown(evidence: Evidence) -> str:
    """Where to look, for an error without a known pattern."""
    if evidence.loss_is_wrong:
        return "no known pattern; the first loss is wrong, so it is in the forward pass"
    wrong = [row.check for row in evidence.rows if row.is_wrong_at_first]
    kinds = [check.removeprefix("gradient of ") for check in wrong if check in GRADIENTS]
    if kinds:
        return f"no known pattern; the first loss is right, so it is in the backward pass: {', '.join(kinds)}"
    if set(wrong) & {NORM, WEIGHTS}:
        return (
            "no known pattern; the first loss and gradients are right, so it is in the norm, clipping or the optimizer"
        )
    return "no known pattern; the first step is right, so it is in what later ones have besides: other samples, state"


PROBES: tuple[Callable[[Evidence], list[str]], ...] = (
    not_summed,
    crossing,
    rotary,
    divisor,
    factor,
    resumption,
)
"""In an order in which none takes the consequences of another's error for its own."""
