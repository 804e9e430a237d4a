"""Export to Hugging Face: a folder that `transformers` loads, and the proof that it computes the same."""

import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer

from megatron.checkpoint.formed import formed, formed_shape
from megatron.checkpoint.json_file import read_json
from megatron.checkpoint.load import HF_CONFIG, Checkpoint, open_checkpoint
from megatron.checkpoint.safetensors_file import Entry, SafetensorsWriter
from megatron.checkpoint.store import read_ahead
from megatron.config import UsageError
from megatron.hf.config import EXPORTED, hf_config
from megatron.hf.forms import targets
from megatron.hf.peer import load_peer
from megatron.hf.tokenizer import FILES, export_tokenizer, is_own, stop_ids, token_ids
from megatron.model import Model
from megatron.tokenizer.chat import MESSAGE_END

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARD_BYTES = 5 * 10**9
TOLERANCE = 1e-3
"""Largest difference of logits, computed in fp32 on both sides, that is rounding."""
GENERATION = "generation_config.json"
SPECIAL = ("bos", "eos", "pad", "cls", "mask", "sep", "unk")
"""What a tokenizer of `transformers` calls its special tokens, each `NAME_token`."""
IDS_IN_CONFIG = ("bos", "eos", "pad")
"""Those of which config.json and generation_config.json have the id, `NAME_token_id`."""
MADE_BY = "megatron_llm_version"
"""Key of config.json by which an export is known as one, which a later one may replace."""
EXPORTED_FILES = re.compile(
    r"config\.json|generation_config\.json|model.*\.safetensors|model\.safetensors\.index\.json|"
    + "|".join(map(re.escape, FILES))
)
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Files of which a tokenizer has at least one."""


@dataclass(frozen=True)
class TokenChanges:
    """What the export changes of the tokenizer.

    Attributes:
        added: tokens that are special; those the tokenizer does not have get the next ids.
        named: name in `SPECIAL` -> the token it is.
    """

    added: tuple[str, ...] = ()
    named: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_words(cls, added: str | None, named: Iterable[str]) -> "TokenChanges":
        """From the values of `--vocab_extra_ids_list` and `--override_special_tokens`.

        Raises:
            UsageError: a token is empty, a word is not NAME=TOKEN, or the name is unknown.
        """
        tokens = tuple(added.split(",")) if added else ()
        if "" in tokens:
            raise UsageError(f"--vocab_extra_ids_list {added} has an empty token")
        pairs = {}
        for word in named:
            name, _, token = word.partition("=")
            if name not in SPECIAL or not token:
                raise UsageError(
                    f"--override_special_tokens {word} is not NAME=TOKEN with a name of {', '.join(SPECIAL)}"
                )
            pairs[name] = token
        return cls(tokens, pairs)


UNCHANGED = TokenChanges()


def export(
    checkpoint: Checkpoint,
    output: Path,
    dtype: torch.dtype | None = None,
    shards: int | None = None,
    progress: Callable[[int], object] = lambda size: None,
    changes: TokenChanges = UNCHANGED,
) -> Path:
    """Write a Hugging Face folder beside `output` and return it; `publish` gives it its name.

    Args:
        checkpoint: of any layout.
        output: the folder to come.
        dtype: of the weights; by default that of the training run, else as stored.
        shards: number of weight files; by default one for each 5 GB.
        progress: is told the bytes written.
        changes: of the tokenizer.

    Raises:
        UsageError: `output` is not to be replaced: it holds `checkpoint`, or something else than an earlier export; or
            `shards` is not positive; or `changes` do not fit the tokenizer and the vocabulary.
        ValueError: the tokenizer has no equal in `transformers`.
    """
    if shards is not None and shards < 1:
        raise UsageError(f"--num_output_shards {shards} is not positive")
    output = output.resolve()
    _check_replaceable(output, checkpoint.folder.resolve())
    folder = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        kind = dtype or _trained_dtype(checkpoint)
        tokens = _write_tokenizer(checkpoint, folder)
        config = hf_config(checkpoint.model, checkpoint.vocab_size, kind, tokens)
        _write_json(folder / HF_CONFIG, {**config, MADE_BY: version("megatron-llm")})
        if changes != UNCHANGED:
            _change_tokens(folder, changes, checkpoint.vocab_size)
        _write_weights(checkpoint, folder, kind, shards, progress)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def publish(folder: Path, output: Path) -> None:
    """Give an exported folder its name; an earlier export of that name goes when the new one has it."""
    output = output.resolve()
    replaced = output.with_name(f".{output.name}.old")
    shutil.rmtree(replaced, ignore_errors=True)
    if output.exists():
        output.rename(replaced)
    folder.rename(output)
    shutil.rmtree(replaced, ignore_errors=True)


def _check_replaceable(output: Path, source: Path) -> None:
    """An export replaces an earlier one, never the user's other files."""
    if source.is_relative_to(output):
        raise UsageError(f"--output_dir {output} holds the checkpoint that is read; give another folder")
    if output.exists() and not (output.is_dir() and (_is_export(output) or not any(output.iterdir()))):
        raise UsageError(
            f"--output_dir {output} exists and is no earlier export, or has other files, too; give another folder or "
            "remove it"
        )


def _is_export(folder: Path) -> bool:
    """Whether all of a folder was written by an earlier export."""
    if not all(path.is_file() and EXPORTED_FILES.fullmatch(path.name) for path in folder.iterdir()):
        return False
    return (folder / HF_CONFIG).is_file() and MADE_BY in read_json(folder / HF_CONFIG)


def check_whole(folder: Path) -> None:
    """See that a Hugging Face folder has all that `transformers` needs: description, weights, tokenizer.

    Raises:
        ValueError: something is missing, damaged, or does not fit the rest.
    """
    from transformers import AutoTokenizer

    checkpoint = open_checkpoint(folder)
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise ValueError(f"{folder} has no tokenizer: none of {', '.join(TOKENIZERS)}")
    try:
        tokens = len(AutoTokenizer.from_pretrained(folder, local_files_only=True))
    except Exception as error:  # each kind of tokenizer has its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{folder}: transformers cannot load the tokenizer: {reason}") from error
    if tokens > checkpoint.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has {tokens} tokens, the model only {checkpoint.vocab_size} rows")


def logits_difference(checkpoint: Checkpoint, folder: Path, tokens: int = 32) -> float:
    """Largest difference of logits between the checkpoint here and the exported `folder` in `transformers`.

    Both compute in fp32, on random tokens, with the weights as exported.
    """
    theirs = load_peer(folder, torch.float32, attn_implementation="eager")
    stored = getattr(torch, json.loads((folder / "config.json").read_text())["dtype"])
    ours = Model(checkpoint.model, checkpoint.vocab_size).eval()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(checkpoint.weights.read(name).to(stored))
        tokens = min(tokens, checkpoint.model.max_position_embeddings or tokens)
        ids = torch.randint(checkpoint.vocab_size, (tokens,), generator=torch.Generator().manual_seed(1))
        mine = ours(ids, torch.arange(tokens), torch.tensor([0, tokens], dtype=torch.int32), tokens)
        return float((mine - theirs(ids[None]).logits[0]).abs().max())


def _write_tokenizer(checkpoint: Checkpoint, folder: Path) -> dict[str, int | None]:
    """Write tokenizer and generation settings; returns the token ids that config.json names."""
    source = checkpoint.tokenizer_folder
    tokens: dict[str, int | None] = checkpoint.run.get("tokens", {})
    settings: dict[str, object] = {**tokens, "do_sample": False}
    if source and is_own(source):
        export_tokenizer(source, folder)
        tokens = token_ids(source)
        settings = {**tokens, "eos_token_id": stop_ids(source) or None, "do_sample": False}
    else:
        for file in checkpoint.tokenizer_files:
            shutil.copyfile(file, folder / file.name)
        if source and (source / GENERATION).is_file():
            settings = read_json(source / GENERATION)
    _write_json(folder / GENERATION, settings)
    return tokens


def _change_tokens(folder: Path, changes: TokenChanges, vocab_size: int) -> None:
    """Change the tokenizer that is written in `folder`, and the files that name its tokens.

    Raises:
        UsageError: there is no tokenizer.json, a token is not in it, or a new one is beyond the vocabulary.
    """
    path = folder / TOKENIZERS[0]
    if not path.is_file():
        raise UsageError(f"this export has no {path.name}; leave out --vocab_extra_ids_list, --override_special_tokens")
    tokenizer = Tokenizer.from_file(str(path))
    if changes.added:
        tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in changes.added])
        tokenizer.save(str(path))
    ids = {token: tokenizer.token_to_id(token) for token in (*changes.added, *changes.named.values())}
    for token, token_id in ids.items():
        if token_id is None:
            raise UsageError(f"--override_special_tokens: the tokenizer has no {token}; see --vocab_extra_ids_list")
        if token_id >= vocab_size:
            raise UsageError(
                f"--vocab_extra_ids_list: {token} would be id {token_id}, but the model has {vocab_size} rows; "
                "more come by checkpoint_util.py --true_vocab_size, and by training with new tokens"
            )
    names: dict[str, object] = {f"{name}_token": token for name, token in changes.named.items()}
    in_config: dict[str, object] = {
        f"{name}_token_id": ids[token] for name, token in changes.named.items() if name in IDS_IN_CONFIG
    }
    in_generation, end = dict(in_config), tokenizer.token_to_id(MESSAGE_END)
    if "eos_token_id" in in_config and end is not None:  # a turn ends there whatever a sequence ends with
        stops = list(dict.fromkeys([end, in_config["eos_token_id"]]))
        in_generation["eos_token_id"] = stops if len(stops) > 1 else end
    for file, values in {
        "tokenizer_config.json": names,
        "special_tokens_map.json": names,
        HF_CONFIG: in_config,
        GENERATION: in_generation,
    }.items():
        present = read_json(folder / file) if (folder / file).is_file() else {}
        _write_json(folder / file, {**present, **values})


def _trained_dtype(checkpoint: Checkpoint) -> torch.dtype:
    precision = checkpoint.run["config"].get("precision", {})
    if precision.get("bf16"):
        return torch.bfloat16
    return torch.float16 if precision.get("fp16") else checkpoint.weights.dtype("embedding.weight")


def _write_weights(
    checkpoint: Checkpoint, folder: Path, dtype: torch.dtype, shards: int | None, progress: Callable[[int], object]
) -> None:
    weights, model = checkpoint.weights, checkpoint.model
    parts = targets(EXPORTED[model.model_name], model, _in_order(weights.names()))
    shapes = {name: weights.shape(name) for name in weights.names()}
    entries = {name: Entry(name, dtype, formed_shape(shapes, made_of)) for name, made_of in parts.items()}
    total = sum(entry.size for entry in entries.values())
    files = _divide(entries, total, shards or -(-total // SHARD_BYTES))
    count, index = len(files), {}
    for number, names in enumerate(files, 1):
        file = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        with SafetensorsWriter(folder / file, [entries[name] for name in names], {"format": "pt"}) as writer:
            reads = [partial(formed, weights, parts[name]) for name in names]
            for name, tensor in zip(names, read_ahead(reads), strict=True):
                writer.write(tensor.to(dtype))
                index[name] = file
                progress(entries[name].size)
    if count > 1:
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def _in_order(names: list[str]) -> list[str]:
    """Embedding, layers by number, the rest."""

    def place(name: str) -> tuple[int, int]:
        if name.startswith("layers."):
            return 1, int(name.split(".")[1])
        return (0, 0) if name.startswith("embedding.") else (2, 0)

    return sorted(names, key=place)


def _divide(entries: dict[str, Entry], total: int, count: int) -> list[list[str]]:
    """Names in `count` files of about equal size, in order; fewer only if there are fewer names."""
    count = min(count, len(entries))
    files: list[list[str]] = [[] for _ in range(count)]
    number = written = 0
    for place, (name, entry) in enumerate(entries.items()):
        following = number + 1 if files[number] else number
        least = count - (len(entries) - place)  # so that the rest is enough for the rest of the files
        number = max(min(written * count // max(total, 1), following, count - 1), least)
        files[number].append(name)
        written += entry.size
    return files


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
