"""Opening weights in two further forms: Meta's `consolidated.NN.pth`, and Megatron-LLM's `mp_rank_TT[_PPP]` folders.

Both are pickles, cut into tensor shards. They are mapped into memory and read row by row, like any other store.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron.checkpoint.files import MappedFile
from megatron.checkpoint.folder import RELEASE, TRACKED, TRACKER, folder_name, read_tracker
from megatron.checkpoint.formed import FormedStore, check_shapes, formed_shape
from megatron.checkpoint.pickles import Inert, read_pickle
from megatron.checkpoint.store import Piece, SlicedStore, TensorStore
from megatron.config import ModelConfig
from megatron.hf import meta, reference
from megatron.hf.config import architecture
from megatron.hf.forms import Source, by_target
from megatron.hf.rows import parameter_shapes
from megatron.tokenizer.sentencepiece import MODEL_FILE

RANK_FILES = ("model_optim_rng.pt", "model_rng.pt")
"""The latter beside a distributed optimizer."""
RANK_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
SHARD = re.compile(r"consolidated\.(\d\d+)\.pth")
SIZES = ("tensor_model_parallel_size", "pipeline_model_parallel_size")


@dataclass(frozen=True)
class Foreign:
    """Opened weights.

    Attributes:
        folder: where they lie.
        config: options by group, as in run.json: "model", and where they are known "parallel" and "data".
        weights: by our names.
        tokenizer_folder: where its tokenizer's model is, if there is one.
        notes: what had to be taken for granted.
    """

    folder: Path
    config: dict[str, Any]
    weights: TensorStore
    tokenizer_folder: Path | None
    notes: tuple[str, ...]


def is_meta(folder: Path) -> bool:
    """Whether this is a folder of Meta's weights."""
    return (folder / meta.PARAMS).is_file() or any(SHARD.fullmatch(path.name) for path in folder.glob("consolidated.*"))


def open_meta(folder: Path, params: Mapping[str, Any], family: str | None) -> Foreign:
    """The weights in a folder of `consolidated.NN.pth`.

    Args:
        folder: with the files.
        params: its params.json.
        family: the one the user names, if any.

    Raises:
        ValueError: a file is missing or damaged, or files, params.json and family contradict each other.
    """
    source = folder / meta.PARAMS
    numbers = [int(found[1]) for path in folder.iterdir() if (found := SHARD.fullmatch(path.name))]
    missing = next(number for number in range(len(numbers) + 1) if number not in numbers)
    if not numbers or missing < max(numbers):
        raise ValueError(f"{folder / f'consolidated.{missing:02d}.pth'} is missing")
    paths = [folder / f"consolidated.{number:02d}.pth" for number in sorted(numbers)]
    files = [MappedFile(path, _tensors(read_pickle(path), path)) for path in paths]

    def axis(name: str, tensor: Tensor) -> int | None:
        return meta.meta_axis(name, tensor.shape[-1], len(files), params.get("dim", 0))

    stored = _joined(folder, files, axis, ignored=meta.BUFFERS)
    tied = (meta.EMBEDDING, meta.OUTPUT)
    if set(tied) <= stored.shapes.keys() and stored.equal(*tied):  # Llama 3.2 has both
        stored = stored.without([meta.OUTPUT])
    fields, notes = meta.meta_fields(params, stored.shapes, family, source)
    model = architecture(fields, source)
    weights = _formed(stored, model, lambda name: meta.meta_source(name, model), source)
    has_tokenizer = (folder / MODEL_FILE).is_file() and fields[
        "model_name"
    ] != "llama3"  # whose file is of another kind
    return Foreign(folder, {"model": fields}, weights, folder if has_tokenizer else None, tuple(notes))


def reference_folder(load: Path, iteration: int | None) -> Path | None:
    """The folder of `mp_rank_TT[_PPP]` that `load` names, itself or by its tracker; None: it is no such checkpoint.

    Raises:
        ValueError: `load` is such a folder, but of another iteration than the one asked for.
    """
    folder = load
    if (load / TRACKER).is_file():
        text = read_tracker(load)
        if not TRACKED.fullmatch(text):
            return None
        tracked = None if text == RELEASE else int(text)
        folder = load / folder_name(tracked if iteration is None else iteration)
    if not any(path.is_dir() for path in folder.glob("mp_rank_*")):
        return None
    if iteration is not None and folder.name != folder_name(iteration):
        raise ValueError(f"{folder} is not of iteration {iteration}")
    return folder


def open_reference(folder: Path, family: str | None) -> Foreign:
    """The weights in a folder of `mp_rank_TT[_PPP]`, of any tensor and pipeline size.

    Args:
        folder: of the iteration, or "release".
        family: the one the user names, for files that do not say it.

    Raises:
        ValueError: a file is missing or damaged, or contradicts the family or another file; with file and key.
    """
    ranks = _ranks(folder)
    path = ranks[0, 0]
    contents = {rank: read_pickle(file) for rank, file in ranks.items()}
    args = _args(contents[0, 0], path)
    sizes = _sizes(ranks, args, path)
    stored = _joined_stages(folder, ranks, contents)
    fields, notes = reference.reference_fields(args, stored.shapes, family, path)
    stored = _without_tied_copy(stored, path)
    model = architecture(fields, path)
    weights = _formed(stored, model, lambda name: reference.reference_source(name, model, sizes[SIZES[0]]), path)
    tokenizer = next((place for place in (folder, folder.parent) if (place / MODEL_FILE).is_file()), None)
    length = args.get("seq_length")
    config = {"model": fields, "parallel": sizes, "data": {"seq_length": length if type(length) is int else None}}
    return Foreign(folder, config, weights, tokenizer, tuple(notes))


def _ranks(folder: Path) -> dict[tuple[int, int], Path]:
    """(tensor rank, stage) -> its file; every rank up to the highest of each is there.

    A distributed optimizer's own folders have no file of weights, and look like those of stages.
    """
    found = {}
    for file in (path / name for path in folder.glob("mp_rank_*") for name in RANK_FILES):
        matched = RANK_FOLDER.fullmatch(file.parent.name)
        if matched and file.is_file():
            found[int(matched[1]), int(matched[2] or 0)] = file
    if not found:
        raise ValueError(f"{folder} has no mp_rank_00/{RANK_FILES[0]}")
    tensor, pipeline = (max(rank[place] for rank in found) + 1 for place in range(2))
    is_staged = any(file.parent.name.count("_") == 3 for file in found.values())
    for rank in ((tensor_rank, stage) for tensor_rank in range(tensor) for stage in range(pipeline)):
        if rank not in found:
            missing = f"mp_rank_{rank[0]:02d}" + (f"_{rank[1]:03d}" if is_staged else "")
            raise ValueError(f"{folder / missing / RANK_FILES[0]} is missing")
    return dict(sorted(found.items()))


def _args(content: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """The arguments of training, from a file new enough to be read."""
    args, version = content.get("args"), content.get("checkpoint_version")
    if not isinstance(args, Inert) or not isinstance(args.state, dict):
        raise ValueError(f"{path} has no args")
    if not isinstance(version, int | float) or version < reference.VERSION:
        raise ValueError(f"{path}: checkpoint_version is {version}; only {reference.VERSION} and later are supported")
    return args.state


def _sizes(ranks: Mapping[tuple[int, int], Path], args: Mapping[str, Any], path: Path) -> dict[str, int]:
    """Tensor and pipeline size of the files, which are those of the arguments."""
    sizes = {name: 1 + max(rank[place] for rank in ranks) for place, name in enumerate(SIZES)}
    for name, size in sizes.items():
        if args.get(name) not in (None, size):
            raise ValueError(f"{path}: args.{name} is {args[name]}, but beside it are the files of {size}")
    return sizes


def _joined_stages(
    folder: Path, ranks: Mapping[tuple[int, int], Path], contents: Mapping[tuple[int, int], Mapping[str, Any]]
) -> SlicedStore:
    """All tensors of the model; layers are counted on from stage to stage, and from model part to part on a stage."""
    tensor, pipeline = (max(rank[place] for rank in ranks) + 1 for place in range(2))
    parts = {rank: reference.model_parts(contents[rank], path) for rank, path in ranks.items()}
    whole = SlicedStore(folder, {}, {}, {})
    layers = 0
    for number, stage in itertools.product(range(len(parts[0, 0])), range(pipeline)):
        files = [_part_of_model(parts[rank, stage], number, ranks[rank, stage], layers) for rank in range(tensor)]
        joined = _joined(folder, files, lambda name, tensor: reference.reference_axis(name))
        twice = joined.shapes.keys() & whole.shapes.keys()
        if twice:
            raise ValueError(f"{files[0].path}: {min(twice)} is also in another stage's file")
        tables = ("pieces", "shapes", "dtypes")
        whole = SlicedStore(folder, *({**getattr(whole, table), **getattr(joined, table)} for table in tables))
        layers += len({name.split(".")[1] for name in joined.names() if name.startswith("layers.")})
    return whole


def _part_of_model(parts: Sequence[Any], number: int, path: Path, first_layer: int) -> MappedFile:
    if number >= len(parts):
        raise ValueError(f"{path} has no model{number}")
    tensors = _tensors(parts[number], path)
    return MappedFile(path, {reference.usual_name(name, first_layer): tensor for name, tensor in tensors.items()})


def _tensors(tree: Mapping[str, Any], path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of nested dictionaries, by their keys joined with dots."""
    found: dict[str, Tensor] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= _tensors(value, path, f"{name}.")
        elif isinstance(value, Tensor):
            found[name] = value.detach()
        else:
            raise ValueError(f"{path}: {name} is no tensor")
    return found


def _joined(
    folder: Path,
    files: Sequence[MappedFile],
    axis_of: Callable[[str, Tensor], int | None],
    ignored: Sequence[str] = (),
) -> SlicedStore:
    """The tensors of which each of `files` has a part, along the dimension that `axis_of` names, or all."""
    first = files[0]
    for file in files[1:]:
        different = first.tensors.keys() ^ file.tensors.keys()
        if different:
            has, lacks = (first, file) if min(different) in first.tensors else (file, first)
            raise ValueError(f"{lacks.path} has no {min(different)}, which {has.path} has")
    pieces: dict[str, list[Piece]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in first.tensors.items():
        if name in ignored:
            continue
        try:
            axis = axis_of(name, tensor)
        except ValueError as error:
            raise ValueError(f"{first.path}: {error}") from error
        pieces[name], shapes[name] = _pieces(name, files if axis is not None else files[:1], axis or 0)
    return SlicedStore(folder, pieces, shapes, {name: first.tensors[name].dtype for name in shapes})


def _pieces(name: str, files: Sequence[MappedFile], axis: int) -> tuple[list[Piece], tuple[int, ...]]:
    """The parts of a tensor, one after the other along `axis`, and its whole shape."""
    first = files[0].tensors[name]
    pieces, end = [], 0
    for file in files:
        part = file.tensors[name]
        if (part.dtype, part.shape) != (first.dtype, first.shape):
            unlike = f"{list(first.shape)} {first.dtype} in {files[0].path}"
            raise ValueError(f"{file.path}: {name} is {list(part.shape)} {part.dtype}, but {unlike}")
        offsets = tuple(end if dim == axis else 0 for dim in range(part.ndim))
        pieces.append(Piece(file, name, offsets, tuple(part.shape)))
        end += part.shape[axis]
    return pieces, tuple(end if dim == axis else size for dim, size in enumerate(first.shape))


def _without_tied_copy(stored: SlicedStore, path: Path) -> SlicedStore:
    """The last stage's copy of a tied embedding is to be one."""
    embedding, copy = reference.ROWS[0], reference.TIED_COPY
    if copy in stored.shapes and not stored.equal(embedding, copy):
        raise ValueError(f"{path}: {copy} of the last stage is not {embedding} of the first")
    return stored.without([copy])


def _formed(stored: SlicedStore, model: ModelConfig, source: Callable[[str], Source], described: Path) -> FormedStore:
    """Our tensors, of files that hold exactly those of the model that `described` describes, in their shapes."""
    shapes = parameter_shapes(model, stored.shape(source("embedding.weight").name)[0])
    sources = {name: source(name) for name in shapes}
    expected = {name: formed_shape(shapes, parts) for name, parts in by_target(sources).items()}
    found = stored.shapes.keys()
    for what, names in {"lack": expected.keys() - found, "have unknown": found - expected.keys()}.items():
        if names:
            raise ValueError(f"{described}: the files {what} weights: {', '.join(sorted(names)[:5])}")
    check_shapes(stored, expected, described)
    return FormedStore(stored, sources)
