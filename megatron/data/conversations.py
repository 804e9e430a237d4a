"""From conversations, in the form of ChatML or of a chat template, to token ids and roles."""

import re
from typing import Any

import numpy as np

from megatron.data.chunks import Chunk, Row, RowError, kind_of, read_rows, string_of
from megatron.data.indexed import Array
from megatron.data.preprocess import Encoder
from megatron.data.roles import ROLE_DTYPE, EncodedRows, RoleEncoder
from megatron.data.rows import RowEncoder, RowFormat
from megatron.tokenizer import Tokenizer
from megatron.tokenizer.chat import CHAT_ROLES, MESSAGE_END, MESSAGE_START, Message, RenderedChat, Role, render_chat
from megatron.tokenizer.chat_template import MARKS, ChatTemplate, ChatTemplateError, named_tokens
from megatron.tokenizer.special import NONCHARACTERS

FORMS = {"role": "content", "from": "value"}
"""Key of who speaks -> key of what: the form of chat interfaces, and ShareGPT's."""
SPEAKERS = {
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("user", "human", "prompter", "question"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "answer"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
"""Who speaks, in the words of a dataset -> in those of `CHAT_ROLES`."""
SPEAKER_OF = {Role.SYSTEM: "system", Role.PROMPTER: "user", Role.ASSISTANT: "assistant"}
LONGEST_SPEAKER = 40
"""Characters that a message shows of one that is not known."""
RESERVED = re.compile(f"[{NONCHARACTERS}{MARKS}]")


def messages_of(row: Row, key: str) -> list[Message]:
    """The list of messages under `key`.

    Raises:
        RowError: it is not there, not as it should be, or no message is the assistant's.
    """
    if key not in row:
        raise RowError(f"key {key!r} is missing")
    if not isinstance(row[key], list):
        raise RowError(f"the value of key {key!r} is {kind_of(row[key])}, not a list")
    messages = [_message(number, value) for number, value in enumerate(row[key], 1)]
    if not any(speaker == "assistant" for speaker, _ in messages):
        what = "no message is the assistant's" if messages else "the list is empty"
        raise RowError(f"there is nothing to learn under key {key!r}: {what}")
    return messages


def _message(number: int, value: Any) -> Message:
    if not isinstance(value, dict):
        raise RowError(f"message {number} is {kind_of(value)}, not an object")
    # In a table every message has the keys of all, with null for what it lacks.
    who = min((key for key in FORMS if key in value), key=lambda key: value[key] is None, default=None)
    if who is None:
        raise RowError(f"message {number} has neither of the keys {' and '.join(map(repr, FORMS))}")
    try:
        speaker, text = string_of(value, who), string_of(value, FORMS[who])
    except RowError as error:
        raise RowError(f"message {number}: {error}") from None
    if speaker not in SPEAKERS:
        shown = speaker[:LONGEST_SPEAKER]
        raise RowError(f"message {number}: {shown!r} under key {who!r} is none of {', '.join(SPEAKERS)}")
    if value.get("tool_calls"):
        raise RowError(f"message {number}: 'tool_calls' would be lost; write them into {FORMS[who]!r}")
    return SPEAKERS[speaker], text


class ConversationEncoder(RoleEncoder):
    """Encodes conversations, or questions and answers as such; see `Encoder`.

    They are written as the tokenizer's chat template says, or in our own form where it has none, and tokenized as a
    whole, as they are when the model is used. Which tokens are the assistant's is known by their places in the text.
    """

    def __init__(self, tokenizer: Tokenizer, row_format: RowFormat) -> None:
        template = tokenizer.chat_template
        markers = [MESSAGE_START, MESSAGE_END] if template is None else tokenizer.special_strings_in(template)
        super().__init__(tokenizer, row_format.special_in_text, markers)
        self._format = row_format
        self.keys = [row_format.messages_key] if row_format.messages_key else list(row_format.keys.values())
        self._render = render_chat if template is None else ChatTemplate(template, named_tokens(tokenizer)).render

    def encode(self, chunk: Chunk) -> EncodedRows:
        """Encode the rows of `chunk`; bad ones are listed and left out."""
        numbers, rows, bad_lines = read_rows(chunk, self.keys, self._rendered)
        arrays = self.tokenizer.encode_offsets([rendered.text for _, rendered in rows])
        roles = [roles_of(array, rendered) for array, (_, rendered) in zip(arrays, rows, strict=True)]
        return self.encoded(
            chunk,
            np.concatenate([np.empty(0, np.int32), *(array[:, 0] for array in arrays)]),
            np.concatenate([np.empty(0, ROLE_DTYPE), *roles]),
            np.fromiter(map(len, arrays), np.int32, len(arrays)),
            bad_lines,
            self.special.forgeable(chunk, numbers, [[text for _, text in messages] for messages, _ in rows]),
        )

    def _rendered(self, row: Row) -> tuple[list[Message], RenderedChat]:
        """The messages of a row, and what they are written as."""
        messages = self._messages(row)
        for number, (_, text) in enumerate(messages, 1):
            self.special.check(f"message {number}", text)
            if RESERVED.search(text):
                raise RowError(f"message {number} has a noncharacter, which Unicode keeps out of text")
        if self.special.treatment == "text":
            messages = [(speaker, self.tokenizer.hide_special(text)) for speaker, text in messages]
        turns = [number for number, (speaker, _) in enumerate(messages) if CHAT_ROLES[speaker] is Role.ASSISTANT]
        try:
            return messages, self._render(messages, turns[-1:] if self._format.train_on == "last" else turns)
        except ChatTemplateError as error:
            raise RowError(str(error)) from error

    def _messages(self, row: Row) -> list[Message]:
        if self._format.messages_key is not None:
            return messages_of(row, self._format.messages_key)
        return [(SPEAKER_OF[role], text) for role, text in self._format.messages(row)]


def roles_of(tokens: Array, rendered: RenderedChat) -> Array:
    """Role of each of the `tokens` of a conversation, rows of id, begin and end, as `encode_offsets` gives them.

    A token that reaches over a border is the assistant's if any of its text is: so does `transformers` mark what an
    assistant generates. One without text of its own, such as the space in front of a text, belongs to what follows.
    """
    begins, ends = tokens[:, 1], tokens[:, 2]
    roles = np.full(len(tokens), Role.PROMPTER, ROLE_DTYPE)
    for role, start, stop in sorted(rendered.runs):
        roles[(begins < stop) & ((begins >= start) | (ends > start))] = role
    return roles


def build_encoder(tokenizer: Tokenizer, row_format: RowFormat) -> Encoder:
    """What encodes rows of `row_format`.

    Questions and answers in our own form have the reference's roles, in which the markers of a message are of its role.
    """
    as_the_reference = row_format.messages_key is None and tokenizer.chat_template is None
    return (RowEncoder if as_the_reference else ConversationEncoder)(tokenizer, row_format)
