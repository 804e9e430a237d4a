"""What every tokenizer can do."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


class Tokenizer(Protocol):
    """Text to ids and back.

    Attributes:
        tokenizer_type: the `--tokenizer_type` that it is of.
        vocab_size: number of ids, added tokens included.
        special_tokens: special string -> id, in the order of registration.
        bos_id: beginning of a sequence, if there is one; likewise `eos_id`.
        pad_id: what fills unused positions.
        eod_id: end of a document.
        chat_template: how a conversation is written, in Jinja; None for our own form, that of `chat`.
    """

    tokenizer_type: str
    vocab_size: int
    special_tokens: dict[str, int]
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    eod_id: int | None
    chat_template: str | None

    @property
    def fingerprint(self) -> str:
        """Hexadecimal sha256 of all pieces and special tokens."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special strings in it become their ids."""

    def encode_plain(self, text: str) -> list[int]:
        """Ids of `text`; special strings in it are ordinary text."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""

    def encode_arrays(self, texts: Sequence[str], *, special: bool = True) -> list[Array]:
        """Ids of each text, int32, the fastest way.

        Without `special`, special strings are ordinary text, and each text is taken as one that follows a special
        string, as the body of a message does; to most tokenizers that makes no difference.
        """

    def encode_offsets(self, texts: Sequence[str]) -> list[Array]:
        """Ids of each text and their places, int32 [n, 3]: the id as `encode` gives it, and where the token's own text
        begins and ends, in characters of the whole text; both are the same where a token has none of it.

        Special strings that `hide_special` hid are ordinary text.
        """

    def hide_special(self, text: str) -> str:
        """`text`, as long as before, with its special strings made such that `encode_offsets` takes them as ordinary.

        Raises:
            ValueError: special strings begin with more different characters than can be hidden.
        """

    def special_strings_in(self, text: str) -> list[str]:
        """The special strings that `encode` would find in `text`, in order."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special ids become their strings."""

    def save(self, folder: Path) -> None:
        """Write everything that `load_tokenizer` needs into `folder`."""
