"""Which checkpoints are kept, and how the others go: first out of sight, then off the disk."""

from collections.abc import Iterator
from pathlib import Path

from megatron.checkpoint.folder import MANIFEST, beside, iteration_folders, iteration_of, remove_folder
from megatron.checkpoint.integrity import check_folder


def prune(save: Path, newest: int, keep_last: int, keep_every: int | None) -> list[str]:
    """Remove the checkpoints that are not kept; a crash meanwhile leaves every other one as it was.

    Args:
        save: the folder of all checkpoints.
        newest: iteration of the one just written; later ones, of a course that was left, are not touched.
        keep_last: so many of the newest whole ones are kept, the newest of all included.
        keep_every: those of every so many iterations are kept, too.

    Returns:
        What could not be removed, a line each.
    """
    problems = []
    for folder in list(_outdated(save, newest, keep_last, keep_every)):
        removed = beside(folder, "removed")
        try:
            folder.rename(removed)
            remove_folder(removed)
        except OSError as error:
            problems.append(f"warning: checkpoint {folder} is not needed any more but could not be removed: {error}")
    return problems


def _outdated(save: Path, newest: int, keep_last: int, keep_every: int | None) -> Iterator[Path]:
    """Damaged ones do not count as kept, and are left where they are among those."""
    kept = 0
    for folder in reversed(iteration_folders(save)):
        iteration = iteration_of(folder)
        if iteration > newest or not (folder / MANIFEST).is_file():
            continue
        if kept < keep_last:
            kept += _is_whole(folder)
        elif not (keep_every and iteration % keep_every == 0):
            yield folder


def _is_whole(folder: Path) -> bool:
    try:
        check_folder(folder)
    except (OSError, ValueError):
        return False
    return True
