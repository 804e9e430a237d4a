"""From rows of plain text to the token ids of documents."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron.config import UsageError
from megatron.data.chunks import Chunk, Row, read_rows, string_of
from megatron.data.indexed import Array, token_dtype
from megatron.data.preprocess import Encoded, Summary
from megatron.data.special_text import SpecialText, ends_of_text
from megatron.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class EncodedDocuments(Encoded):
    """What a chunk of texts became.

    Attributes:
        tokens_per_key: for each key in turn, tokens of its texts.
        empty: texts without a token, which are left out.
    """

    tokens_per_key: list[int]
    empty: int


@dataclass(kw_only=True)
class DocumentSummary(Summary):
    """What a run did with texts.

    Attributes:
        tokens_per_key: key -> tokens of its texts.
        empty: texts without a token, which were left out.
    """

    forging = "end tokens in their own text, which end a document early"
    tokens_per_key: dict[str, int]
    empty: int = 0

    def add(self, encoded: Encoded) -> None:
        """Count a chunk in."""
        super().add(encoded)
        assert isinstance(encoded, EncodedDocuments)
        for key, tokens in zip(self.tokens_per_key, encoded.tokens_per_key, strict=True):
            self.tokens_per_key[key] += tokens
        self.empty += encoded.empty

    def notes(self) -> list[str]:
        """What the user should look at: also the empty texts left out."""
        return [*super().notes(), *([f"{self.empty:,} empty texts are left out"] if self.empty else [])]

    def tokens_in_words(self) -> str:
        """How many tokens there are, and under each key where there are several."""
        if len(self.tokens_per_key) == 1:
            return super().tokens_in_words()
        return f"{super().tokens_in_words()} ({', '.join(f'{key} {n:,}' for key, n in self.tokens_per_key.items())})"


class DocumentEncoder:
    """Encodes the texts under `keys`, each a document of the key's own files; see `Encoder`.

    A text that has no tokens is left out, as the reference does.

    Args:
        tokenizer: what encodes.
        keys: of the texts.
        append_eod: end each document with the end-of-document token.
        special_in_text: what becomes of special strings in a text; see `SpecialText`.

    Raises:
        UsageError: a key is there twice or cannot name a file, or there is no end-of-document token to append.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        keys: Sequence[str] = ("text",),
        *,
        append_eod: bool = False,
        special_in_text: str = "keep",
    ) -> None:
        if len(set(keys)) < len(keys):
            raise UsageError(f"--json_keys {' '.join(keys)}: name each key once")
        if within_folders := [key for key in keys if "/" in key]:
            raise UsageError(f"--json_keys {within_folders[0]}: a key names files, so it cannot have a '/'")
        if append_eod and tokenizer.eod_id is None:
            raise UsageError("--append_eod: the tokenizer has no end-of-document token; add one to its special tokens")
        self.tokenizer = tokenizer
        self.keys = keys
        self._end = np.array([tokenizer.eod_id] if append_eod else [], np.int32)
        self._special = SpecialText(tokenizer, special_in_text, ends_of_text(tokenizer))
        self._dtype = token_dtype(tokenizer.vocab_size)

    def files(self, output_prefix: str) -> dict[str, np.dtype[Any]]:
        """Prefix of each indexed dataset to write, and its element type."""
        return {f"{output_prefix}_{key}_document": self._dtype for key in self.keys}

    def datasets(self, output_prefix: str) -> list[str]:
        """The prefixes by which training names the data."""
        return list(self.files(output_prefix))

    def summary(self) -> DocumentSummary:
        """A summary to count into."""
        return DocumentSummary(tokens_per_key=dict.fromkeys(self.keys, 0))

    def encode(self, chunk: Chunk) -> EncodedDocuments:
        """Encode the rows of `chunk`; bad ones are listed and left out."""
        numbers, rows, bad_lines = read_rows(chunk, self.keys, self._texts)
        files = [self._documents([row[place] for row in rows]) for place in range(len(self.keys))]
        tokens = [len(values) for values, _ in files]
        return EncodedDocuments(
            advance=chunk.advance,
            files=files,
            rows=len(rows),
            tokens=sum(tokens),
            longest=max(int(sizes.max(initial=0)) for _, sizes in files),
            bad_lines=bad_lines,
            forgeable=self._special.forgeable(chunk, numbers, rows),
            tokens_per_key=tokens,
            empty=sum(len(rows) - len(sizes) for _, sizes in files),
        )

    def _texts(self, row: Row) -> list[str]:
        texts = [string_of(row, key) for key in self.keys]
        for key, text in zip(self.keys, texts, strict=True):
            self._special.check(f"the value of key {key!r}", text)
        return texts

    def _documents(self, texts: Sequence[str]) -> tuple[Array, Array]:
        """Ids of the documents back to back, and how many each has, int32."""
        documents = [ids for ids in self._ids(texts) if len(ids)]
        sizes = np.fromiter(map(len, documents), np.int32, len(documents)) + np.int32(len(self._end))
        parts = [part for ids in documents for part in (ids, self._end)]
        return np.concatenate([np.empty(0, np.int32), *parts]).astype(self._dtype), sizes

    def _ids(self, texts: Sequence[str]) -> list[Array]:
        if self._special.treatment == "text":
            return [np.array(self.tokenizer.encode_plain(text), np.int32) for text in texts]
        return self.tokenizer.encode_arrays(texts)
