"""Some of the data, token by token."""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from megatron.config import UsageError
from megatron.inspection.views import Stretch, View
from megatron.inspection.vocabulary import Vocabulary
from megatron.tokenizer.chat import Role

CONTINUED, SPACE, LINE_BREAK = "·", "␣", "↵"
VISIBLE = {"\n": LINE_BREAK, "\t": "⇥", "\r": "␍"}
HIDDEN = {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"}
"""Unicode categories that show nothing, or that change how what follows is shown, such as terminals' escape."""


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token, with what training makes of it.

    Attributes:
        position: in its row, document or sample.
        token_id: what the file has.
        text: what it adds; "" for a token that continues a character.
        weight: of the loss of predicting it.
        is_special: it stands for a special string.
        is_known: the vocabulary has it.
    """

    position: int
    token_id: int
    text: str
    weight: float
    is_special: bool
    is_known: bool

    @property
    def visible(self) -> str:
        """The text, with what cannot be seen made visible; a token that continues a character is a dot."""
        text = self.text if self.text.strip(" ") else self.text.replace(" ", SPACE)
        return visible(text) or CONTINUED


def visible(text: str) -> str:
    """The text without control characters, which could do something to a terminal: they are named instead."""
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    is_hidden = unicodedata.category(character) in HIDDEN
    return VISIBLE.get(character, f"<U+{ord(character):04X}>" if is_hidden else character)


@dataclass(frozen=True, kw_only=True)
class Part:
    """Neighbouring tokens of a kind.

    Attributes:
        role: what the file has; None for plain text.
        document: the number of the row or document.
        is_used: they are not cut off.
    """

    role: int | None
    document: int
    is_used: bool
    tokens: Sequence[Token]

    @property
    def name(self) -> str:
        """Who speaks, or which document it is of."""
        if self.role is None:
            return f"document {self.document:,}"
        return role_name(self.role)

    @property
    def fate(self) -> str:
        """What training does with the tokens."""
        return f"weight {max(token.weight for token in self.tokens):g}" if self.is_used else "cut off"


@dataclass(frozen=True)
class Gap:
    """Tokens that are not shown."""

    left_out: int


@dataclass(frozen=True)
class Sample:
    """What is shown as one: its title, and its parts in their order."""

    title: str
    parts: Sequence[Part | Gap]


def role_name(role: int) -> str:
    """What a role is called; one that is none has its number."""
    return Role(role).name.lower() if role in [*Role] else f"role {role}"


def choose(view: View, count: int, numbers: Sequence[int]) -> list[int]:
    """`numbers` if there are any, else `count` of them, evenly over the data.

    Raises:
        UsageError: a number that is not there.
    """
    for number in numbers:
        if number >= len(view):
            raise UsageError(f"--rows {number}: there are {len(view):,} {view.unit}s, counted from 0")
    return list(numbers) or np.unique(np.linspace(0, len(view) - 1, min(count, len(view))).astype(np.int64)).tolist()


def read_sample(view: View, number: int, vocabulary: Vocabulary, most_tokens: int) -> Sample:
    """What has this number, of which at most `most_tokens` are shown: the first and the last."""
    stretch = view[number]
    length = len(stretch.tokens)
    head = length if length <= most_tokens else most_tokens - most_tokens // 2
    tail = max(length - most_tokens // 2, head)
    ends = [range(head), range(tail, length)]
    gap = [Gap(tail - head)] if tail > head else []
    before, behind = (list(_parts(stretch, _tokens(stretch, end, vocabulary))) for end in ends)
    title = f"{view.unit} {number:,}: {length:,} tokens"
    if stretch.roles is not None:
        supervised = int((stretch.roles[1 : stretch.used] == Role.ASSISTANT).sum())
        title += f", {supervised:,} of them supervised"
    return Sample(title, [*before, *gap, *behind])


def _tokens(stretch: Stretch, positions: range, vocabulary: Vocabulary) -> Iterator[Token]:
    ids = stretch.tokens[positions.start : positions.stop].tolist()
    for position, token_id, text in zip(positions, ids, vocabulary.texts(ids), strict=True):
        yield Token(
            position=position,
            token_id=token_id,
            text=text,
            weight=float(stretch.weights[position - 1]) if 0 < position < stretch.used else 0.0,
            is_special=token_id in vocabulary.special,
            is_known=vocabulary.holds(token_id),
        )


def _parts(stretch: Stretch, tokens: Iterator[Token]) -> Iterator[Part]:
    """Neighbours of a kind together."""

    def kind(token: Token) -> tuple[int | None, int, bool, float]:
        position = token.position
        role = None if stretch.roles is None else int(stretch.roles[position])
        # The very first token is not predicted: it goes with the second.
        weight = float(stretch.weights[max(position - 1, 0)]) if len(stretch.weights) else 0.0
        return role, int(stretch.documents[position]), position < stretch.used, weight

    for (role, document, is_used, _), group in groupby(tokens, kind):
        yield Part(role=role, document=document, is_used=is_used, tokens=list(group))
