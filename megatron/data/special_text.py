"""Special strings in the text of rows: those that nobody meant can end a document or forge a turn."""

import re
from collections.abc import Iterable, Sequence

from megatron.data.chunks import Chunk, RowError
from megatron.tokenizer import Tokenizer

TREATMENTS = ("keep", "text", "error")


class SpecialText:
    """What becomes of special strings in a row's own text.

    Args:
        tokenizer: what knows the special strings.
        treatment: `keep` (they are encoded as special tokens), `text` (as ordinary text), `error` (the row is bad).
        forging: those whose tokens say how the text is divided, so that text that has them is divided by itself.
    """

    def __init__(self, tokenizer: Tokenizer, treatment: str, forging: Iterable[str]) -> None:
        assert treatment in TREATMENTS
        self.treatment = treatment
        self._tokenizer = tokenizer
        self._forging = re.compile("|".join(map(re.escape, forging)) or "(?!)")

    def check(self, where: str, text: str) -> None:
        """Raise `RowError` if the text has a special string that it is not to have; `where` says which text it is."""
        if self.treatment == "error":
            found = self._tokenizer.special_strings_in(text) or self._forging.findall(text)
            if found:
                raise RowError(f"{where} has the special string {found[0]!r} (--special_in_text error)")

    def forgeable(self, chunk: Chunk, numbers: Sequence[int], rows: Sequence[Sequence[str]]) -> list[str]:
        """Places of the rows in whose texts forging strings become special tokens."""
        if self.treatment != "keep" or not self._forging.search("\n".join(text for row in rows for text in row)):
            return []
        return [
            chunk.place(number)
            for number, row in zip(numbers, rows, strict=True)
            if any(map(self._forging.search, row))
        ]


def ends_of_text(tokenizer: Tokenizer) -> list[str]:
    """The special strings that end a sequence or a document."""
    return [name for name, i in tokenizer.special_tokens.items() if i in (tokenizer.eos_id, tokenizer.eod_id)]
