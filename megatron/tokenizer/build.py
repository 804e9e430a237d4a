"""From options or a saved folder to a tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.config import TokenizerConfig, UsageError
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.description import SPECIAL_TOKENS_FILE, read_description
from megatron.tokenizer.hf_files import find_tokenizer, read_gpt2, read_tokenizer
from megatron.tokenizer.hf_tokenizer import HFTokenizer
from megatron.tokenizer.sentencepiece import SentencePieceTokenizer

ON_THE_HUB = {"FalconTokenizer": "tiiuae/falcon-7b"}
"""`--tokenizer_type` -> the name on the hub that it means where there is no `--vocab_file`."""


def _additions(config: TokenizerConfig) -> dict[str, Any]:
    """The tokens to add, as every tokenizer takes them."""
    return {
        "vocab_extra_ids": config.vocab_extra_ids,
        "extra_tokens": config.vocab_extra_ids_list.split(",") if config.vocab_extra_ids_list else [],
        "new_tokens": config.new_tokens,
    }


def _sentencepiece(config: TokenizerConfig) -> Tokenizer:
    if config.vocab_file is None:
        raise UsageError("--tokenizer_type SentencePieceTokenizer needs --vocab_file, the path of a tokenizer.model")
    if not Path(config.vocab_file).is_file():
        raise UsageError(f"--vocab_file {config.vocab_file}: no such file; give the path of a SentencePiece model")
    return SentencePieceTokenizer.from_file(Path(config.vocab_file), **_additions(config))


def _hf(config: TokenizerConfig) -> Tokenizer:
    kind = config.tokenizer_type or "HFTokenizer"
    name = config.vocab_file or ON_THE_HUB.get(kind)
    if name is None:
        raise UsageError(f"--tokenizer_type {kind} needs --vocab_file, a tokenizer.json, its folder or a hub name")
    path = find_tokenizer(name)
    model, names = read_tokenizer(path)
    source = f"--vocab_file {path}"
    return HFTokenizer.from_model(model, names, **_additions(config), tokenizer_type=kind, source=source)


def _gpt2(config: TokenizerConfig) -> Tokenizer:
    model, names = read_gpt2(config)
    source = f"--vocab_file {config.vocab_file}"
    return HFTokenizer.from_model(model, names, **_additions(config), tokenizer_type="GPT2BPETokenizer", source=source)


BUILDERS: dict[str, Callable[[TokenizerConfig], Tokenizer]] = {
    "SentencePieceTokenizer": _sentencepiece,
    "HFTokenizer": _hf,
    "FalconTokenizer": _hf,
    "GPT2BPETokenizer": _gpt2,
}
"""`--tokenizer_type` -> how it is built from the options."""
LOADERS: dict[str, Callable[[Path], Tokenizer]] = {
    "SentencePieceTokenizer": SentencePieceTokenizer.load,
    **dict.fromkeys(("HFTokenizer", "FalconTokenizer", "GPT2BPETokenizer"), HFTokenizer.load),
}
"""`--tokenizer_type` -> how it is read back from its own folder."""


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that the options ask for.

    Raises:
        UsageError: the type is not given, a file is missing, a token name is empty.
        ValueError: a file is damaged, or is not to be had from the hub.
    """
    kind = config.tokenizer_type
    if kind is None:
        raise UsageError(f"--tokenizer_type is not given; available: {', '.join(BUILDERS)}")
    return BUILDERS[kind](config)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer saved in `folder`.

    Raises:
        OSError, ValueError: a file is missing or damaged.
    """
    description = read_description(folder)
    kind = description["tokenizer_type"]
    if kind not in LOADERS:
        raise ValueError(f"{folder / SPECIAL_TOKENS_FILE} is of tokenizer type {kind!r}; known: {', '.join(LOADERS)}")
    tokenizer = LOADERS[kind](folder)
    tokenizer.chat_template = description.get("chat_template")
    return tokenizer
