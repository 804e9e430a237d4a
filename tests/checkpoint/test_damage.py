"""Damaged and hostile checkpoints: each is found before anything is made of it, named, and an older one is taken."""

import json
import os
import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_checkpoints import contents, random_state, same, save

from megatron.checkpoint import open_checkpoint
from megatron.checkpoint.folder import MANIFEST, RUN
from megatron.checkpoint.integrity import BLOCK_BYTES, file_checksum, manifest_bytes, read_manifest
from megatron.checkpoint.json_file import LARGEST
from megatron.checkpoint.store import Written, open_files
from megatron.checkpoint.writing import write_bytes

OLD, NEW = random_state(1), random_state(2)
FILES = (
    *("run.json", "manifest.json", "tokenizer/special_tokens.json", "tokenizer/tokenizer.model"),
    *(f"{room}/rank-{rank:05d}.safetensors" for room in ("model", "optimizer") for rank in range(2)),
)


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with the checkpoints of iterations 100 and 200, each of two ranks."""
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    (tmp_path / "special_tokens.json").write_text('{"special_tokens": {}}')
    tokenizer = [tmp_path / "special_tokens.json", tmp_path / "tokenizer.model"]
    for iteration, state in ((100, OLD), (200, NEW)):
        save(tmp_path / "save", iteration, state, ranks=2, tokenizer=tokenizer)
    return tmp_path / "save"


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES, 2 * BLOCK_BYTES + 5])
def test_a_checksum_is_of_all_bytes(tmp_path: Path, size: int) -> None:
    data = random.Random(size).randbytes(size)
    (tmp_path / "x").write_bytes(data)
    assert file_checksum(tmp_path / "x") == f"{zlib.crc32(data):08x}"


def damages(data: bytes) -> Iterator[tuple[str, bytes | None]]:
    """What may happen to a file: it is gone (None), has another length, or another byte somewhere."""
    yield from (("removed", None), ("emptied", b""), ("cut", data[:-1]), ("halved", data[: len(data) // 2]))
    yield "longer", data + b"\0"
    for place in sorted({0, len(data) - 1, *range(0, len(data), 1 + len(data) // 40)}):
        for bit in (0, 5):
            yield f"bit {bit} of byte {place}", data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


@pytest.mark.parametrize("name", FILES)
def test_every_damage_of_every_file_is_found(two: Path, name: str) -> None:
    """The checkpoint before is taken, and the warning names the file."""
    folder = two / "iter_0000200"
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == set(FILES)
    data = (folder / name).read_bytes()
    for what, damaged in damages(data):
        if damaged is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(damaged)
        checkpoint = open_checkpoint(two, reads_all=True)
        assert checkpoint.iteration == 100, what
        (warning,) = checkpoint.warnings
        assert warning.startswith(f"checkpoint {folder} is damaged: {folder}"), what
        assert warning.endswith(f"; going back to {two / 'iter_0000100'}"), what
        assert name in warning or name == MANIFEST, what
    assert same(contents(checkpoint.weights), OLD)
    (folder / name).write_bytes(data)
    assert not open_checkpoint(two, reads_all=True).warnings


def test_only_small_files_are_read_where_the_rest_is_checked_later(two: Path) -> None:
    folder = two / "iter_0000200"
    path = folder / "model" / "rank-00001.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert open_checkpoint(two).iteration == 200
    passed_over = open_checkpoint(two, damaged={folder: f"{path} was changed"})
    assert passed_over.iteration == 100
    assert f"{path} was changed; going back to" in passed_over.warnings[0]


def test_what_was_asked_for_by_number_is_that_or_nothing(two: Path) -> None:
    (two / "iter_0000200" / RUN).unlink()
    for load, iteration in ((two, 200), (two / "iter_0000200", None)):
        with pytest.raises(ValueError, match=r"iter_0000200 is (damaged|no checkpoint)"):
            open_checkpoint(load, iteration)


def rewrite(folder: Path, name: str, data: bytes) -> None:
    """Change a file and the manifest with it, as somebody does who means harm."""
    files = read_manifest(folder)
    files[name] = write_bytes(folder / name, data)
    (folder / MANIFEST).write_bytes(manifest_bytes(files))


def with_config(folder: Path, **changes: Any) -> None:
    """Change the architecture in run.json."""
    run = json.loads((folder / RUN).read_text())
    run["config"]["model"] |= changes
    rewrite(folder, RUN, json.dumps(run).encode())


def listed(folder: Path, name: str, size: int = 0) -> None:
    """Have the manifest name another file."""
    files = read_manifest(folder) | {name: Written(size, "00000000")}
    (folder / MANIFEST).write_bytes(manifest_bytes(files))


def linked(folder: Path, name: str, target: Path) -> None:
    """Put a link where a file was; what it leads to is the same."""
    (folder / name).rename(target)
    (folder / name).symlink_to(target)


def with_metadata(folder: Path, key: str, value: Any) -> None:
    """Say something else of the slices in a file of weights: of the final norm, or text in the place of all."""
    path = folder / "model" / "rank-00000.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    table = json.loads(metadata[key]) | {"model.norm.weight": value}
    metadata[key] = value if isinstance(value, str) else json.dumps(table)
    save_file(load_file(path), folder / "new", metadata=metadata)
    data = (folder / "new").read_bytes()
    (folder / "new").unlink()
    rewrite(folder, "model/rank-00000.safetensors", data)


DEEP = "[" * 100_000 + "]" * 100_000
HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a manifest that leads out": (lambda f: listed(f, "../iter_0000100/run.json"), "leads out of the checkpoint"),
    "a manifest of absolute paths": (lambda f: listed(f, "/etc/passwd"), "leads out of the checkpoint"),
    "a manifest with a device": (lambda f: listed(f, "/dev/zero"), "is missing"),
    "a manifest with a zero in a name": (lambda f: listed(f, "model/\0"), "is missing"),
    "a manifest with an endless name": (lambda f: listed(f, "x" * 5000), "File name too long"),
    "a manifest of other things": (lambda f: (f / MANIFEST).write_text('{"files": [1]}'), "is no manifest"),
    "a manifest nested deep": (lambda f: (f / MANIFEST).write_text(DEEP), "nested too deep"),
    "a description nested deep": (lambda f: rewrite(f, RUN, DEEP.encode()), "nested too deep"),
    "a description without end": (lambda f: rewrite(f, RUN, b" " * (LARGEST + 1)), "more than 67,108,864 bytes"),
    "a description of nothing": (lambda f: rewrite(f, RUN, b"{}"), "does not describe a run: KeyError"),
    "a billion layers": (lambda f: with_config(f, num_layers=10**9), "1000000000 layers, but 30 weights"),
    "layers in words": (lambda f: with_config(f, num_layers="three"), "does not describe a run: TypeError"),
    "negative sizes": (lambda f: with_config(f, hidden_size=-16), "hidden_size|does not describe"),
    "a link to weights": (
        lambda f: linked(f, "model/rank-00000.safetensors", f.parent / "elsewhere"),
        "leads out of the checkpoint, to .*/elsewhere",
    ),
    "a link in a circle": (
        lambda f: ((f / RUN).unlink(), (f / RUN).symlink_to(f / RUN)),
        "run.json is missing",
    ),
    "a linked folder": (lambda f: linked(f, "tokenizer", f.parent / "elsewhere"), "leads out of the checkpoint"),
    "offsets nested deep": (lambda f: with_metadata(f, "DCP_SHARDING_INFO", DEEP), "damaged metadata"),
    "offsets in words": (lambda f: with_metadata(f, "DCP_SHARDING_INFO", {"saved_offsets": ["0"]}), "are not sizes"),
    "offsets below zero": (lambda f: with_metadata(f, "DCP_SHARDING_INFO", {"saved_offsets": [-1]}), "are not sizes"),
    "offsets behind": (
        lambda f: with_metadata(f, "DCP_SHARDING_INFO", {"saved_offsets": [9]}),
        "lies outside",
    ),
    "offsets in a list": (lambda f: with_metadata(f, "DCP_SHARDING_INFO", [0]), "damaged metadata"),
    "shapes of two dimensions": (lambda f: with_metadata(f, "GLOBAL_SHAPES", [1, 16]), "are not 1 sizes"),
    "shapes beyond measure": (lambda f: with_metadata(f, "GLOBAL_SHAPES", [10**30]), "are not sizes"),
    "shapes beyond memory": (lambda f: with_metadata(f, "GLOBAL_SHAPES", [10**14]), r"norm\.weight is \[16\] .* but"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_checkpoints_are_refused_with_a_reason(two: Path, kind: str) -> None:
    """All of it in one line; no file is touched, and nothing is run."""
    change, reason = HOSTILE[kind]
    folder = two / "iter_0000200"
    change(folder)
    before = {path: path.lstat().st_mtime_ns for path in two.parent.rglob("*")}
    with pytest.raises(ValueError, match=reason):
        open_checkpoint(two, 200)
    assert open_checkpoint(two).iteration == 100
    assert before == {path: path.lstat().st_mtime_ns for path in two.parent.rglob("*")}


def header(entries: dict[str, Any], data: bytes = b"\0" * 64, size: int | None = None) -> bytes:
    """A safetensors file of these entries."""
    text = json.dumps(entries).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


def entry(shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "data",
    [
        header({"x": entry([16], 0, 64)}, size=2**63),
        header({"x": entry([16], 0, 64)}, size=10**8),
        header({"x": entry([16], 64, 128)}),
        header({"x": entry([16], -64, 0)}),
        header({"x": entry([8], 0, 32), "y": entry([12], 16, 64)}),
        header({"x": entry([8], 0, 32)}),
        header({"x": entry([2**62, 8], 0, 64)}),
        header({"x": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64], "more": [[]] * 9}}, b"\0" * 32),
        header({"x": entry([16], 0, 64), "__metadata__": {"a": 1}}),
        b"\x08\0\0\0\0\0\0\0" + b"[" * 8,
        b"PK\x03\x04" + b"\0" * 100,
    ],
    ids=("huge", "long", "behind", "before", "overlap", "gap", "overflow", "short", "numbers", "list", "zip"),
)
def test_no_header_is_believed(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.safetensors: not a whole safetensors file"):
        open_files(tmp_path, [tmp_path / "x.safetensors"])


def test_links_of_a_cache_of_the_hub_are_followed(shared_data: Path, tmp_path: Path) -> None:
    """Its snapshots are links to files beside."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted((shared_data / "models" / "stories260K").iterdir())):
        (blobs / str(number)).write_bytes(path.read_bytes())
        os.symlink(f"../../blobs/{number}", snapshot / path.name)
    linked_weights = open_checkpoint(snapshot).weights
    plain = open_checkpoint(shared_data / "models" / "stories260K").weights
    assert torch.equal(linked_weights.read("final_norm.weight"), plain.read("final_norm.weight"))
