"""What a tokenizer is, in a few words: kept in its folder, and compared with another one's."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron.tokenizer.base import Tokenizer

SPECIAL_TOKENS_FILE = "special_tokens.json"
FIELDS = (
    *("tokenizer_type", "vocab_size", "special_tokens", "bos_id", "eos_id", "pad_id", "eod_id", "fingerprint"),
    "chat_template",
)


def describe(tokenizer: Tokenizer) -> dict[str, Any]:
    """The fields by which two tokenizers are compared, as JSON values."""
    return {name: getattr(tokenizer, name) for name in FIELDS}


def description_text(tokenizer: Tokenizer) -> str:
    """The description of `tokenizer` as a file in its folder has it, and one beside what it tokenized."""
    return json.dumps(describe(tokenizer), indent=2, ensure_ascii=False) + "\n"


def write_description(tokenizer: Tokenizer, folder: Path) -> None:
    """Keep the description of `tokenizer` in its folder."""
    (folder / SPECIAL_TOKENS_FILE).write_text(description_text(tokenizer), encoding="utf-8")


def read_description(folder: Path, file: str = SPECIAL_TOKENS_FILE) -> dict[str, Any]:
    """What `description_text` said, kept in `folder`; an older one has "tokenizer_type" and "special_tokens" only.

    Raises:
        OSError, ValueError: the file is missing or damaged.
    """
    path = folder / file
    try:
        description = dict(json.loads(path.read_text(encoding="utf-8")))
        if not isinstance(description["tokenizer_type"], str):
            raise TypeError("tokenizer_type is not a string")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} does not describe a tokenizer: {error!r}") from error
    return description


def read_special_tokens(folder: Path) -> dict[str, int]:
    """Special string -> id, in the order of registration, as kept in `folder`.

    Raises:
        OSError, ValueError: the file is missing or damaged.
    """
    table = read_description(folder).get("special_tokens")
    if not isinstance(table, dict) or not all(isinstance(token_id, int) for token_id in table.values()):
        raise ValueError(f"{folder / SPECIAL_TOKENS_FILE} has no table of special_tokens")
    return table


def difference(stored: Mapping[str, Any], now: Tokenizer) -> str | None:
    """In one line, the first thing in which the tokenizer `now` is not the one of a `stored` description, else None.

    Only what the description has is compared: a `read_description`, or a part of one, such as a fingerprint alone.
    """
    return difference_of_descriptions(stored, describe(now))


def difference_of_descriptions(stored: Mapping[str, Any], present: Mapping[str, Any]) -> str | None:
    """`difference` of two descriptions, in what both have."""
    for name, what in DIFFERENCES.items():
        if name in stored and name in present and not _equal(stored[name], present[name]):
            return what(stored[name], present[name])
    return None


def _equal(stored: Any, now: Any) -> bool:
    """Of special tokens, the order counts as well."""
    return stored == now and not (isinstance(stored, dict) and list(stored) != list(now))


def _changed(name: str) -> Any:
    return lambda stored, now: f"the {name} was {stored} and is {now}"


def _special_tokens(stored: Mapping[str, int], now: Mapping[str, int]) -> str:
    place, old, new = next(
        (place, old, new)
        for place, (old, new) in enumerate(zip(_padded(stored, now), _padded(now, stored), strict=True))
        if old != new
    )
    return f"special token number {place + 1} was {old} and is {new}"


def _padded(table: Mapping[str, int], other: Mapping[str, int]) -> Iterable[str]:
    named = [f"{name!r} (id {token_id})" for name, token_id in table.items()]
    return named + ["missing"] * (len(other) - len(table))


DIFFERENCES = {
    "tokenizer_type": _changed("type"),
    "special_tokens": _special_tokens,
    "vocab_size": _changed("vocabulary size"),
    **{f"{name}_id": _changed(f"{name} id") for name in ("bos", "eos", "pad", "eod")},
    "fingerprint": lambda stored, now: (
        "the vocabulary has other pieces, though type, size and special tokens are equal"
    ),
}
"""Field of a description -> what to say where it differs; the first that differs is told."""
