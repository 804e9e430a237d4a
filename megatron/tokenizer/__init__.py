"""Tokenizers: text to ids and back, special tokens, and the chat template.

In: a `TokenizerConfig` (`build_tokenizer`) or a folder that a tokenizer saved itself in (`load_tokenizer`).
Out: a `Tokenizer`. `chat` says how a conversation is written as text; `describe`, `read_description` and `difference`
tell whether a stored tokenizer is the present one.
"""

from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.build import build_tokenizer, load_tokenizer
from megatron.tokenizer.description import describe, description_text, difference, read_description

__all__ = [
    "Tokenizer",
    "build_tokenizer",
    "describe",
    "description_text",
    "difference",
    "load_tokenizer",
    "read_description",
]
