"""Opening weights of any kind: a checkpoint of any layout, one of its folders, or a folder of another toolkit's."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from megatron.checkpoint.folder import (
    MANIFEST,
    OPTIMIZER,
    RELEASE,
    RUN,
    TOKENIZER,
    TRACKER,
    WEIGHTS,
    candidates,
    iteration_folders,
)
from megatron.checkpoint.foreign import Foreign, is_meta, open_meta, open_reference, reference_folder
from megatron.checkpoint.formed import FormedStore, check_shapes, formed_shape
from megatron.checkpoint.integrity import check_folder
from megatron.checkpoint.json_file import read_json
from megatron.checkpoint.save import state_name
from megatron.checkpoint.store import SlicedStore, TensorStore, open_files
from megatron.checkpoint.vocabulary import vocabulary_size
from megatron.config import ModelConfig
from megatron.hf.config import architecture, model_fields, model_type
from megatron.hf.config import vocabulary_size as vocabulary_of
from megatron.hf.forms import FORMS, sources, targets, usual_name
from megatron.hf.meta import PARAMS
from megatron.hf.rows import check_complete, from_hf, parameter_shapes
from megatron.hf.tokenizer import FILES
from megatron.tokenizer.sentencepiece import SPECIAL_TOKENS_FILE

HF_CONFIG = "config.json"
HF_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
HF_FILES = ("model.safetensors", "pytorch_model.bin")
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
NO_DAMAGE: Mapping[Path, str] = MappingProxyType({})
LAYOUT = ("tensor_model_parallel_size", "pipeline_model_parallel_size")
"""Stored options, besides the architecture and `seq_length`, that a run may take over."""


@dataclass(frozen=True)
class Checkpoint:
    """Weights to read, and what is known of them.

    Attributes:
        folder: where they lie.
        iteration: that they were saved at; 0 for weights that no run here has trained.
        run: what run.json holds; for a Hugging Face folder only "config" and "tokens".
        weights: by our names.
        optimizer: optimizer state by our names, if there is any.
        tokenizer_folder: where its tokenizer's files are, if there are any.
        warnings: about damaged checkpoints that were passed over.
    """

    folder: Path
    iteration: int
    run: dict[str, Any]
    weights: TensorStore
    optimizer: SlicedStore | None = None
    tokenizer_folder: Path | None = None
    warnings: tuple[str, ...] = ()

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return vocabulary_size(self.weights)

    @property
    def is_hugging_face(self) -> bool:
        """Whether this is a Hugging Face folder, which says nothing of a family, progress or precision."""
        return (self.folder / HF_CONFIG).is_file()

    @property
    def tokenizer_files(self) -> list[Path]:
        """The files of its tokenizer."""
        folder = self.tokenizer_folder
        return [folder / name for name in (*FILES, SPECIAL_TOKENS_FILE) if (folder / name).is_file()] if folder else []

    @property
    def model(self) -> ModelConfig:
        """The architecture."""
        known = {field.name for field in fields(ModelConfig)}
        return ModelConfig(**{k: v for k, v in self.run["config"]["model"].items() if k in known})

    def close(self) -> None:
        """Let go of the files, until they are read again: removed ones are gone only then."""
        self.weights.close()
        if self.optimizer:
            self.optimizer.close()

    def stored_options(self) -> dict[str, Any]:
        """Options that a run may take over or must agree with, by field name."""
        config = self.run["config"]
        parallel = {name: config["parallel"][name] for name in LAYOUT} if "parallel" in config else {}
        data = config.get("data", {})
        length = {"seq_length": data["seq_length"]} if data.get("seq_length") else {}
        return {**config["model"], **parallel, **length}


def open_checkpoint(
    load: Path,
    iteration: int | None = None,
    *,
    reads_all: bool = False,
    family: str | None = None,
    damaged: Mapping[Path, str] = NO_DAMAGE,
) -> Checkpoint:
    """The weights that `load` names; of several checkpoints the one its tracker names, or the newest whole one.

    Args:
        load: a folder of checkpoints, an iteration's own folder, or a Hugging Face, Meta or Megatron-LLM folder.
        iteration: which one of a folder of checkpoints, and no other.
        reads_all: compare the checksums of all files, not only sizes and the small ones: takes as long as reading them.
        family: of a Meta or Megatron-LLM folder that does not say it; by default found from rotary base and epsilon.
        damaged: folders that are known to be, and what is wrong with them.

    Raises:
        ValueError: there are none, or they are damaged; with the file and what is wrong.
    """
    if not load.is_dir():
        raise ValueError(f"--load {load}: no such folder")
    reference = reference_folder(load, iteration)
    if reference:
        return _foreign(open_reference(reference, family))
    if (load / TRACKER).is_file():
        return _open_first(load, candidates(load, iteration), reads_all, damaged)
    if (load / RUN).is_file():
        checkpoint = _open_first(load, [load], reads_all, damaged)
    elif (load / HF_CONFIG).is_file():
        checkpoint = _open_hf(load)
    elif is_meta(load):
        checkpoint = _foreign(open_meta(load, read_json(load / PARAMS), family))
    elif any((folder / MANIFEST).is_file() for folder in iteration_folders(load)):
        checkpoint = _open_first(load, candidates(load, iteration), reads_all, damaged)
        warning = f"{load} has no {TRACKER}: taking {checkpoint.folder}"
        return replace(checkpoint, warnings=(warning, *checkpoint.warnings))
    else:
        folders = iteration_folders(load)
        hint = f"; to load {folders[-1].name} in it, name that folder" if folders else ""
        raise ValueError(
            f"{load} is no checkpoint: it has neither {TRACKER} nor {RUN} nor {HF_CONFIG} (a Hugging Face model){hint}"
        )
    if iteration is not None and checkpoint.iteration != iteration:
        raise ValueError(f"{load} is of iteration {checkpoint.iteration}, not {iteration}")
    return checkpoint


def _open_first(load: Path, folders: Iterable[Path], reads_all: bool, damaged: Mapping[Path, str]) -> Checkpoint:
    """The first whole checkpoint of `folders`, with warnings about those before it."""
    problems: list[str] = []
    for folder in folders:
        try:
            if folder in damaged:
                raise ValueError(damaged[folder])
            check_folder(folder, reads_all=reads_all)
            checkpoint = _open(folder)
        except (OSError, ValueError) as error:
            problems.append(f"checkpoint {folder} is damaged: {error}")
        else:
            return replace(checkpoint, warnings=tuple(f"{problem}; going back to {folder}" for problem in problems))
    raise ValueError(f"no whole checkpoint in {load}: {'; '.join(problems)}")


def _open(folder: Path) -> Checkpoint:
    run = read_json(folder / RUN)
    weights = _renamed(open_files(folder, sorted((folder / WEIGHTS).glob("*.safetensors"))))
    states = sorted((folder / OPTIMIZER).glob("*.safetensors"))
    tokenizer = folder / TOKENIZER
    try:
        checkpoint = Checkpoint(
            folder=folder,
            iteration=0 if folder.name == RELEASE else int(run.get("iteration") or 0),
            run=run,
            weights=weights,
            optimizer=_renamed(open_files(folder, states)) if states else None,
            tokenizer_folder=tokenizer if tokenizer.is_dir() else None,
        )
        checkpoint.stored_options()
        check_complete(weights.names(), checkpoint.model, folder)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(f"{folder / RUN} does not describe a run: {error!r}") from error
    for store in (weights, checkpoint.optimizer):
        if store:
            store.check_whole()
    return checkpoint


def _foreign(opened: Foreign) -> Checkpoint:
    run = {"config": opened.config}
    return Checkpoint(
        opened.folder, 0, run, opened.weights, tokenizer_folder=opened.tokenizer_folder, warnings=opened.notes
    )


def _open_hf(folder: Path) -> Checkpoint:
    config = read_json(folder / HF_CONFIG)
    kind, fields = model_type(config, folder / HF_CONFIG), model_fields(config, folder / HF_CONFIG)
    model = architecture(fields, folder / HF_CONFIG)
    stored = open_files(folder, _hf_files(folder)).renamed(lambda name: usual_name(name, kind))
    stored = stored.without([name for name in stored.names() if not name])
    if fields["num_layers"] > len(stored.names()):  # before a model of so many is made
        raise ValueError(f"{folder / HF_CONFIG}: {fields['num_layers']} layers, but {len(stored.names())} weights")
    shapes = parameter_shapes(model, vocabulary_of(config, folder / HF_CONFIG))
    if model.tie_embed_logits:
        stored = _without_tied_copy(stored, kind, model, folder)
    _check_form(stored, kind, model, shapes, folder)
    weights = FormedStore(stored, sources(kind, model, shapes))
    run = {"config": {"model": fields}, "tokens": {key: config[key] for key in TOKENS if key in config}}
    return Checkpoint(folder, 0, run, weights, tokenizer_folder=folder)


def _without_tied_copy(stored: SlicedStore, kind: str, model: ModelConfig, folder: Path) -> SlicedStore:
    """A copy of tied embeddings is to be one: with other values `transformers` 4 leaves it out, 5 computes with it."""
    names = [FORMS[kind](name, model).name for name in ("embedding.weight", "lm_head.weight")]
    if not set(names) <= set(stored.names()):
        return stored
    if not stored.equal(*names):
        raise ValueError(f"{folder}: {HF_CONFIG} says tie_word_embeddings, but {names[1]} is not {names[0]}")
    return stored.without(names[1:])


def _check_form(
    stored: SlicedStore, kind: str, model: ModelConfig, shapes: dict[str, tuple[int, ...]], folder: Path
) -> None:
    """The files hold exactly the tensors of the model that config.json describes, in their shapes."""
    expected = {name: formed_shape(shapes, parts) for name, parts in targets(kind, model, shapes).items()}
    found = set(stored.names())
    for what, difference in {"lacks": expected.keys() - found, "has unknown": found - expected.keys()}.items():
        if difference:
            some = ", ".join(sorted(difference)[:5])
            raise ValueError(f"{folder} {what} weights: {some}{', ...' if len(difference) > 5 else ''}")
    for name in expected:
        if stored.dtype(name) not in WEIGHT_DTYPES:
            raise ValueError(f"{folder}: {name} is of {stored.dtype(name)}; only {WEIGHT_DTYPES} are supported")
    check_shapes(stored, expected, HF_CONFIG)


def _hf_files(folder: Path) -> list[Path]:
    for index in HF_INDEXES:
        if (folder / index).is_file():
            table = read_json(folder / index).get("weight_map")
            if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
                raise ValueError(f"{folder / index} has no weight_map from names of weights to files")
            names = sorted(set(table.values()))
            outside = [name for name in names if Path(name).name != name]
            if outside:
                raise ValueError(f"{folder / index} names {outside[0]!r}, which is not a file of that folder")
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise ValueError(f"{folder / index} names {missing[0]}, which is missing")
            return [folder / name for name in names]
    for name in HF_FILES:
        if (folder / name).is_file():
            return [folder / name]
    raise ValueError(f"{folder} has no weights: none of {', '.join((*HF_FILES, *HF_INDEXES))}")


def _renamed(store: SlicedStore) -> SlicedStore:
    try:
        return store.renamed(lambda name: state_name(name, from_hf))
    except ValueError as error:
        raise ValueError(f"{store.folder}: {error}") from error
