"""Going on from a checkpoint: what came back of settings, weights and the optimizer's state."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from megatron.checkpoint import Checkpoint
from megatron.config import RunConfig, resolve_run
from megatron.config.run import GROUPS
from megatron.verification.course import MeshStep

STORED = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "seq_length")
"""Options besides the architecture that `--use_checkpoint_args` takes from a checkpoint."""


@dataclass(frozen=True)
class Resumption:
    """A run that went on from a checkpoint.

    Attributes:
        changed: (flag, value, value after the checkpoint) of settings that did not come through.
        loaded: this rank's weights before its first step.
        steps: that it made.
        error: why it could not be built.
    """

    changed: Sequence[tuple[str, Any, Any]] = ()
    loaded: Mapping[str, Tensor] = field(default_factory=dict)
    steps: Sequence[MeshStep] = ()
    error: str = ""


def resumed_config(config: RunConfig, checkpoint: Checkpoint) -> RunConfig:
    """The run that goes on from `checkpoint` with `--use_checkpoint_args`, all flags but the stored ones typed again.

    Raises:
        UsageError: what was stored is not enough for a run.
    """
    typed = {
        field.name: getattr(getattr(config, group), field.name)
        for group, kind in GROUPS.items()
        if group != "model"
        for field in fields(kind)
        if field.name not in STORED
    }
    typed |= {"load": str(checkpoint.folder), "use_checkpoint_args": True}
    return resolve_run(typed, checkpoint.stored_options())


def changed_settings(config: RunConfig, other: RunConfig) -> list[tuple[str, Any, Any]]:
    """(flag, value, other value) of each setting that differs, the checkpoint's place aside."""
    pairs = [
        (field.name, getattr(getattr(config, group), field.name), getattr(getattr(other, group), field.name))
        for group, kind in GROUPS.items()
        if group != "checkpoint"
        for field in fields(kind)
    ]
    return [(f"--{name}", value, changed) for name, value, changed in pairs if value != changed]
