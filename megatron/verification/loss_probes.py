"""Probes for a wrong loss, or a wrong size of all gradients: divisors, reductions, positions."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from megatron.config import ModelConfig
from megatron.verification.checks import relative
from megatron.verification.course import Course
from megatron.verification.evidence import Evidence
from megatron.verification.yardstick import batch_loss, global_batch, micro_batch_losses, plain_model

ROTARY = ("rope_theta", "rope_scaling_factor")
"""Settings that a model might compute without."""


def factor(evidence: Evidence) -> list[str]:
    """All gradients wrong by the same factor; with the loss, its divisor is wrong, without it, a reduction."""
    gradients, plain, parts = evidence.steps[0].gradients, evidence.plain[0].gradients, evidence.course.parts
    expected = {part.name: plain[part.name][part.ranges] for part in parts if part.name in gradients}
    products = sum(float((gradients[name] * wanted).double().sum()) for name, wanted in expected.items())
    squares = sum(float(wanted.double().square().sum()) for wanted in expected.values())
    product, square = evidence.mesh.sum([products, squares])
    ratio = product / square if square else 1.0
    if abs(ratio - 1) <= evidence.tolerance[1] or not ratio:
        return []
    scaled = {name: gradient / ratio for name, gradient in gradients.items()}
    if evidence.gradient_error(scaled) > evidence.tolerance[1]:
        return []
    known = f"all gradients are {_number(evidence, ratio)} times what they should be"
    loss = evidence.steps[0].loss / evidence.plain[0].loss
    if abs(loss / ratio - 1) <= evidence.tolerance[1]:
        return [f"{known}, and so is the loss: its divisor is wrong"]
    if evidence.loss_is_wrong:
        return []
    return [f"{known}, the loss is right: a reduction over data-parallel ranks (sum or mean), or the loss scale"]


def _number(evidence: Evidence, ratio: float) -> str:
    """A factor, with what there are as many of on this layout."""
    counts = {
        "data-parallel ranks": evidence.mesh.size("dp"),
        "tensor-parallel ranks": evidence.mesh.size("tp"),
        "pipeline stages": evidence.mesh.size("pp"),
        "micro batches of a rank": len(evidence.course.micro_batches()),
    }
    matches = [
        f"{'' if wanted == count else '1 / '}the number of {what}"
        for what, count in counts.items()
        for wanted in (float(count), 1 / count)
        if count > 1 and abs(ratio / wanted - 1) <= evidence.tolerance[1]
    ]
    return f"{ratio:.5g} ({' or '.join(matches)})" if matches else f"{ratio:.5g}"


def divisor(evidence: Evidence) -> list[str]:
    """The loss is what a known wrong divisor makes of the right token losses."""
    if not evidence.loss_is_wrong:
        return []
    found, right = evidence.steps[0].loss, evidence.plain[0].loss
    fitting = [
        words
        for words, value in _divided(evidence).items()
        if relative(found, value, abs(value)) <= evidence.tolerance[0] < relative(value, right, abs(right))
    ]
    result = f"(that gives the loss of {found:.6f} that was found; {right:.6f} is right)"
    return [f"the loss divisor: {', or '.join(fitting)} {result}"] if fitting else []


@torch.no_grad()
def _divided(evidence: Evidence) -> dict[str, float]:
    """The first step's loss with other divisors than the right one."""
    model, mesh = plain_model(evidence.config, evidence.vocab_size), evidence.mesh
    own = []
    for rows in evidence.course.micro_batches():
        pairs = list(micro_batch_losses(model, rows))
        own += [sum(float(column) for column in columns) for columns in zip(*pairs, strict=True)]
        own.append(float(rows.useful_tokens))
    ranks = np.array(mesh.gather(own, "dp")).reshape(mesh.size("dp"), -1, 3)
    losses, weights, tokens = ranks.transpose(2, 0, 1)  # [data-parallel rank, micro batch] each
    by_micro_batch = losses / np.maximum(weights, 1e-9)
    by_rank = losses.sum(1) / np.maximum(weights.sum(1), 1e-9)
    return {
        "each micro batch is divided by its own weights instead of the global batch's": float(by_micro_batch.sum()),
        "it is the mean of the micro batches' means, not of the global batch": float(by_micro_batch.mean()),
        "each data-parallel rank divides by its own weights instead of the global batch's": float(by_rank.sum()),
        "it is the mean of the data-parallel ranks' means, not of the global batch": float(by_rank.mean()),
        "the number of tokens, not the sum of their weights": float(losses.sum() / max(tokens.sum(), 1)),
        "the weights of the global batch, though --no_calculate_per_token_loss asks for a mean of means": float(
            losses.sum() / max(weights.sum(), 1e-9)
        ),
    }


@torch.no_grad()
def rotary(evidence: Evidence) -> list[str]:
    """The loss is wrong, but right where no position is turned."""
    if not evidence.loss_is_wrong:
        return []
    config = replace(evidence.config, training=replace(evidence.config.training, calculate_per_token_loss=True))
    batch = global_batch(config, evidence.samples, 0)
    course = Course(config, evidence.vocab_size, evidence.samples, evidence.mesh)
    rows = course.micro_batches()
    still = [replace(one, positions=np.zeros_like(one.positions)) for one in rows]
    found, found_still = (course.engine.evaluate(each).mean for each in (rows, still))
    model = plain_model(config, evidence.vocab_size)

    def is_found(value: float, expected: Tensor) -> bool:
        return relative(value, float(expected), abs(float(expected))) <= evidence.tolerance[0]

    right = batch_loss(model, config, batch)
    if is_found(found, right) or not is_found(found_still, batch_loss(model, config, batch, zero_positions=True)):
        return []
    given = {name: getattr(config.model, name) for name in ROTARY}
    defaults = {
        name: getattr(ModelConfig(), name) for name, value in given.items() if value != getattr(ModelConfig(), name)
    }
    for settings in [*({name: value} for name, value in defaults.items()), defaults]:
        other = replace(config, model=replace(config.model, **settings))
        if is_found(found, batch_loss(plain_model(other, evidence.vocab_size), other, batch)):
            values = " and ".join(f"--{name} {given[name]:g}" for name in settings)
            return [f"rotary settings: {values} lost: the model computes as with the default"]
    return ["positions: with all of them 0 the loss is right (rotary settings are --rope_theta, --rope_scaling_factor)"]
