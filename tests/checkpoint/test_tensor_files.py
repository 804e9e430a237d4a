"""Tensors on disk: written as the safetensors library reads them, read slice by slice from however many files."""

import os
import pickle
import random
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageReader

from megatron.checkpoint import Slice, TensorStore
from megatron.checkpoint.integrity import file_checksum
from megatron.checkpoint.safetensors_file import DTYPES, Entry, SafetensorsWriter
from megatron.checkpoint.store import open_files, write_slices
from megatron.checkpoint.vocabulary import ResizedVocabulary, with_vocabulary

WHOLE = {"embedding.weight": torch.randn(11, 6), "norm": torch.randn(7), "scalar": torch.randn(())}


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in DTYPES}
    tensors["transposed"], tensors["empty"] = torch.randn(3, 5).t(), torch.zeros(0, 4)
    entries = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with SafetensorsWriter(tmp_path / "x.safetensors", entries, {"format": "pt"}) as writer:
        for tensor in tensors.values():
            writer.write(tensor)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in found)
    assert writer.size == (tmp_path / "x.safetensors").stat().st_size
    assert writer.checksum == file_checksum(tmp_path / "x.safetensors")


def cut(folder: Path, seed: int) -> list[Path]:
    """Write the tensors of `WHOLE` in random blocks over three files."""
    chance = random.Random(seed)
    parts: list[list[Slice]] = [[], [], []]
    for name, tensor in WHOLE.items():
        blocks = [((0,) * tensor.ndim, tensor)]
        for dim in range(tensor.ndim):
            size = chance.randint(1, tensor.shape[dim])
            blocks = [
                ((*at[:dim], at[dim] + number * size, *at[dim + 1 :]), piece)
                for at, block in blocks
                for number, piece in enumerate(block.split(size, dim))
            ]
        order = chance.sample(range(3), 3)
        for number, (at, block) in enumerate(blocks):
            parts[order[number % 3]].append(Slice.of(name, tuple(tensor.shape), at, block))
    files = []
    for number, slices in enumerate(parts):  # one slice of a tensor a file
        for turn in range(max((sum(s.name == n for s in slices) for n in WHOLE), default=0)):
            chosen = [[s for s in slices if s.name == n][turn : turn + 1] for n in WHOLE]
            files.append(folder / f"{number}-{turn}.safetensors")
            write_slices(files[-1], [s for group in chosen for s in group])
    return files


@pytest.mark.parametrize("seed", range(8))
def test_random_cuts_make_the_whole(tmp_path: Path, seed: int) -> None:
    store = open_files(tmp_path, cut(tmp_path, seed))
    assert {name: store.shape(name) for name in store.names()} == {n: tuple(t.shape) for n, t in WHOLE.items()}
    for name, tensor in WHOLE.items():
        assert torch.equal(store.read(name), tensor)
    assert torch.equal(store.read("embedding.weight", (slice(2, 9), slice(1, 4))), WHOLE["embedding.weight"][2:9, 1:4])
    assert store.read("norm", (slice(3, 3),)).shape == (0,)


def test_torch_reads_the_slices_too(tmp_path: Path) -> None:
    """By the Hugging Face reader of `torch.distributed.checkpoint`."""
    cut(tmp_path, 1)
    state = {name: torch.zeros_like(tensor) for name, tensor in WHOLE.items()}
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert all(torch.equal(state[name], tensor) for name, tensor in WHOLE.items())


def opened(folder: Path) -> set[str]:
    """Names of the files below a folder that this process has open."""
    targets = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()]
    return {Path(target).name for target in targets if target.startswith(f"{folder}/")}


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_files_are_open_from_the_first_read_until_they_are_closed(tmp_path: Path) -> None:
    """A checkpoint of a thousand ranks opens, and one that is removed takes no room."""
    paths = cut(tmp_path, 2)
    store = open_files(tmp_path, paths)
    assert opened(tmp_path) == set()
    for _ in range(2):
        assert torch.equal(store.read("embedding.weight"), WHOLE["embedding.weight"])
        assert opened(tmp_path)
        store.close()
        assert opened(tmp_path) == set()


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    table = WHOLE["embedding.weight"]
    write_slices(tmp_path / "x.safetensors", [Slice.of("embedding.weight", (11, 6), (0, 0), table[:5])])
    store = open_files(tmp_path, [tmp_path / "x.safetensors"])
    assert torch.equal(store.read("embedding.weight", (slice(1, 5), slice(0, 6))), table[1:5])
    with pytest.raises(ValueError, match=r"hold only a part of embedding\.weight"):
        store.read("embedding.weight")


def whole_store(folder: Path) -> TensorStore:
    write_slices(folder / "x.safetensors", [Slice.of(n, tuple(t.shape), (0,) * t.ndim, t) for n, t in WHOLE.items()])
    return open_files(folder, [folder / "x.safetensors"])


def test_new_vocabulary_rows_are_the_mean_of_the_old(tmp_path: Path) -> None:
    table = WHOLE["embedding.weight"]
    grown = with_vocabulary(whole_store(tmp_path), 14)
    expected = torch.cat([table, table.mean(0, keepdim=True).expand(3, -1)])
    assert grown.shape("embedding.weight") == (14, 6)
    torch.testing.assert_close(grown.read("embedding.weight"), expected, rtol=0, atol=1e-7)
    for rows in [(9, 13), (12, 14), (0, 4), (14, 14)]:
        part = grown.read("embedding.weight", (slice(*rows), slice(2, 5)))
        torch.testing.assert_close(part, expected[slice(*rows), 2:5], rtol=0, atol=1e-7)
    for name in ("norm", "scalar"):
        assert torch.equal(grown.read(name), WHOLE[name])


def test_a_smaller_vocabulary_leaves_the_last_rows_out(tmp_path: Path) -> None:
    cut_off = with_vocabulary(whole_store(tmp_path), 9)
    assert cut_off.shape("embedding.weight") == (9, 6)
    assert torch.equal(cut_off.read("embedding.weight"), WHOLE["embedding.weight"][:9])
    assert torch.equal(
        cut_off.read("embedding.weight", (slice(7, 9), slice(1, 3))), WHOLE["embedding.weight"][7:9, 1:3]
    )
    assert torch.equal(cut_off.read("scalar"), WHOLE["scalar"])


def test_new_rows_of_optimizer_state_are_zero(tmp_path: Path) -> None:
    table = WHOLE["embedding.weight"]
    write_slices(tmp_path / "x.safetensors", [Slice.of("exp_avg.embedding.weight", (11, 6), (0, 0), table)])
    store = open_files(tmp_path, [tmp_path / "x.safetensors"])
    grown = ResizedVocabulary(store, 14, as_mean=False).read("exp_avg.embedding.weight", (slice(9, 13), slice(0, 6)))
    assert torch.equal(grown, torch.cat([table[9:], torch.zeros(2, 6)]))


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    torch.save({"weight": Bomb(tmp_path / "exploded")}, tmp_path / "torch.bin")
    torch.save([torch.ones(1)], tmp_path / "list.bin")
    for name in ("plain.bin", "torch.bin", "list.bin"):
        with pytest.raises(ValueError, match=name):
            open_files(tmp_path, [tmp_path / name])
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("damage", ["cut", "header", "empty"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    whole_store(tmp_path)
    path = tmp_path / "x.safetensors"
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-8], "header": b"\xff" * 8 + data[8:], "empty": b""}[damage])
    with pytest.raises(ValueError, match=r"x\.safetensors: not a whole safetensors file"):
        open_files(tmp_path, [path])
