"""Checkpoint folders: what lies where, and which of them may be read.

    SAVE/latest_checkpointed_iteration.txt   "100" or "release"; replaced last, in one step
    SAVE/iter_0000100/                       or SAVE/release/
        run.json                             options, progress, versions
        model/*.safetensors                  weights under Hugging Face's names, in slices
        optimizer/*.safetensors              optimizer state by weight: exp_avg.NAME, ...
        tokenizer/                           the tokenizer's files
        manifest.json                        size and crc32 of every other file

A checkpoint is written to SAVE/.iter_0000100.tmp and renamed. One that is written again waits as SAVE/.iter_0000100.old
until the new one has its name; one that is no longer kept is SAVE/.iter_0000100.removed while it is deleted.
"""

import re
import shutil
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
TRACKED = re.compile(rf"{RELEASE}|[0-9]{{1,18}}")
RUN, MANIFEST = "run.json", "manifest.json"
WEIGHTS, OPTIMIZER, TOKENIZER = "model", "optimizer", "tokenizer"


def folder_name(iteration: int | None) -> str:
    """Name of the folder of an iteration; None is a release, weights that no run here has trained."""
    return RELEASE if iteration is None else f"iter_{iteration:07d}"


def iteration_of(folder: Path) -> int:
    """The inverse of `folder_name`, of an iteration."""
    return int(folder.name.removeprefix("iter_"))


def beside(folder: Path, kind: str) -> Path:
    """The name that a checkpoint has before ("tmp") or after ("old", "removed") the time in which it is one."""
    return folder.with_name(f".{folder.name}.{kind}")


def iteration_folders(load: Path) -> list[Path]:
    """The folders of iterations in `load`, oldest first."""
    found = [path for path in load.glob("iter_*") if path.is_dir() and re.fullmatch(r"iter_\d{1,18}", path.name)]
    return sorted(found, key=iteration_of)


def holds_checkpoints(save: Path) -> bool:
    """Whether a run has saved to this folder, be it whole or not."""
    return (save / TRACKER).exists() or bool(iteration_folders(save))


def candidates(load: Path, iteration: int | None) -> list[Path]:
    """The checkpoint folders in `load` that may be read, the best first.

    Args:
        load: a folder of checkpoints.
        iteration: this one and no other; None: the one that the tracker names, then the newest.

    Raises:
        ValueError: there is none of that iteration, or the tracker is damaged.
    """
    folders = iteration_folders(load)
    if iteration is not None:
        folder = load / folder_name(iteration)
        if not folder.is_dir():
            have = ", ".join(path.name for path in folders) or "none"
            raise ValueError(f"{load} has no checkpoint of iteration {iteration}; there are: {have}")
        return [folder]
    newest = list(reversed(folders))
    if not (load / TRACKER).is_file():
        return newest
    text = read_tracker(load)
    if not TRACKED.fullmatch(text):
        raise ValueError(
            f"{load / TRACKER} says {text[:40]!r}; it should be an iteration's number or 'release'. Correct it, or "
            "remove it to take the newest whole checkpoint"
        )
    named = load / folder_name(None if text == RELEASE else int(text))
    replaced = [beside(named, "old")] if beside(named, "old").is_dir() else []
    return [named, *replaced, *(path for path in newest if path != named)]


def read_tracker(load: Path) -> str:
    """What the tracker says, which should be as `TRACKED`."""
    with (load / TRACKER).open("rb") as file:
        return file.read(64).decode(errors="replace").strip()


def remove_folder(folder: Path, *, ignore_errors: bool = False) -> None:
    """Delete a checkpoint; where it is a link to another place, only the link."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=ignore_errors)
