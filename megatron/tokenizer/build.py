"""From options or a saved folder to a tokenizer."""

import json
from collections.abc import Callable
from pathlib import Path

from megatron.config import TokenizerConfig, UsageError
from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.sentencepiece import SPECIAL_TOKENS_FILE, SentencePieceTokenizer


def _sentencepiece(config: TokenizerConfig) -> Tokenizer:
    if config.vocab_file is None:
        raise UsageError("--tokenizer_type SentencePieceTokenizer needs --vocab_file, the path of a tokenizer.model")
    if not Path(config.vocab_file).is_file():
        raise UsageError(f"--vocab_file {config.vocab_file}: no such file; give the path of a SentencePiece model")
    return SentencePieceTokenizer.from_file(
        Path(config.vocab_file),
        vocab_extra_ids=config.vocab_extra_ids,
        extra_tokens=config.vocab_extra_ids_list.split(",") if config.vocab_extra_ids_list else [],
        new_tokens=config.new_tokens,
    )


BUILDERS: dict[str, Callable[[TokenizerConfig], Tokenizer]] = {"SentencePieceTokenizer": _sentencepiece}
"""`--tokenizer_type` -> how it is built from the options."""
LOADERS: dict[str, Callable[[Path], Tokenizer]] = {"SentencePieceTokenizer": SentencePieceTokenizer.load}
"""`--tokenizer_type` -> how it is read back from its own folder."""


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that the options ask for.

    Raises:
        UsageError: the type is not given or not available, a file is missing, a token name is empty.
        ValueError: the model file is damaged.
    """
    kind = config.tokenizer_type
    if kind is None:
        raise UsageError(f"--tokenizer_type is not given; available: {', '.join(BUILDERS)}")
    if kind not in BUILDERS:
        raise UsageError(f"--tokenizer_type {kind} is not available yet; available: {', '.join(BUILDERS)}")
    return BUILDERS[kind](config)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer saved in `folder`.

    Raises:
        OSError, ValueError: a file is missing or damaged.
    """
    path = folder / SPECIAL_TOKENS_FILE
    try:
        kind = json.loads(path.read_text(encoding="utf-8"))["tokenizer_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not describe a tokenizer: {error!r}") from error
    if kind not in LOADERS:
        raise ValueError(f"{path} is of tokenizer type {kind!r}; known: {', '.join(LOADERS)}")
    return LOADERS[kind](folder)
