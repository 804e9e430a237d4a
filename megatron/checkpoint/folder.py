"""Checkpoint folders: how one becomes visible only when it is whole, and how damage is found.

    SAVE/latest_checkpointed_iteration.txt   "100" or "release"; replaced last, in one step
    SAVE/iter_0000100/                       or SAVE/release/
        run.json                             options, progress, versions
        model/*.safetensors                  weights under Hugging Face's names, in slices
        optimizer/*.safetensors              optimizer state by weight: exp_avg.NAME, ...
        tokenizer/                           the tokenizer's files
        manifest.json                        size and crc32 of every other file

A checkpoint is written to SAVE/.iter_0000100.tmp and renamed. Every rank writes its own files; the main rank the rest.
One that is written again waits as SAVE/.iter_0000100.old until the new one has its name.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron.checkpoint.store import Written

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
RUN, MANIFEST = "run.json", "manifest.json"
CHECKSUM = "crc32"


def folder_name(iteration: int | None) -> str:
    """Name of the folder of an iteration; None is a release, weights that no run here has trained."""
    return RELEASE if iteration is None else f"iter_{iteration:07d}"


@dataclass(frozen=True)
class Writing:
    """A checkpoint being written.

    Attributes:
        folder: the temporary folder.
        rank: this process.
    """

    folder: Path
    rank: int

    def add(self, name: str, write: Callable[[Path], Written]) -> None:
        """Write the file `name`, a path below the checkpoint, and note its size and checksum."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        note = {name: asdict(write(path))}
        with (self.folder / f"{MANIFEST}.{self.rank}").open("a") as part:
            part.write(json.dumps(note) + "\n")

    def add_json(self, name: str, value: Any) -> None:
        """Write a JSON file."""
        self.add(name, partial(write_bytes, data=json.dumps(value, indent=1).encode() + b"\n"))

    def add_copies(self, name: str, files: Iterable[Path]) -> None:
        """Copy small files into the folder `name`."""
        for file in files:
            self.add(f"{name}/{file.name}", partial(write_bytes, data=file.read_bytes()))


@contextmanager
def writing(
    save: Path, iteration: int | None, *, rank: int, is_main: bool, barrier: Callable[[], None]
) -> Iterator[Writing]:
    """Write a checkpoint of all ranks together; it exists when the context has ended without an error.

    A crash at any instant leaves the checkpoints before it as they were.
    """
    name = folder_name(iteration)
    temporary, final = save / f".{name}.tmp", save / name
    if is_main:
        save.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(save)
        temporary.mkdir()
    barrier()
    try:
        yield Writing(temporary, rank)
        barrier()
        if is_main:
            _merge_manifest(temporary)
            _publish(temporary, final)
            replace_file(save / TRACKER, (RELEASE if iteration is None else str(iteration)).encode() + b"\n")
    except BaseException:
        if is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    barrier()


def _clear_leftovers(save: Path) -> None:
    """Remove what crashes left behind; a checkpoint that was about to be replaced gets its name back."""
    for pattern in (".iter_*.tmp", f".{RELEASE}.tmp"):
        for temporary in save.glob(pattern):
            shutil.rmtree(temporary)
    for pattern in (".iter_*.old", f".{RELEASE}.old"):
        for replaced in save.glob(pattern):
            final = save / replaced.name.removeprefix(".").removesuffix(".old")
            if final.exists():
                shutil.rmtree(replaced)
            else:
                replaced.rename(final)


def _publish(temporary: Path, final: Path) -> None:
    """Give a whole checkpoint its name; at every instant it or the one it replaces can be loaded."""
    for folder in (temporary, *(path for path in temporary.iterdir() if path.is_dir())):
        _sync_folder(folder)
    replaced = _replaced(final)
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    _sync_folder(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _replaced(final: Path) -> Path:
    return final.with_name(f".{final.name}.old")


def _merge_manifest(folder: Path) -> None:
    files: dict[str, Any] = {}
    for part in sorted(folder.glob(f"{MANIFEST}.*")):
        for line in part.read_text().splitlines():
            files |= json.loads(line)
        part.unlink()
    data = json.dumps({"checksum": CHECKSUM, "files": files}, indent=1)
    write_bytes(folder / MANIFEST, data.encode())  # ends with its brace: a manifest cut anywhere is no JSON


def write_bytes(path: Path, data: bytes) -> Written:
    """Write a small file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return Written(len(data), f"{zlib.crc32(data):08x}")


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file in one step."""
    temporary = path.with_name(f".{path.name}.tmp")
    write_bytes(temporary, data)
    temporary.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def damage(folder: Path, *, reads_all: bool = False) -> str | None:
    """What is wrong with a checkpoint folder by its manifest; None if nothing.

    Sizes are always compared, checksums of JSON files only, unless `reads_all`.
    """
    if not folder.is_dir():
        return f"{folder} is missing"
    try:
        files: Mapping[str, Mapping[str, Any]] = json.loads((folder / MANIFEST).read_text())["files"]
        for name, expected in files.items():
            path = folder / name
            if not path.is_file():
                return f"{path} is missing"
            if path.stat().st_size != expected["size"]:
                return f"{path} has {path.stat().st_size} bytes instead of {expected['size']}"
            if (reads_all or path.suffix == ".json") and file_checksum(path) != expected["checksum"]:
                return f"{path} was changed: its {CHECKSUM} is not that of the manifest"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{folder / MANIFEST} cannot be read: {error!r}"
    return None


def changed_files(folder: Path, below: Sequence[str] = ("",), rank: int = 0, size: int = 1) -> list[Path]:
    """The files of a checkpoint that are not what was written, by checksum; reads all of them.

    Args:
        folder: of the checkpoint; one without a manifest cannot tell.
        below: only files whose names begin with one of these.
        rank: `size` processes share the work, each takes every size-th file.
        size: of those.
    """
    if not (folder / MANIFEST).is_file():
        return []
    files = json.loads((folder / MANIFEST).read_text())["files"]
    mine = sorted(name for name in files if name.startswith(tuple(below)))[rank::size]
    return [folder / name for name in mine if file_checksum(folder / name) != files[name]["checksum"]]


def file_checksum(path: Path, chunk: int = 1 << 24) -> str:
    """crc32 of a file, as eight hexadecimal digits."""
    crc = 0
    with path.open("rb") as file:
        while data := file.read(chunk):
            crc = zlib.crc32(data, crc)
    return f"{crc:08x}"


def newest_whole(load: Path, iteration: int | None, *, reads_all: bool = False) -> tuple[Path, list[str]]:
    """The checkpoint folder in `load` to read, and warnings about damaged ones passed over.

    Args:
        load: a folder with a tracker.
        iteration: this one and no other; None: the one the tracker names, or the newest whole one if that is damaged.
        reads_all: compare all checksums, not only those of small files.

    Raises:
        ValueError: there is none.
    """
    if iteration is not None:
        folder = load / folder_name(iteration)
        if not folder.is_dir():
            have = ", ".join(path.name for path in iteration_folders(load)) or "none"
            raise ValueError(f"{load} has no checkpoint of iteration {iteration}; there are: {have}")
        candidates: Iterable[Path] = [folder]
    else:
        named = _tracked(load)
        replaced = [_replaced(named)] if _replaced(named).is_dir() else []
        candidates = [named, *replaced, *(path for path in reversed(iteration_folders(load)) if path != named)]
    warnings: list[str] = []
    for folder in candidates:
        problem = damage(folder, reads_all=reads_all)
        if problem is None:
            return folder, [f"{w}; going back to {folder}" for w in warnings]
        warnings.append(f"checkpoint {folder} is damaged: {problem}")
    raise ValueError(f"no whole checkpoint in {load}: {'; '.join(warnings)}")


def _tracked(load: Path) -> Path:
    text = (load / TRACKER).read_text(errors="replace").strip()
    if text != RELEASE and not re.fullmatch(r"\d{1,18}", text):
        raise ValueError(f"{load / TRACKER} says {text[:40]!r}; it should be an iteration's number or 'release'")
    return load / folder_name(None if text == RELEASE else int(text))


def iteration_folders(load: Path) -> list[Path]:
    """The folders of iterations in `load`, oldest first."""
    found = [path for path in load.glob("iter_*") if path.is_dir() and re.fullmatch(r"iter_\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("iter_")))
