"""What a run starts from: its options, and the checkpoint that they name, which is whole."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron.checkpoint import Checkpoint, holds_checkpoints, is_changed, large_files, open_checkpoint
from megatron.config import CommonError, RunConfig, UsageError, resolve_run
from megatron.parallel.mesh import Mesh

OF_LOAD = ("load", "load_iters", "load_optim", "finetune")
"""Flags that say what the first start takes from where; a restart takes all there is from `--save`."""


@dataclass(frozen=True)
class Start:
    """What a run starts from.

    Attributes:
        typed: field name -> value of the flags; `--load` is where the run starts from, if from anywhere.
        config: the options.
        checkpoint: what `--load` names.
        notes: lines for the user.
        damaged: checkpoints that were passed over after a look at their weights, and what is wrong with them.
    """

    typed: Mapping[str, Any]
    config: RunConfig
    checkpoint: Checkpoint | None
    notes: tuple[str, ...] = ()
    damaged: Mapping[Path, str] = field(default_factory=dict)

    @property
    def resumes(self) -> bool:
        """Whether the run goes on where a training checkpoint stopped."""
        return bool(self.checkpoint and self.checkpoint.iteration and not self.config.checkpoint.finetune)


def open_start(typed: Mapping[str, Any]) -> Start:
    """What the run of these flags starts from; with `--auto_resume` from `--save`, once that holds checkpoints.

    Raises:
        UsageError: the flags do not go together, or do not fit the checkpoint, or `--save` cannot be written to.
        CommonError: there is no checkpoint where one was asked for, or none is whole.
    """
    save = typed.get("save")
    if not (typed.get("auto_resume") and save):
        return _open(typed, {})
    if not holds_checkpoints(Path(save)):
        begins = f"from --load {typed['load']}" if "load" in typed else "with initial weights"
        return replace(_open(typed, {}), notes=(f"--auto_resume: no checkpoint in {save} yet, beginning {begins}",))
    restart = {name: value for name, value in typed.items() if name not in OF_LOAD}
    return _open({**restart, "load": save}, {})


def _open(typed: Mapping[str, Any], damaged: Mapping[Path, str]) -> Start:
    load, checkpoint = typed.get("load"), None
    try:
        if load:
            family = typed.get("model_name")
            checkpoint = open_checkpoint(Path(load), typed.get("load_iters"), family=family, damaged=damaged)
    except ValueError as error:
        begins = "to begin anew, move it away" if typed.get("auto_resume") else "--auto_resume begins without one"
        raise CommonError(f"{error}; {begins}" if load == typed.get("save") else str(error)) from error
    config = resolve_run(typed, checkpoint.stored_options() if checkpoint else None)
    if config.checkpoint.save and not config.training.eval_only:
        _check_writable(Path(config.checkpoint.save))
    return Start(typed, config, checkpoint, damaged=damaged)


def _check_writable(save: Path) -> None:
    """Sooner than at the first checkpoint, which may be hours later."""
    place = next(path for path in (save, *save.absolute().parents) if path.exists())
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise UsageError(f"--save {save}: {place} is not a folder that can be written to; name another one")


def verified(start: Start, mesh: Mesh) -> Start:
    """The same start if the weights and optimizer state it needs are those that were written, by their checksums.

    Else one with the newest whole checkpoint. Every rank reads a share of the files, and all decide alike.

    Raises:
        CommonError: there is no whole checkpoint left, it needs other options, or ranks see different ones.
    """
    _check_agreement(start, mesh)
    while start.config.checkpoint.verify_checkpoint and (problem := _damage(start, mesh)):
        assert start.checkpoint
        folder = start.checkpoint.folder
        try:
            other = _open(start.typed, {**start.damaged, folder: problem})
        except UsageError as error:
            raise CommonError(f"checkpoint {folder} is damaged: {problem}; the newest whole one: {error}") from error
        if other.config != start.config:
            assert other.checkpoint
            raise CommonError(
                f"checkpoint {folder} is damaged: {problem}; the newest whole one has other options: to go on from "
                f"{other.checkpoint.folder}, move the damaged one away and start again"
            )
        start = replace(other, notes=start.notes)
    return start


def _check_agreement(start: Start, mesh: Mesh) -> None:
    iteration = start.checkpoint.iteration if start.checkpoint else -1
    found = sorted({int(values[0]) for values in mesh.gather([float(iteration)])})
    if len(found) > 1:
        some = ", ".join("none" if number < 0 else str(number) for number in found)
        raise CommonError(
            f"ranks see different checkpoints in {start.typed.get('load') or start.typed.get('save')}: of iterations "
            f"{some}; it should be the same folder on every machine"
        )


def _damage(start: Start, mesh: Mesh) -> str | None:
    """Which files of the checkpoint were changed after they were written, the same on every rank."""
    if not start.checkpoint:
        return None
    folder = start.checkpoint.folder
    files = large_files(folder, with_optimizer=start.resumes and start.config.checkpoint.load_optim)
    mine = list(files)[mesh.ranks.get_rank() :: mesh.ranks.size()]
    flags = [float(name in mine and is_changed(folder, name, files[name])) for name in files]
    changed = [str(folder / name) for name, flag in zip(files, mesh.sum(flags), strict=True) if flag]
    return f"{', '.join(changed)} was changed: its checksum is not that of the manifest" if changed else None
