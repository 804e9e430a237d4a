"""How a conversation is written as text: in training, and in the chat template that goes with an exported model.

A message is `<|im_start|>{name}\\n{text}<|im_end|>\\n`; the names are those of `MESSAGE_NAMES`.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

MESSAGE_START = "<|im_start|>"
MESSAGE_END = "<|im_end|>"


class Role(IntEnum):
    """Who speaks a token, as the role files store it; of a conversation, the assistant speaks only what is learned."""

    SYSTEM = 0
    PROMPTER = 1
    ASSISTANT = 2


MESSAGE_NAMES = {Role.SYSTEM: "system", Role.PROMPTER: "question", Role.ASSISTANT: "answer"}
"""Role -> the name that opens its messages."""
CHAT_ROLES = {
    "system": Role.SYSTEM,
    "user": Role.PROMPTER,
    "assistant": Role.ASSISTANT,
    "tool": Role.PROMPTER,
}
"""Role in a list of chat messages, as `transformers` takes it -> role here. What a tool returns is a prompt."""
Message = tuple[str, str]
"""Who speaks, a key of `CHAT_ROLES`, and what."""


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as text.

    Attributes:
        text: all of it.
        runs: (role, start, stop) of the characters that are the system's, and of those that are learned, which are the
            assistant's; all others are the prompter's.
    """

    text: str
    runs: list[tuple[Role, int, int]]


def render_body(role: Role, text: str) -> str:
    """What stands between the markers of a message."""
    return f"{MESSAGE_NAMES[role]}\n{text}"


def render_message(role: Role, text: str) -> str:
    """One message, markers included."""
    return f"{MESSAGE_START}{render_body(role, text)}{MESSAGE_END}\n"


def render_messages(messages: Iterable[tuple[Role, str]]) -> str:
    """A conversation."""
    return "".join(render_message(role, text) for role, text in messages)


def render_chat(messages: Sequence[Message], learned: Collection[int]) -> RenderedChat:
    """A conversation; of the messages with the numbers `learned`, the text and the end of the turn are learned.

    What opens them is not: that is how a model is asked to answer.
    """
    header = len(f"{MESSAGE_START}{render_body(Role.ASSISTANT, '')}")
    text = ""
    runs: list[tuple[Role, int, int]] = []
    for number, (speaker, content) in enumerate(messages):
        role, start = CHAT_ROLES[speaker], len(text)
        text += render_message(role, content)
        if role is Role.SYSTEM:
            runs.append((role, start, len(text)))
        elif number in learned:
            runs.append((Role.ASSISTANT, start + header, len(text)))
    return RenderedChat(text, runs)


CHAT_TEMPLATE = (
    "{%- set names = {"
    + ", ".join(f"'{chat_role}': '{MESSAGE_NAMES[role]}'" for chat_role, role in CHAT_ROLES.items())
    + "} -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] not in names -%}"
    "{{- raise_exception('unknown role ' ~ message['role'] ~ '; known: ' ~ names | join(', ')) -}}"
    "{%- endif -%}"
    f"{{{{- '{MESSAGE_START}' ~ names[message['role']] ~ '\\n' ~ message['content'] ~ '{MESSAGE_END}\\n' -}}}}"
    "{%- endfor -%}"
    f"{{%- if add_generation_prompt -%}}{{{{- '{MESSAGE_START}{MESSAGE_NAMES[Role.ASSISTANT]}\\n' -}}}}{{%- endif -%}}"
)
"""Jinja template that renders chat messages as `render_messages` does; a generation prompt opens an answer."""
