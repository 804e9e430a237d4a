"""Where a tokenizer of the `tokenizers` library comes from: a file, a folder, the hub, or GPT-2's pair of files."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from megatron.config import TokenizerConfig, UsageError
from megatron.tokenizer.hf_tokenizer import TOKENIZER_FILE, read_model

NAMING_FILES = ("special_tokens_map.json", "tokenizer_config.json")
"""Files that name special tokens; what a later one says replaces what an earlier one says."""
NAMED = ("bos", "eos", "pad")
WELL_KNOWN = {
    "bos": ("<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>"),
    "eos": ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>"),
    "pad": ("<pad>", "<|pad|>", "<PAD>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>"),
    "eod": ("<EOD>", "<|endoftext|>", "<|end_of_text|>"),
}
"""Role -> names of its token, the first that is there counts."""
END_OF_TEXT = "<|endoftext|>"


def find_tokenizer(name: str) -> Path:
    """The tokenizer.json that `--vocab_file NAME` means: the file, the one in the folder, or that of a model on the
    Hugging Face hub, with the files beside it that name its special tokens.

    Raises:
        UsageError: there is no such file, or none in the folder.
        ValueError: the hub has no such model, or cannot be reached.
    """
    path = Path(name)
    if path.is_file():
        return path
    if not path.is_dir():
        if path.is_absolute() or path.suffix == ".json":
            raise UsageError(f"--vocab_file {name}: no such file; give a {TOKENIZER_FILE}, its folder or a hub name")
        path = _from_hub(name)
    if not (path / TOKENIZER_FILE).is_file():
        raise UsageError(f"--vocab_file {name}: there is no {TOKENIZER_FILE} in it")
    return path / TOKENIZER_FILE


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=[TOKENIZER_FILE, *NAMING_FILES]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise ValueError(
            f"--vocab_file {name}: no such file or folder, and not to be had from the hub: {reason}"
        ) from error


def read_tokenizer(path: Path) -> tuple[FastTokenizer, dict[str, str | None]]:
    """The tokenizer of the file `path`, and the names of its bos, eos, pad and eod tokens, None where it has none.

    bos, eos and pad are those that `tokenizer_config.json` and `special_tokens_map.json` beside it name, if one of them
    names any; else, as eod always, the first of `WELL_KNOWN` among its special tokens, or among all pieces where it
    has no special tokens. The end of a document, where none is known, is that of a sequence.

    Raises:
        ValueError: one of the files is damaged.
    """
    source = f"--vocab_file {path}"
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not a {TOKENIZER_FILE}: {error}") from error
    model = read_model(text, source)
    special = {token["content"] for token in json.loads(text).get("added_tokens") or () if token["special"]}
    names = _well_known(special or model.get_vocab().keys()) | _named_beside(path.parent)
    return model, {**names, "eod": names["eod"] or names["eos"]}


def _well_known(pieces: Collection[str]) -> dict[str, str | None]:
    return {role: next((name for name in names if name in pieces), None) for role, names in WELL_KNOWN.items()}


def _named_beside(folder: Path) -> dict[str, str | None]:
    """Role -> name, of all of `NAMED` if the files name any of them, else empty."""
    content: dict[str, Any] = {}
    for path in (folder / name for name in NAMING_FILES):
        if path.is_file():
            content |= {key: value for key, value in _read_object(path, str(path)).items() if value is not None}
    tokens = {role: content.get(f"{role}_token") for role in NAMED}
    names = {role: token.get("content") if isinstance(token, dict) else token for role, token in tokens.items()}
    for role, name in names.items():
        if not isinstance(name, str | None):
            raise ValueError(f"{role}_token is {name!r} in {' or '.join(NAMING_FILES)} of {folder}, not a string")
    return names if any(names.values()) else {}


def _read_object(path: Path, source: str) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{source} is not a JSON object: {error}") from error


def read_gpt2(config: TokenizerConfig) -> tuple[FastTokenizer, dict[str, str | None]]:
    """The byte-level tokenizer of `--vocab_file` and `--merge_file`; bos, eos and eod are `<|endoftext|>`, if it is
    there, and there is no pad.

    Raises:
        UsageError: one of the flags is not given, or its file is not there.
        ValueError: one of the files is damaged.
    """
    files = {"vocab_file": "encoder.json or vocab.json", "merge_file": "vocab.bpe or merges.txt"}
    for name, usual in files.items():
        if (value := getattr(config, name)) is None:
            raise UsageError(f"--tokenizer_type {config.tokenizer_type} needs --{name}, the path of a {usual}")
        if not Path(value).is_file():
            raise UsageError(f"--{name} {value}: no such file; give the path of a {usual}")
    assert config.vocab_file and config.merge_file
    vocabulary = _read_object(Path(config.vocab_file), f"--vocab_file {config.vocab_file}")
    if not vocabulary or not all(type(token_id) is int and token_id >= 0 for token_id in vocabulary.values()):
        raise ValueError(f"--vocab_file {config.vocab_file} is not a table from piece to id")
    try:
        merges = _read_merges(Path(config.merge_file))
        model = FastTokenizer(models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # the library raises nothing more special
        raise ValueError(
            f"--merge_file {config.merge_file} does not hold merges of --vocab_file {config.vocab_file}: {error}"
        ) from error
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    end = END_OF_TEXT if END_OF_TEXT in vocabulary else None
    return model, {"bos": end, "eos": end, "pad": None, "eod": end}


def _read_merges(path: Path) -> list[tuple[str, str]]:
    """The pairs of a file of one pair a line, below an optional line that names the version."""
    merges = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        pair = line.rstrip("\r").split(" ")
        if (number == 1 and line.startswith("#version")) or pair == [""]:
            continue
        if len(pair) != 2:
            raise ValueError(f"line {number} is not a pair of pieces")
        merges.append((pair[0], pair[1]))
    return merges
