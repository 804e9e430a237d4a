"""Reading JSON that may be damaged, or made to do harm."""

import json
from pathlib import Path
from typing import Any

LARGEST = 1 << 26
"""Bytes: several times the index of the largest models."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: the file holds none, or is larger or nested deeper than any that was written in good faith.
    """
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes")
        value = parse_json(data)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value


def parse_json(data: bytes | str) -> Any:
    """Any JSON value.

    Raises:
        ValueError: it is none, or is nested too deep.
    """
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
