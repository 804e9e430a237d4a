"""What encoders of instruction data have in common: tokens, who speaks each, and what a run did with them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron.data.chunks import Chunk
from megatron.data.indexed import Array, token_dtype
from megatron.data.instruction import role_prefix, text_prefix
from megatron.data.preprocess import Encoded, Summary
from megatron.data.special_text import SpecialText, ends_of_text
from megatron.tokenizer import Tokenizer
from megatron.tokenizer.chat import Role

ROLE_DTYPE = np.dtype("<u2")


@dataclass(frozen=True, kw_only=True)
class EncodedRows(Encoded):
    """What a chunk of instruction rows became: ids of the tokens, and their roles.

    Attributes:
        tokens_per_role: int64 [3].
    """

    tokens_per_role: Array


@dataclass(kw_only=True)
class InstructionSummary(Summary):
    """What a run did with instruction rows.

    Attributes:
        tokens_per_role: of the tokens, int64 [3], by `Role`.
    """

    forging = "message markers or end tokens in their own text, which can forge a turn"
    tokens_per_role: list[int] = field(default_factory=lambda: [0] * len(Role))

    def add(self, encoded: Encoded) -> None:
        """Count a chunk in."""
        super().add(encoded)
        assert isinstance(encoded, EncodedRows)
        counts = encoded.tokens_per_role.tolist()
        self.tokens_per_role = [total + count for total, count in zip(self.tokens_per_role, counts, strict=True)]

    def tokens_in_words(self) -> str:
        """How many tokens there are, of each role, and which share of them is learned."""
        shares = ", ".join(f"{role.name.lower()} {self.tokens_per_role[role]:,}" for role in Role)
        learned = self.tokens_per_role[Role.ASSISTANT] / self.tokens if self.tokens else 0.0
        return f"{super().tokens_in_words()} ({shares}: {learned:.1%} supervised)"


class RoleEncoder:
    """What the encoders of instruction data have in common; see `Encoder`.

    Args:
        special_in_text: what becomes of special strings in a row's own text; see `SpecialText`.
        markers: strings that open or end a message.
    """

    keys: Sequence[str]

    def __init__(self, tokenizer: Tokenizer, special_in_text: str, markers: Iterable[str]) -> None:
        self.tokenizer = tokenizer
        self.special = SpecialText(tokenizer, special_in_text, [*markers, *ends_of_text(tokenizer)])
        self._dtype = token_dtype(tokenizer.vocab_size)

    def files(self, output_prefix: str) -> dict[str, np.dtype[Any]]:
        """Prefix of each indexed dataset to write, and its element type."""
        return {text_prefix(output_prefix): self._dtype, role_prefix(output_prefix): ROLE_DTYPE}

    def datasets(self, output_prefix: str) -> list[str]:
        """The one prefix by which training names the data."""
        return [output_prefix]

    def summary(self) -> InstructionSummary:
        """A summary to count into."""
        return InstructionSummary()

    def encoded(
        self, chunk: Chunk, tokens: Array, roles: Array, sizes: Array, bad_lines: list[str], forgeable: list[str]
    ) -> EncodedRows:
        """`chunk` as rows of `sizes`, int32, of `tokens` and `roles`, back to back."""
        return EncodedRows(
            advance=chunk.advance,
            files=[(tokens.astype(self._dtype), sizes), (roles.astype(ROLE_DTYPE), sizes)],
            rows=len(sizes),
            tokens=len(tokens),
            longest=int(sizes.max(initial=0)),
            bad_lines=bad_lines,
            tokens_per_role=np.bincount(roles, minlength=len(Role)),
            forgeable=forgeable,
        )
