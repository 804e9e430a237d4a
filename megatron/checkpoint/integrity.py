"""Damage: whether the files of a checkpoint are those that were written, by its manifest."""

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from megatron.checkpoint.folder import MANIFEST, OPTIMIZER, WEIGHTS
from megatron.checkpoint.json_file import read_json
from megatron.checkpoint.store import Written

CHECKSUM = "crc32"
BLOCK_BYTES = 1 << 20


def manifest_bytes(files: Mapping[str, Written]) -> bytes:
    """The manifest of `files`, by name. It ends with its brace: cut anywhere, it is no JSON."""
    table = {name: asdict(written) for name, written in files.items()}
    return json.dumps({"checksum": CHECKSUM, "files": table}, indent=1).encode()


def read_manifest(folder: Path) -> dict[str, Written]:
    """What was written to a checkpoint, by the file's name below it.

    Raises:
        ValueError: the manifest is missing or damaged.
    """
    path = folder / MANIFEST
    try:
        files = {name: Written(**written) for name, written in read_json(path)["files"].items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no manifest: {error!r}") from error
    if path.read_bytes() != manifest_bytes(files):
        raise ValueError(f"{path} was changed: it is not as manifests are written")
    return files


def check_folder(folder: Path, *, reads_all: bool = False) -> None:
    """Compare a checkpoint with its manifest: names and sizes, and the checksums of small files.

    Args:
        folder: of the checkpoint.
        reads_all: compare the checksums of weights and optimizer state, too, which takes as long as reading them.

    Raises:
        ValueError: a file is not what was written, does not belong there, or lies elsewhere.
        OSError: a file cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is missing")
    files, root = read_manifest(folder), folder.resolve()
    for name, written in files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        if not path.resolve().is_relative_to(root):
            raise ValueError(f"{path} leads out of the checkpoint, to {path.resolve()}")
        if path.stat().st_size != written.size:
            raise ValueError(f"{path} has {path.stat().st_size} bytes instead of {written.size}")
        if (reads_all or not is_large(name)) and is_changed(folder, name, written):
            raise ValueError(f"{path} was changed: its {CHECKSUM} is not that of the manifest")
    for path in folder.rglob("*.safetensors"):
        if path.relative_to(folder).as_posix() not in files:
            raise ValueError(f"{path} does not belong to the checkpoint: the manifest does not name it")


def large_files(folder: Path, *, with_optimizer: bool) -> dict[str, Written]:
    """The files of weights, and of optimizer state, of a checkpoint; none of other toolkits', without a manifest."""
    if not (folder / MANIFEST).is_file():
        return {}
    places = (f"{WEIGHTS}/", f"{OPTIMIZER}/") if with_optimizer else f"{WEIGHTS}/"
    return {name: written for name, written in sorted(read_manifest(folder).items()) if name.startswith(places)}


def is_large(name: str) -> bool:
    """Whether a file holds weights or optimizer state; all others are small."""
    return name.startswith((f"{WEIGHTS}/", f"{OPTIMIZER}/"))


def is_changed(folder: Path, name: str, written: Written) -> bool:
    """Whether a file has another checksum than it was written with, or cannot be read."""
    try:
        return file_checksum(folder / name) != written.checksum
    except OSError:
        return True


def file_checksum(path: Path) -> str:
    """crc32 of a file, as eight hexadecimal digits."""
    crc, block = 0, memoryview(bytearray(BLOCK_BYTES))  # one for all: fresh memory may take longer than the disk
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            crc = zlib.crc32(block[:count], crc)
    return f"{crc:08x}"
