"""Special strings: how they are numbered, and where they cut a text."""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain, pairwise

import numpy as np

from megatron.config import UsageError
from megatron.tokenizer.base import Array

WHITESPACE = (
    "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
"""What Unicode calls white space."""
NONCHARACTERS = "".join(map(chr, range(0xFDD0, 0xFDF0)))
"""What Unicode keeps for a program's own use: no text has them."""

Encode = Callable[[list[str]], Iterable[Array]]
"""What encodes pieces of ordinary text."""


def register(
    usual: Iterable[str], explicit: Iterable[str], *, new_tokens: bool, known: Callable[[str], int | None], size: int
) -> dict[str, int]:
    """Special string -> id, in the order of registration.

    Args:
        usual: names that every tokenizer of the kind gets; without `new_tokens`, only those that have an id.
        explicit: names that the user asks for, registered behind them.
        new_tokens: whether `usual` names may be added.
        known: id of a name in the vocabulary, None where it is not there; a name keeps its id.
        size: the first id that is free.

    Raises:
        UsageError: an empty name among `explicit`.
    """
    explicit = list(explicit)
    if "" in explicit:
        raise UsageError(f"--vocab_extra_ids_list {','.join(explicit)!r} has an empty name: remove the extra comma")
    special: dict[str, int] = {}
    for name in [*(name for name in usual if new_tokens or known(name) is not None), *explicit]:
        if name not in special:
            own = known(name)
            special[name] = size if own is None else own
            size += own is None
    return special


def extra_ids(count: int) -> list[str]:
    """The names that `--vocab_extra_ids` adds."""
    return [f"<extra_id_{index}>" for index in range(count)]


class SpecialStrings:
    """Text is cut at its leftmost special string (where two start at one place, the one registered first), and so on.

    Attributes:
        ids: special string -> id, in the order of registration.
        names: id -> special string.
    """

    def __init__(
        self,
        ids: Mapping[str, int],
        *,
        take_spaces_before: Collection[str] = (),
        take_spaces_behind: Collection[str] = (),
        whole_words: Collection[str] = (),
    ) -> None:
        """`take_spaces_*`: names that swallow white space on that side; `whole_words`: those not found inside words."""
        self.ids = dict(ids)
        self.names = {token_id: name for name, token_id in self.ids.items()}
        self._firsts = "".join(dict.fromkeys(name[:1] for name in self.ids))
        self._hidden = re.compile(f"[{NONCHARACTERS[: len(self._firsts)]}]" if self._firsts else "(?!)")
        self._arrays = {name: np.array([token_id], np.int32) for name, token_id in self.ids.items()}
        self._before, self._behind = frozenset(take_spaces_before), frozenset(take_spaces_behind)
        patterns = (rf"(?<!\w){re.escape(n)}(?!\w)" if n in whole_words else re.escape(n) for n in self.ids)
        # An alternation tries its branches in order at each place, from left to right: exactly the rule.
        self._cut = re.compile("(" + ("|".join(patterns) or "(?!)") + ")")

    def find(self, text: str) -> list[str]:
        """The special strings in `text`, in order."""
        return self._cut.findall(text)

    def cut(self, text: str) -> list[str]:
        """Pieces of ordinary text, perhaps empty, at even places; special strings at odd ones."""
        parts = self._cut.split(text)
        if self._before or self._behind:
            for place in range(1, len(parts), 2):
                if parts[place] in self._before:
                    parts[place - 1] = parts[place - 1].rstrip(WHITESPACE)
                if parts[place] in self._behind:
                    parts[place + 1] = parts[place + 1].lstrip(WHITESPACE)
        return parts

    def encode(self, texts: Iterable[str], encode: Encode, encode_behind: Encode | None = None) -> list[Array]:
        """Ids of each text, int32: those of special strings, and of each piece of ordinary text encoded on its own.

        `encode` does it for pieces at the beginning of a text; `encode_behind`, where that is another way, for those
        behind a special string.
        """
        cuts = [self.cut(text) for text in texts]
        heads, rest = _pieces(cuts, encode, encode_behind or encode)
        runs = [
            [
                self._arrays[part] if place % 2 else (rest if place else heads)[part]
                for place, part in enumerate(parts)
                if part
            ]
            for parts in cuts
        ]
        # One concatenation for all texts, then a view for each, is several times faster than one a text.
        ends = np.cumsum([sum(map(len, run)) for run in runs]).tolist()
        flat = np.concatenate([np.empty(0, np.int32), *chain.from_iterable(runs)])
        return [flat[start:end] for start, end in pairwise([0, *ends])]

    def encode_offsets(self, texts: Iterable[str], encode: Encode, encode_behind: Encode | None = None) -> list[Array]:
        """As `encode`, but a token is a row of three, int32 [n, 3]: its id, and where in the text its own text begins
        and ends, in characters. So are those that `encode` and `encode_behind` return, counted in the piece.

        Special strings that `hide` hid are ordinary text; other texts have none of `NONCHARACTERS`.
        """
        texts = list(texts)
        cuts = [[(part, self._shown(part)) for part in self.cut(text)] for text in texts]
        heads, rest = _pieces([[shown for _, shown in parts] for parts in cuts], encode, encode_behind or encode)
        arrays = []
        for text, parts in zip(texts, cuts, strict=True):
            runs, begin = [np.empty((0, 3), np.int32)], 0
            for place, (part, shown) in enumerate(parts):
                begin = text.index(part, begin)  # behind white space that a special string swallowed
                if place % 2:
                    runs.append(np.array([[self.ids[part], begin, begin + len(part)]], np.int32))
                elif part:
                    runs.append((rest if place else heads)[shown] + np.array([0, begin, begin], np.int32))
                begin += len(part)
            arrays.append(np.concatenate(runs))
        return arrays

    def _shown(self, text: str) -> str:
        return self._hidden.sub(lambda match: self._firsts[NONCHARACTERS.index(match[0])], text)

    def hide(self, text: str) -> str:
        """`text`, as long as before, with its special strings made such that `encode_offsets` takes them as ordinary.

        Raises:
            ValueError: special strings begin with more different characters than there are to hide them.
        """
        if len(self._firsts) > len(NONCHARACTERS):
            raise ValueError(
                f"special strings begin with more than {len(NONCHARACTERS)} different characters, too many for "
                "--special_in_text text"
            )
        while self._cut.search(text):  # hiding one may uncover another that overlaps it
            text = self._cut.sub(lambda match: NONCHARACTERS[self._firsts.index(match[0][0])] + match[0][1:], text)
        return text

    def decode(
        self,
        ids: Iterable[int],
        decode: Callable[[list[int]], str],
        decode_behind: Callable[[list[int]], str] | None = None,
    ) -> str:
        """The text of `ids`; what lies between special ids is decoded on its own, as `encode` encodes it."""
        parts: list[str] = []
        run: list[int] = []
        for token_id in ids:
            if token_id in self.names:
                parts += [decode(run), self.names[token_id]]
                decode, run = decode_behind or decode, []
            else:
                run.append(int(token_id))
        return "".join([*parts, decode(run)])


def _pieces(
    cuts: Sequence[Sequence[str]], encode: Encode, encode_behind: Encode
) -> tuple[dict[str, Array], dict[str, Array]]:
    """What the first pieces of texts become, and the others.

    Texts share pieces, such as the newline behind a message: each is encoded once. Empty ones have no ids.
    """
    heads = _each_once((parts[0] for parts in cuts), encode)
    return heads, _each_once((piece for parts in cuts for piece in parts[2::2]), encode_behind)


def _each_once(pieces: Iterable[str], encode: Encode) -> dict[str, Array]:
    unique = list(dict.fromkeys(piece for piece in pieces if piece))
    return dict(zip(unique, encode(unique), strict=True)) if unique else {}


def placed(ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> Array:
    """Ids and where each token begins and ends, as rows of three, int32 [n, 3]."""
    return np.array([(i, begin, end) for i, (begin, end) in zip(ids, offsets, strict=True)], np.int32).reshape(-1, 3)


def fingerprint(pieces: Iterable[str], special_tokens: Mapping[str, int]) -> str:
    """Hexadecimal sha256 of all pieces, by id, and special tokens."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece.encode() + b"\0")
    digest.update(json.dumps(special_tokens).encode())
    return digest.hexdigest()
