"""Tokenizers: text to ids and back, special tokens, and the chat template.

In: a `TokenizerConfig` (`build_tokenizer`) or a folder that a tokenizer saved itself in (`load_tokenizer`).
Out: a `Tokenizer`. `chat` says how a conversation is written as text.
"""

from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.build import build_tokenizer, load_tokenizer

__all__ = ["Tokenizer", "build_tokenizer", "load_tokenizer"]
