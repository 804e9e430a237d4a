"""Rows picked from a dataset while it streams, into a jsonl file; an interrupted download goes on where it stopped."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from megatron.config import UsageError
from megatron.data.publish import write_whole
from megatron.data.tables import HuggingFaceDataset, errors_of

ROWS_BETWEEN_STATES = 10_000
"""Rows read between two moments from which a download can go on."""


@dataclass
class Download:
    """How far a download has come.

    Attributes:
        origin: what is downloaded, in words; another one does not go on with it.
        seen: rows read.
        kept: of these, rows written.
        size: bytes they are.
        position: of the dataset behind those rows, as the library tells it; None at the beginning.
    """

    origin: str
    seen: int = 0
    kept: int = 0
    size: int = 0
    position: dict[str, Any] | None = None


def download(dataset: HuggingFaceDataset, output: Path, *, id_prefix: str = "", limit: int | None = None) -> Download:
    """Write the rows of `dataset` whose `id` begins with `id_prefix`, at most `limit`, to the jsonl file `output`.

    It gets its name when all are there. Until then they are in `output.partial`, and `output.partial.json` says how far
    that is: a later call goes on from there.

    Raises:
        UsageError: `output` exists, or what is there partly is something else.
        ValueError: the dataset cannot be read, or has no such rows.
        OSError: a file cannot be written.
    """
    if output.exists():
        raise UsageError(f"--output {output} exists; remove it or give another name")
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    partial, state = (output.with_name(f"{output.name}.partial{suffix}") for suffix in ("", ".json"))
    done = _begun(f"{limit or 'all'} rows {id_prefix}* of {dataset.name}", partial, state)
    try:
        with partial.open("ab") as file:
            file.truncate(done.size)
            _pick(dataset, done, file, state, id_prefix, limit)
        os.replace(partial, output)
        state.unlink(missing_ok=True)
    finally:
        if not state.is_file():  # nothing to go on from
            partial.unlink(missing_ok=True)
    return done


def _begun(origin: str, partial: Path, state: Path) -> Download:
    """How far an earlier download of `origin` came."""
    if not (partial.is_file() and state.is_file()):
        state.unlink(missing_ok=True)
        return Download(origin)
    try:
        done = Download(**json.loads(state.read_text(encoding="utf-8")))
        if partial.stat().st_size < done.size:
            raise ValueError(f"{partial} is shorter than {done.size} bytes")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{state} is damaged: {error}; remove it to begin again") from error
    if done.origin != origin:
        raise UsageError(f"--output: {state} is of a download of {done.origin}; remove it or give another name")
    return done


def _pick(
    dataset: HuggingFaceDataset, done: Download, file: BinaryIO, state: Path, id_prefix: str, limit: int | None
) -> None:
    """Go on with a download: append rows to `file`, and from time to time put down in `state` how far it is."""
    with tqdm(initial=done.seen, unit=" rows", disable=None, desc="reading") as bar:
        for row, position in _rows(dataset, done):
            if done.kept == limit:
                break
            if _identity(row, done.seen, dataset.name).startswith(id_prefix):
                done.size += file.write(json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n")
                done.kept += 1
            done.seen += 1
            bar.update()
            if done.seen % ROWS_BETWEEN_STATES == 0:
                bar.set_postfix_str(f"{done.kept:,} kept", refresh=False)
                done.position = position()
                _on_disk(file)
                write_whole(state, json.dumps(vars(done)).encode())
    if not done.kept:
        raise ValueError(f"{dataset.name} has no row whose id begins with {id_prefix!r}")
    _on_disk(file)


def _rows(dataset: HuggingFaceDataset, done: Download) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """The rows that are not done yet, each with what tells the position behind it."""
    try:
        with errors_of(dataset.name):
            stream = dataset.open()
            if not hasattr(stream, "state_dict"):  # it was saved to disk as a whole
                stream = stream.to_iterable_dataset()
            if done.position is not None:
                stream.load_state_dict(done.position)
            for row in stream:
                yield row, stream.state_dict
    except ValueError as error:
        if done.position is None:
            raise
        raise ValueError(f"{error}; the same command goes on where this one stopped") from error


def _identity(row: dict[str, Any], number: int, name: str) -> str:
    identity = row.get("id")
    if not isinstance(identity, str):
        raise ValueError(f"{name}, row {number}: there is no 'id', or it is no string")
    return identity


def _on_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
