"""How a checkpoint of several ranks becomes visible: all at once, when it is whole, and on the disk.

Every rank writes its own files to a temporary folder. What ranks have to tell each other passes through `Ranks.total`
at the beginning and at the end; nothing in between, so that files may be written in the background.
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron.checkpoint.folder import MANIFEST, RELEASE, TRACKER, beside, folder_name, remove_folder
from megatron.checkpoint.integrity import manifest_bytes
from megatron.checkpoint.store import Written
from megatron.config import PeerError


@dataclass(frozen=True)
class Ranks:
    """The processes that write a checkpoint together.

    Attributes:
        rank: this one. The first also writes what is not cut into slices.
        size: how many there are.
        total: adds a number up over all of them, and so waits for them.
    """

    rank: int = 0
    size: int = 1
    total: Callable[[float], float] = float

    @property
    def is_main(self) -> bool:
        """Whether this is the first rank."""
        return self.rank == 0

    def together(self, work: Callable[[], object]) -> None:
        """Do `work`; if it fails on one rank, it has failed on all of them."""
        error: Exception | None = None
        try:
            work()
        except Exception as caught:
            error = caught
        if self.total(float(error is not None)):
            raise error or PeerError("a checkpoint could not be written; another rank says why")


@dataclass(frozen=True)
class Writing:
    """A checkpoint being written: `begin`, `add` what it holds, `finish`. All ranks begin and finish together.

    A crash at any instant leaves the checkpoints before it as they were.

    Attributes:
        save: the folder of all checkpoints.
        iteration: None for a release.
        ranks: that write it.
    """

    save: Path
    iteration: int | None
    ranks: Ranks

    @property
    def folder(self) -> Path:
        """Where it will be."""
        return self.save / folder_name(self.iteration)

    @property
    def temporary(self) -> Path:
        """Where it is until then."""
        return beside(self.folder, "tmp")

    def begin(self, size: int) -> None:
        """Make room for it; `size` is what this rank will write, in bytes.

        Raises:
            OSError: there is not enough room, or `save` cannot be written to; told by the first rank.
            PeerError: the same on all others.
        """
        size = int(self.ranks.total(size))
        self.ranks.together(partial(self._prepare, size) if self.ranks.is_main else _nothing)

    def _prepare(self, size: int) -> None:
        self.save.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(self.save)
        free = shutil.disk_usage(self.save).free
        if size > free:
            raise OSError(
                f"{self.folder}: the checkpoint needs {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free; make "
                "room, or keep fewer checkpoints by --keep_last"
            )
        self.temporary.mkdir()

    def add(self, name: str, write: Callable[[Path], Written]) -> None:
        """Write the file `name`, a path below the checkpoint, and note its size and checksum."""
        path = self.temporary / name
        try:
            path.parent.mkdir(exist_ok=True)
            written = write(path)
            self._note(json.dumps({name: asdict(written)}) + "\n")
        except OSError as error:
            raise OSError(f"{path} could not be written: {error}") from error

    def add_nothing(self) -> None:
        """Be counted among the ranks that wrote, with or without a file."""
        self._note("")

    def _note(self, text: str) -> None:
        with self._part(self.ranks.rank).open("a") as part:
            part.write(text)

    def add_json(self, name: str, value: Any) -> None:
        """Write a JSON file."""
        self.add(name, partial(write_bytes, data=json.dumps(value, indent=1).encode() + b"\n"))

    def add_copies(self, name: str, files: Iterable[Path]) -> None:
        """Copy small files into the folder `name`."""
        for file in files:
            self.add(f"{name}/{file.name}", partial(write_bytes, data=file.read_bytes()))

    def finish(self, error: BaseException | None = None) -> Path:
        """Give the checkpoint its name once every rank has written its files, and return its folder.

        Args:
            error: why this rank could not.

        Raises:
            OSError: it could not be written by this rank; nothing of it is left.
            PeerError: it could not by another one.
        """
        try:
            self.ranks.together(partial(_raise, error))
            self.ranks.together(self._publish if self.ranks.is_main else _nothing)
        except BaseException:
            self.abandon()
            raise
        return self.folder

    def abandon(self) -> None:
        """Leave nothing of it."""
        if self.ranks.is_main:
            shutil.rmtree(self.temporary, ignore_errors=True)

    def _publish(self) -> None:
        """At every instant this checkpoint or the one it replaces can be loaded."""
        self._merge_manifest()
        for folder in (self.temporary, *(path for path in self.temporary.iterdir() if path.is_dir())):
            _sync_folder(folder)
        replaced = beside(self.folder, "old")
        if self.folder.exists():
            self.folder.rename(replaced)
        self.temporary.rename(self.folder)
        _sync_folder(self.save)
        if replaced.exists():
            remove_folder(replaced, ignore_errors=True)
        tracked = RELEASE if self.iteration is None else str(self.iteration)
        replace_file(self.save / TRACKER, f"{tracked}\n".encode())

    def _merge_manifest(self) -> None:
        """From the notes of each rank; asked for by name, since a listing of a network's folder may be out of date."""
        files: dict[str, Written] = {}
        for rank in range(self.ranks.size):
            try:
                lines = self._part(rank).read_text().splitlines()
            except FileNotFoundError as error:
                raise OSError(
                    f"{self.temporary} has no files of rank {rank}; is --save the same folder on every machine?"
                ) from error
            files |= {name: Written(**written) for line in lines for name, written in json.loads(line).items()}
            self._part(rank).unlink()
        write_bytes(self.temporary / MANIFEST, manifest_bytes(files))

    def _part(self, rank: int) -> Path:
        return self.temporary / f"{MANIFEST}.{rank}"


def _nothing() -> None:
    """What a rank does while the first one works."""


def _raise(error: BaseException | None) -> None:
    if error:
        raise error


def _clear_leftovers(save: Path) -> None:
    """Remove what crashes left behind; a checkpoint that was about to be replaced gets its name back."""
    for kind in ("tmp", "old", "removed"):
        for path in (*save.glob(f".iter_*.{kind}"), *save.glob(f".{RELEASE}.{kind}")):
            final = save / path.name.removeprefix(".").removesuffix(f".{kind}")
            if kind == "old" and not final.exists():
                path.rename(final)
            else:
                remove_folder(path, ignore_errors=kind != "tmp")


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
