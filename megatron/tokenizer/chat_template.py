"""Chat templates: conversations as text in a form of the user's own, written in Jinja as `transformers` takes it.

A template is rendered in a sandbox: it reaches no files, no modules and nothing of Python's own insides.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from megatron.tokenizer.base import Tokenizer
from megatron.tokenizer.chat import CHAT_ROLES, MESSAGE_END, MESSAGE_START, Message, RenderedChat, Role

MARKS = "\U0010fffe\U0010ffff"
"""Noncharacters, which no text has: where a `{% generation %}` block begins and ends."""
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
PROBE = [("user", "the question"), ("assistant", "the answer")]


class ChatTemplateError(ValueError):
    """A template cannot be read, or cannot take a conversation."""


class _Generation(Extension):
    """`{% generation %}`: what the assistant generates, put between `MARKS`."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return f"{MARKS[0]}{caller()}{MARKS[1]}"


class _Names(Namespace):
    """Jinja's `namespace`, without the names by which Python finds the insides of an object."""

    def __init__(self, *tables: Any, **names: Any) -> None:
        super().__init__()
        for name, value in dict(*tables, **names).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace has no {name!r}: it begins with an underscore")
        super().__setitem__(name, value)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _compiled(source: str) -> jinja2.Template:
    """The template, with what `transformers` gives templates.

    Raises:
        ChatTemplateError: it is not one.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "namespace": _Names,
    }
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ChatTemplateError(f"line {error.lineno}: {error.message}") from error


def read_chat_template(path: Path) -> str:
    """The template in a file: of Jinja, or a tokenizer_config.json with the key chat_template.

    Raises:
        OSError: there is no such file.
        ChatTemplateError: it holds no template.
    """
    try:
        source = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            source = json.loads(source)["chat_template"]
            if isinstance(source, list):
                source = {one["name"]: one["template"] for one in source}["default"]
            if not isinstance(source, str):
                raise TypeError("it is not a string")
        _compiled(source)
    except ChatTemplateError as error:
        raise ChatTemplateError(f"{path}, {error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ChatTemplateError(f"{path} has no chat template: {error}") from error
    return source


def named_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """The special strings `bos_token`, `eos_token` and `pad_token` of templates and exports, as far as there are.

    Where conversations have our own form, `eos_token` is the end of a turn.
    """
    names = {token_id: name for name, token_id in tokenizer.special_tokens.items()}
    ends_turn = tokenizer.chat_template is None and MESSAGE_END in tokenizer.special_tokens
    ids = {
        "bos_token": tokenizer.bos_id,
        "eos_token": tokenizer.special_tokens[MESSAGE_END] if ends_turn else tokenizer.eos_id,
        "pad_token": tokenizer.pad_id,
    }
    return {key: names[token_id] for key, token_id in ids.items() if token_id in names}


class ChatTemplate:
    """A template of the user's; `tokens` are its variables, such as `named_tokens`.

    Raises:
        ChatTemplateError: `source` is no template.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        self.source, self._tokens = source, dict(tokens)
        self._template = _compiled(source)

    def __reduce__(self) -> tuple[Any, ...]:
        """To another process as what it was made of: compiled code does not travel."""
        return type(self), (self.source, self._tokens)

    def render(self, messages: Sequence[Message], learned: Collection[int]) -> RenderedChat:
        """A conversation; of the assistant's messages, those with the numbers `learned` are learned.

        Where the template has `{% generation %}` blocks, what stands in them is learned. Else it is what a message adds
        to the conversation before it, opened for an answer (`add_generation_prompt`).

        Raises:
            ChatTemplateError: the template refuses the conversation, or the turns cannot be found in what it renders.
        """
        chat = [{"role": speaker, "content": content} for speaker, content in messages]
        text, generated = self._text(chat)
        systems = [number for number, (speaker, _) in enumerate(messages) if CHAT_ROLES[speaker] is Role.SYSTEM]
        turns = [number for number, (speaker, _) in enumerate(messages) if CHAT_ROLES[speaker] is Role.ASSISTANT]
        runs = [
            (Role.SYSTEM, start, stop)
            for number in systems
            if (start := self._reach(text, chat[:number])) is not None
            and (stop := self._reach(text, chat[: number + 1])) is not None
        ]
        if GENERATION.search(self.source):
            spans = _of_turns(generated, turns, learned)
        else:
            spans = [self._turn(text, chat, number) for number in turns if number in learned]
        return RenderedChat(text, [*runs, *((Role.ASSISTANT, start, stop) for start, stop in spans)])

    def _turn(self, text: str, chat: Sequence[dict[str, str]], number: int) -> tuple[int, int]:
        """Where the turn of message `number` begins and ends in `text`, the whole conversation."""
        start = self._reach(text, chat[:number], add_generation_prompt=True)
        stop = self._reach(text, chat[: number + 1])
        if start is None or stop is None or start > stop:
            raise ChatTemplateError(
                f"message {number + 1} cannot be found in what the chat template renders, which writes a conversation "
                "otherwise when it ends there; mark what is learned by {% generation %}, or use --train_on last"
            )
        return start, stop

    def _reach(self, text: str, chat: Sequence[dict[str, str]], **options: bool) -> int | None:
        """How far into `text` its beginning `chat` reaches; None if that is rendered as something else."""
        try:
            head = self._text(chat, **options)[0] if chat or options else ""
        except ChatTemplateError:
            return None
        return len(head) if text.startswith(head) else None

    def _text(self, chat: Sequence[dict[str, str]], **options: bool) -> tuple[str, list[tuple[int, int]]]:
        """What `chat` is rendered to, and the places of the `{% generation %}` blocks in it."""
        variables = {"tools": None, "documents": None, "add_generation_prompt": False, **self._tokens, **options}
        try:
            return _without_marks(self._template.render(messages=chat, **variables))
        except Exception as error:  # a template can raise anything
            raise ChatTemplateError(f"the chat template fails: {str(error) or type(error).__name__}") from error


def _without_marks(marked: str) -> tuple[str, list[tuple[int, int]]]:
    text, spans, start = "", [], 0
    for piece in re.split(f"([{MARKS}])", marked):
        if piece == MARKS[0]:
            start = len(text)
        elif piece == MARKS[1]:
            spans.append((start, len(text)))
        else:
            text += piece
    return text, spans


def _of_turns(
    generated: Sequence[tuple[int, int]], turns: Sequence[int], learned: Collection[int]
) -> Sequence[tuple[int, int]]:
    """Those of the blocks `generated` that belong to the `learned` ones of the assistant's `turns`."""
    if not generated:
        raise ChatTemplateError("the chat template has {% generation %} blocks, but writes none of this conversation")
    if set(turns) <= set(learned):
        return generated
    if len(generated) != len(turns):
        raise ChatTemplateError(
            f"the chat template writes {len(generated)} {{% generation %}} blocks for {len(turns)} turns of the "
            "assistant, so that one turn cannot be picked; use --train_on all"
        )
    return [span for number, span in zip(turns, generated, strict=True) if number in learned]


def missing_markers(tokenizer: Tokenizer) -> list[str]:
    """What should be a special token where conversations are written as `tokenizer` says, but is none, in words."""
    if tokenizer.chat_template is None:
        return [marker for marker in (MESSAGE_START, MESSAGE_END) if marker not in tokenizer.special_tokens]
    return [] if turn_end(tokenizer) else ["what the chat template writes at the end of an answer"]


def turn_end(tokenizer: Tokenizer) -> str | None:
    """The special string that ends the assistant's turn in the template of `tokenizer`, None if there is none."""
    if tokenizer.chat_template is None:
        return MESSAGE_END if MESSAGE_END in tokenizer.special_tokens else None
    template = ChatTemplate(tokenizer.chat_template, named_tokens(tokenizer))
    try:
        text = template.render(PROBE, [1]).text
    except ChatTemplateError:
        return None
    answer = PROBE[1][1]
    return next(iter(tokenizer.special_strings_in(text[text.rfind(answer) :])), None)
