"""Tensors cut in any way and put together again are the tensors; what is not whole is named."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_checkpoints import rows_of_rank, same, whole

from megatron.checkpoint import Slice
from megatron.checkpoint.safetensors_file import Entry, SafetensorsWriter
from megatron.checkpoint.store import SlicedStore, open_files, write_slices

Box = tuple[slice, ...]


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[torch.Tensor, list[Box], Box]:
    """A tensor, boxes that cover it once, and a part to read."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    boxes: list[Box] = [tuple(slice(0, size) for size in shape)]
    for _ in range(draw(st.integers(0, 6))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(box[dim].start, box[dim].stop))
        for half in (slice(box[dim].start, at), slice(at, box[dim].stop)):
            boxes.append((*box[:dim], half, *box[dim + 1 :]))
    bounds = [sorted((draw(st.integers(0, size)), draw(st.integers(0, size)))) for size in shape]
    tensor = torch.arange(float(torch.Size(shape).numel())).view(shape)
    return tensor, boxes, tuple(slice(*pair) for pair in bounds)


def write_boxes(folder: Path, tensor: torch.Tensor, boxes: list[Box]) -> SlicedStore:
    """Each box in a file of its own."""
    files = [folder / f"{number}.safetensors" for number in range(len(boxes))]
    for file, box in zip(files, boxes, strict=True):
        write_slices(file, [Slice.of("x", tuple(tensor.shape), tuple(r.start for r in box), tensor[box])])
    return open_files(folder, files)


@settings(deadline=None, max_examples=40)
@given(cut_tensors())
def test_any_part_of_any_cut_is_that_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, cut: tuple[torch.Tensor, list[Box], Box]
) -> None:
    tensor, boxes, part = cut
    store = write_boxes(tmp_path_factory.mktemp("cut"), tensor, boxes)
    assert store.shape("x") == tensor.shape
    assert torch.equal(store.read("x"), tensor)
    assert torch.equal(store.read("x", part), tensor[part])


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([(0, 2), (3, 4)], "only a part"),
        ([(0, 2), (1, 4)], "a part twice"),
        ([(0, 2), (0, 2)], "a part twice|only a part"),  # as many elements as the whole
        ([(0, 4), (0, 4)], "a part twice"),
    ],
)
def test_gaps_and_overlaps_are_found_before_reading(tmp_path: Path, rows: list[tuple[int, int]], problem: str) -> None:
    tensor = torch.randn(4, 3)
    with pytest.raises(ValueError, match=f"{tmp_path}: the files hold ({problem}) of x \\[4, 3\\]"):
        write_boxes(tmp_path, tensor, [(slice(*pair), slice(0, 3)) for pair in rows]).check_whole()


def test_a_part_outside_the_whole(tmp_path: Path) -> None:
    write_slices(tmp_path / "a.safetensors", [Slice.of("x", (4,), (3,), torch.ones(2))])
    with pytest.raises(ValueError, match="outside of x"):
        open_files(tmp_path, [tmp_path / "a.safetensors"]).check_whole()


def test_reading_what_is_not_there(tmp_path: Path) -> None:
    store = write_boxes(tmp_path, torch.ones(4, 3), [(slice(0, 4), slice(0, 3))])
    with pytest.raises(ValueError, match=r"no part \[2:6, 0:3\] of x \[4, 3\]"):
        store.read("x", (slice(2, 6), slice(0, 3)))
    with pytest.raises(ValueError, match=f"{tmp_path} has no tensor y"):
        store.read("y")


def test_files_that_contradict_each_other(tmp_path: Path) -> None:
    files = [tmp_path / f"{n}.safetensors" for n in range(2)]
    write_slices(files[0], [Slice.of("x", (4,), (0,), torch.ones(2))])
    write_slices(files[1], [Slice.of("x", (4,), (2,), torch.ones(2, dtype=torch.bfloat16))])
    with pytest.raises(ValueError, match=r"1\.safetensors: x is .* in another file"):
        open_files(tmp_path, files)


def test_metadata_of_slices(tmp_path: Path) -> None:
    write_slices(tmp_path / "x.safetensors", [Slice.of("x", (4, 2), (2, 0), torch.ones(2, 2))])
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["DCP_SHARDING_INFO"]) == {"x": {"saved_offsets": [2, 0]}}
        assert json.loads(file.metadata()["GLOBAL_SHAPES"]) == {"x": [4, 2]}


def test_tensors_are_asked_for_one_ahead(tmp_path: Path) -> None:
    """Of slices that are computed when their turn comes two are in memory, one being written, the next being read."""
    order: list[str] = []

    def lazily(name: str) -> Slice:
        part = whole(name, torch.ones(3))
        return Slice(name, part.shape, part.offsets, part.entry, lambda: order.append(name) or torch.ones(3))

    progress: list[int] = []
    write_slices(
        tmp_path / "x.safetensors",
        [lazily(name) for name in "abcd"],
        lambda size: (progress.append(size), order.append("written")),
    )
    assert [name for name in order if name != "written"] == list("abcd")
    for place, name in enumerate("abcd"):
        assert order[: order.index(name)].count("written") >= place - 1
    assert order.count("written") == 4
    assert progress == [12] * 4


def test_bin_and_safetensors_read_alike(tmp_path: Path) -> None:
    tensors = {name: torch.randn(4, 3).to(torch.bfloat16) for name in "ab"}
    torch.save(tensors, tmp_path / "x.bin")
    write_slices(tmp_path / "x.safetensors", [rows_of_rank(name, t, 0, 1) for name, t in tensors.items()])
    part = (slice(1, 3), slice(0, 2))
    for file in ("x.bin", "x.safetensors"):
        store = open_files(tmp_path, [tmp_path / file])
        assert same({name: store.read(name, part) for name in store.names()}, {n: t[part] for n, t in tensors.items()})


def test_bytes_are_those_of_the_library(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5)}
    entries = [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with SafetensorsWriter(tmp_path / "ours.safetensors", entries, {"format": "pt"}) as writer:
        for tensor in tensors.values():
            writer.write(tensor)
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
