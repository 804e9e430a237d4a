"""From lines of a jsonl file to token ids and roles."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron.data.indexed import Array, token_dtype
from megatron.tokenizer import Tokenizer
from megatron.tokenizer.chat import MESSAGE_END, MESSAGE_START, Role, render_body, render_message

try:
    import orjson
except ImportError:
    orjson = None  # type: ignore[assignment]

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
ROLE_DTYPE = np.dtype("<u2")
MOST_SYSTEM_PROMPTS = 4096
JSON_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}


class RowError(ValueError):
    """What is wrong with a line, without its place."""


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """How a line is read.

    Attributes:
        question_key: key of the prompt.
        answer_key: key of the response.
        system_key: key of the system prompt, if rows have one; a null there leaves the message out.
        special_in_text: what becomes of special strings in a row's own text: `keep` (they are encoded as special
            tokens), `text` (as ordinary text), `error` (the line is bad).
    """

    question_key: str
    answer_key: str
    system_key: str | None = None
    special_in_text: str = "keep"


@dataclass(frozen=True)
class Chunk:
    """Whole lines of a file: bytes `start .. stop`, the first of them line `first_line` (counting from 1)."""

    path: str
    first_line: int
    start: int
    stop: int


@dataclass(frozen=True)
class EncodedChunk:
    """What a chunk became.

    Attributes:
        chunk: where it came from.
        tokens: ids of all rows back to back, in the element type of the token file.
        roles: role of each token, uint16.
        sizes: tokens of each row, int32.
        tokens_per_role: int64 [3].
        bad_lines: (line number, what is wrong).
        forgeable: numbers of the lines whose own text has message markers or end tokens that became special tokens.
    """

    chunk: Chunk
    tokens: Array
    roles: Array
    sizes: Array
    tokens_per_role: Array
    bad_lines: list[tuple[int, str]]
    forgeable: list[int]


class RowEncoder:
    """Encodes the lines of chunks: the messages system, question, answer of each row, each tokenized apart."""

    def __init__(self, tokenizer: Tokenizer, row_format: RowFormat) -> None:
        self.tokenizer = tokenizer
        self._format = row_format
        keys = {
            Role.SYSTEM: row_format.system_key,
            Role.PROMPTER: row_format.question_key,
            Role.ASSISTANT: row_format.answer_key,
        }
        self._keys = [(role, key) for role, key in keys.items() if key is not None]
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._markers = [np.array(tokenizer.encode(text), np.int32) for text in (MESSAGE_START, MESSAGE_END + "\n")]
        ends = [name for name, i in tokenizer.special_tokens.items() if i in (tokenizer.eos_id, tokenizer.eod_id)]
        self._forging = re.compile("|".join(map(re.escape, [MESSAGE_START, MESSAGE_END, *ends])))
        self._system_prompts: dict[str, Array] = {}

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """Read and encode the lines of `chunk`; bad ones are listed and left out."""
        messages: list[tuple[Role, str]] = []
        messages_of_rows: list[int] = []
        bad_lines: list[tuple[int, str]] = []
        numbers: list[int] = []
        for number, line in enumerate(_lines(chunk), chunk.first_line):
            try:
                row = self.messages(line)
            except RowError as error:
                bad_lines.append((number, str(error)))
                continue
            messages += row
            messages_of_rows.append(len(row))
            numbers.append(number)
        arrays = self._encode_messages(messages)
        sizes = np.fromiter(map(len, arrays), np.int32, len(arrays))
        roles = np.fromiter((role for role, _ in messages), ROLE_DTYPE, len(messages))
        bounds = np.cumsum([0, *messages_of_rows])
        return EncodedChunk(
            chunk,
            np.concatenate(arrays).astype(self._dtype) if arrays else np.empty(0, self._dtype),
            np.repeat(roles, sizes),
            np.add.reduceat(sizes, bounds[:-1], dtype=np.int32) if arrays else np.empty(0, np.int32),
            np.bincount(roles, weights=sizes, minlength=len(Role)).astype(np.int64),
            bad_lines,
            self._forgeable(messages, bounds, numbers),
        )

    def _forgeable(self, messages: Sequence[tuple[Role, str]], bounds: Array, numbers: Sequence[int]) -> list[int]:
        """Line numbers of rows whose own text becomes control tokens; `bounds` says which messages a row has."""
        if self._format.special_in_text != "keep":
            return []
        texts = [text for _, text in messages]
        if not self._forging.search("\n".join(texts)):
            return []
        found = np.array([bool(self._forging.search(text)) for text in texts])
        return [
            number
            for number, start, end in zip(numbers, bounds[:-1], bounds[1:], strict=True)
            if found[start:end].any()
        ]

    def messages(self, line: bytes) -> list[tuple[Role, str]]:
        """The messages of one line.

        Raises:
            RowError: the line is bad.
        """
        row = _parse(line, [key for _, key in self._keys])
        messages = []
        for role, key in self._keys:
            if key not in row:
                raise RowError(f"key {key!r} is missing")
            text = row[key]
            if text is None and role is Role.SYSTEM:
                continue
            if not isinstance(text, str):
                raise RowError(f"the value of key {key!r} is {JSON_KINDS.get(type(text), 'a number')}, not a string")
            if self._format.special_in_text == "error":
                self._refuse_special(key, text)
            messages.append((role, text))
        return messages

    def _refuse_special(self, key: str, text: str) -> None:
        found = self.tokenizer.special_strings_in(text) or self._forging.findall(text)
        if found:
            raise RowError(f"the value of key {key!r} has the special string {found[0]!r} (--special_in_text error)")

    def _encode_messages(self, messages: Sequence[tuple[Role, str]]) -> list[Array]:
        """Ids of each message, int32. System prompts are few and repeat: their ids are kept."""
        known = self._system_prompts
        new = [(role, text) for role, text in messages if role is not Role.SYSTEM or text not in known]
        encoded = dict(zip(new, self._encode_new(new), strict=True))
        for (role, text), ids in encoded.items():
            if role is Role.SYSTEM and len(known) < MOST_SYSTEM_PROMPTS:
                known[text] = ids.copy()
        return [encoded[message] if message in encoded else known[message[1]] for message in messages]

    def _encode_new(self, messages: Sequence[tuple[Role, str]]) -> list[Array]:
        if self._format.special_in_text != "text":
            return self.tokenizer.encode_arrays([render_message(role, text) for role, text in messages])
        start, end = self._markers
        bodies = [render_body(role, text) for role, text in messages]
        return [np.concatenate([start, ids, end]) for ids in self.tokenizer.encode_arrays(bodies, special=False)]


def _lines(chunk: Chunk) -> list[bytes]:
    """The lines of a chunk without their line feeds; only a line feed ends a line."""
    with open(chunk.path, "rb") as file:
        file.seek(chunk.start)
        content = file.read(chunk.stop - chunk.start)
    if chunk.start == 0:
        content = content.removeprefix(BYTE_ORDER_MARK)
    return content.removesuffix(b"\n").split(b"\n")


def _parse(line: bytes, keys: Sequence[str]) -> dict[str, Any]:
    """The object of a line. What the fast parser refuses, the standard one judges: it says more and takes NaN."""
    row = _parse_fast(line)
    if row is None:
        row = _parse_slowly(line, keys)
    if not isinstance(row, dict):
        raise RowError(f"not a JSON object but {JSON_KINDS.get(type(row), 'a number')}")
    return row


def _parse_fast(line: bytes) -> Any:
    """What orjson reads, None where it is missing or refuses."""
    try:
        return orjson.loads(line) if orjson else None
    except ValueError:
        return None


def _parse_slowly(line: bytes, keys: Sequence[str]) -> Any:
    if not line.strip():
        raise RowError("blank line")
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowError(f"not valid UTF-8 at byte {error.start} of the line") from error
    except (ValueError, RecursionError) as error:
        raise RowError(f"not JSON: {error}") from error
    for key in keys if isinstance(row, dict) else ():
        text = row.get(key)
        if isinstance(text, str) and any("\ud800" <= character <= "\udfff" for character in text):
            raise RowError(f"the value of key {key!r} has a lone surrogate, which no UTF-8 text can hold")
    return row
