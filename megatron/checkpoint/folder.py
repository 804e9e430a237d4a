"""Checkpoint folders: how one becomes visible only when it is whole, and how damage is found.

    SAVE/latest_checkpointed_iteration.txt   "100" or "release"; replaced last, in one step
    SAVE/iter_0000100/                       or SAVE/release/
        run.json                             options, progress, versions
        model/*.safetensors                  weights under Hugging Face's names, in slices
        optimizer/*.safetensors              optimizer state by weight: exp_avg.NAME, ...
        tokenizer/                           the tokenizer's files
        manifest.json                        size and crc32 of every other file

A checkpoint is written to SAVE/.iter_0000100.tmp and renamed. Every rank writes its own files; the main rank the rest.
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
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
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    barrier()
    yield Writing(temporary, rank)
    barrier()
    if is_main:
        _merge_manifest(temporary)
        _sync_folder(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        _sync_folder(save)
        replace_file(save / TRACKER, (RELEASE if iteration is None else str(iteration)).encode() + b"\n")
    barrier()


def _merge_manifest(folder: Path) -> None:
    files: dict[str, Any] = {}
    for part in sorted(folder.glob(f"{MANIFEST}.*")):
        for line in part.read_text().splitlines():
            files |= json.loads(line)
        part.unlink()
    write_bytes(folder / MANIFEST, json.dumps({"checksum": CHECKSUM, "files": files}, indent=1).encode() + b"\n")


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


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder by its manifest, as far as sizes and small files tell; None if nothing."""
    try:
        files: Mapping[str, Mapping[str, Any]] = json.loads((folder / MANIFEST).read_text())["files"]
        for name, expected in files.items():
            path = folder / name
            if not path.is_file():
                return f"{path} is missing"
            if path.stat().st_size != expected["size"]:
                return f"{path} has {path.stat().st_size} bytes instead of {expected['size']}"
            if path.suffix == ".json" and file_checksum(path) != expected["checksum"]:
                return f"{path} was changed: its {CHECKSUM} is not that of the manifest"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{folder / MANIFEST} cannot be read: {error!r}"
    return None


def changed_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that are not what was written, by checksum; reads all of it. No manifest, no answer."""
    if not (folder / MANIFEST).is_file():
        return []
    files = json.loads((folder / MANIFEST).read_text())["files"]
    return [folder / name for name, expected in files.items() if file_checksum(folder / name) != expected["checksum"]]


def file_checksum(path: Path, chunk: int = 1 << 24) -> str:
    """crc32 of a file, as eight hexadecimal digits."""
    crc = 0
    with path.open("rb") as file:
        while data := file.read(chunk):
            crc = zlib.crc32(data, crc)
    return f"{crc:08x}"


def newest_whole(load: Path, iteration: int | None) -> tuple[Path, list[str]]:
    """The checkpoint folder in `load` to read, and warnings about damaged ones passed over.

    Args:
        load: a folder with a tracker.
        iteration: this one and no other; None: the one the tracker names, or the newest whole one if that is damaged.

    Raises:
        ValueError: there is none.
    """
    if iteration is not None:
        folder = load / folder_name(iteration)
        if not folder.is_dir():
            have = ", ".join(sorted(path.name for path in _iterations(load))) or "none"
            raise ValueError(f"{load} has no checkpoint of iteration {iteration}; there are: {have}")
        candidates: Iterable[Path] = [folder]
    else:
        named = _tracked(load)
        candidates = [named, *(path for path in sorted(_iterations(load), reverse=True) if path != named)]
    warnings: list[str] = []
    for folder in candidates:
        problem = damage(folder)
        if problem is None:
            return folder, [f"{w}; going back to {folder}" for w in warnings]
        warnings.append(f"checkpoint {folder} is damaged: {problem}")
    raise ValueError(f"no whole checkpoint in {load}: {'; '.join(warnings)}")


def _tracked(load: Path) -> Path:
    text = (load / TRACKER).read_text(errors="replace").strip()
    if text != RELEASE and not text.isdecimal():
        raise ValueError(f"{load / TRACKER} says {text[:40]!r}; it should be an iteration's number or 'release'")
    return load / folder_name(None if text == RELEASE else int(text))


def _iterations(load: Path) -> list[Path]:
    return [path for path in load.glob("iter_*") if path.is_dir()]
