"""What is known of the ids: with the tokenizer their text, without it what the description beside the data says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from megatron.data.indexed import tokenizer_file
from megatron.tokenizer import Tokenizer, describe, difference, read_description

INCOMPLETE = "\ufffd"
LONGEST_CHARACTER = 4
"""Tokens that a character takes at most: its bytes in UTF-8."""
NUMBERS = ("vocab_size", "bos_id", "eod_id")


@dataclass(frozen=True)
class Vocabulary:
    """The ids of some data.

    Attributes:
        description: as `read_description` gives it, empty where nothing is known.
        tokenizer: turns ids into text, if there is one.
        notes: lines to tell the user.
    """

    description: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Tokenizer | None = None
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int | None:
        """Number of ids."""
        return self.description.get("vocab_size")

    @property
    def bos_id(self) -> int | None:
        """Beginning of a sequence."""
        return self.description.get("bos_id")

    @property
    def eod_id(self) -> int | None:
        """End of a document."""
        return self.description.get("eod_id")

    @cached_property
    def special(self) -> dict[int, str]:
        """Id -> special string."""
        return {token_id: name for name, token_id in self.description.get("special_tokens", {}).items()}

    def holds(self, token_id: int) -> bool:
        """Whether the id is one of the vocabulary, as far as that is known."""
        return token_id >= 0 and (self.size is None or token_id < self.size)

    def texts(self, ids: Sequence[int]) -> list[str]:
        """What each id adds to the text.

        A character of several tokens is the first one's; the others have "". Ids are numbers if there is no tokenizer,
        and numbers in brackets if they are not in the vocabulary.
        """
        decode = _Decoder(self.tokenizer) if self.tokenizer else None
        texts: list[str] = []
        while len(texts) < len(ids):
            place = len(texts)
            if decode and self._is_ordinary(ids[place]):
                text, count = self._character(decode, ids[place : place + LONGEST_CHARACTER])
                texts += [text, *[""] * (count - 1)]
            else:
                number = f"{ids[place]}" if self.holds(ids[place]) else f"<{ids[place]}>"
                texts.append(self.special.get(ids[place], number))
        return texts

    def _is_ordinary(self, token_id: int) -> bool:
        return self.holds(token_id) and token_id not in self.special

    def _character(self, decode: "_Decoder", ids: Sequence[int]) -> tuple[str, int]:
        """Text of the first of `ids`, and of how many more that it takes to be whole characters."""
        for count in range(1, len(ids) + 1):
            if not self._is_ordinary(ids[count - 1]):
                break
            text = decode(tuple(ids[:count]))
            if not text.endswith(INCOMPLETE):
                return text, count
        return decode((ids[0],)), 1


class _Decoder:
    """Text of ids in the middle of a text: at its beginning, tokenizers take off a leading space."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before = tokenizer.encode_plain("a")
        self._text_before = tokenizer.decode(self._before)
        self._known: dict[tuple[int, ...], str] = {}

    def __call__(self, ids: tuple[int, ...]) -> str:
        if ids not in self._known:
            text = self._tokenizer.decode([*self._before, *ids])
            self._known[ids] = text.removeprefix(self._text_before)
        return self._known[ids]


def find_vocabulary(prefix: str, tokenizer: Tokenizer | None) -> Vocabulary:
    """The vocabulary of `tokenizer`, else that described beside the data of `prefix`.

    Raises:
        ValueError: the description is damaged.
    """
    file = tokenizer_file(prefix)
    stored = read_description(file.parent, file.name) if file.is_file() else None
    if tokenizer:
        changed = difference(stored, tokenizer) if stored else None
        notes = (f"warning: the tokenizer is not that of the data: {changed}",) if changed else ()
        return Vocabulary(describe(tokenizer), tokenizer, notes)
    if stored is None:
        return Vocabulary(notes=(f"neither --tokenizer_type nor {file} says what the ids are: none is checked",))
    special = stored.get("special_tokens")
    if not isinstance(special, dict) or any(
        not isinstance(number, int | None) for number in (*special.values(), *map(stored.get, NUMBERS))
    ):
        raise ValueError(f"{file} does not describe a tokenizer: not all of its ids are numbers")
    return Vocabulary(stored, notes=(f"without --tokenizer_type ids are shown as numbers; {file} says whose they are",))
