"""From rows with a question and an answer to token ids and roles."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron.data.chunks import Chunk, Row, read_rows, string_of
from megatron.data.indexed import Array
from megatron.data.roles import ROLE_DTYPE, EncodedRows, RoleEncoder
from megatron.tokenizer import Tokenizer
from megatron.tokenizer.chat import MESSAGE_END, MESSAGE_START, Role, render_body, render_message

MOST_SYSTEM_PROMPTS = 4096


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """How a line is read.

    Attributes:
        question_key: key of the prompt.
        answer_key: key of the response.
        system_key: key of the system prompt, if rows have one; a null there leaves the message out.
        messages_key: key of a list of messages, which stands in the place of the three.
        train_on: which of the assistant's turns are learned: `all` or the `last`.
        special_in_text: what becomes of special strings in a row's own text; see `SpecialText`.
    """

    question_key: str | None = None
    answer_key: str | None = None
    system_key: str | None = None
    messages_key: str | None = None
    train_on: str = "all"
    special_in_text: str = "keep"

    @cached_property
    def keys(self) -> dict[Role, str]:
        """Key of each message that a row without a list of them has, in their order."""
        keys = {Role.SYSTEM: self.system_key, Role.PROMPTER: self.question_key, Role.ASSISTANT: self.answer_key}
        return {role: key for role, key in keys.items() if key is not None}

    def messages(self, row: Row) -> list[tuple[Role, str]]:
        """The texts under `keys`.

        Raises:
            RowError: one is missing, or no string.
        """
        return [
            (role, string_of(row, key))
            for role, key in self.keys.items()
            if not (role is Role.SYSTEM and key in row and row[key] is None)
        ]


class RowEncoder(RoleEncoder):
    """Encodes rows: the messages system, question, answer of each, each tokenized apart; see `Encoder`."""

    def __init__(self, tokenizer: Tokenizer, row_format: RowFormat) -> None:
        super().__init__(tokenizer, row_format.special_in_text, [MESSAGE_START, MESSAGE_END])
        self._format = row_format
        self.keys = list(row_format.keys.values())
        self._markers = [np.array(tokenizer.encode(text), np.int32) for text in (MESSAGE_START, MESSAGE_END + "\n")]
        self._system_prompts: dict[str, Array] = {}

    def encode(self, chunk: Chunk) -> EncodedRows:
        """Encode the rows of `chunk`; bad ones are listed and left out."""
        numbers, rows, bad_lines = read_rows(chunk, self.keys, self.messages)
        messages = [message for row in rows for message in row]
        arrays = self._encode_messages(messages)
        sizes = np.fromiter(map(len, arrays), np.int32, len(arrays))
        roles = np.fromiter((role for role, _ in messages), ROLE_DTYPE, len(messages))
        starts = np.cumsum([0, *map(len, rows)])[:-1]
        return self.encoded(
            chunk,
            np.concatenate([np.empty(0, np.int32), *arrays]),
            np.repeat(roles, sizes),
            np.add.reduceat(sizes, starts, dtype=np.int32) if arrays else np.empty(0, np.int32),
            bad_lines,
            self.special.forgeable(chunk, numbers, [[text for _, text in row] for row in rows]),
        )

    def messages(self, row: Row) -> list[tuple[Role, str]]:
        """The messages of one row.

        Raises:
            RowError: the row is bad.
        """
        messages = self._format.messages(row)
        for role, text in messages:
            self.special.check(f"the value of key {self._format.keys[role]!r}", text)
        return messages

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
        if self.special.treatment != "text":
            return self.tokenizer.encode_arrays([render_message(role, text) for role, text in messages])
        start, end = self._markers
        bodies = [render_body(role, text) for role, text in messages]
        return [np.concatenate([start, ids, end]) for ids in self.tokenizer.encode_arrays(bodies, special=False)]
