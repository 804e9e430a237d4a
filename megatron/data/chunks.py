"""Rows of input on their way to a worker: some lines of JSON, or some records."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

try:
    import orjson
except ImportError:
    orjson = None  # type: ignore[assignment]

Row = Mapping[str, Any]
Read = TypeVar("Read")

LONE_SURROGATE = re.compile("[\ud800-\udfff]")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
JSON_KINDS = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
"""Type of a value -> what to call it."""


class RowError(ValueError):
    """What is wrong with a row, without its place."""


class Chunk(Protocol):
    """Some rows of an input, one after the other.

    Attributes:
        advance: how much of the input it stands for, in the unit of the input's `size`.
    """

    @property
    def advance(self) -> int:
        """See above."""

    def place(self, number: int) -> str:
        """Where row `number` is, for a message."""

    def rows(self, keys: Sequence[str]) -> Iterator[tuple[int, Row | RowError]]:
        """Number of each row, and the row, or what is wrong with it; the values of `keys` are valid Unicode."""


def read_rows(
    chunk: Chunk, keys: Sequence[str], read: Callable[[Row], Read]
) -> tuple[list[int], list[Read], list[str]]:
    """Numbers of the good rows of `chunk`, `read(row)` of each, and the bad ones, as `file, line N: what is wrong`.

    A row is bad if `read` raises `RowError`; `keys` are those whose values it looks at.
    """
    numbers: list[int] = []
    values: list[Read] = []
    bad_lines: list[str] = []
    for number, row in chunk.rows(keys):
        try:
            if isinstance(row, RowError):
                raise row
            values.append(read(row))
            numbers.append(number)
        except RowError as error:
            bad_lines.append(f"{chunk.place(number)}: {error}")
    return numbers, values, bad_lines


def string_of(row: Row, key: str) -> str:
    """The value of `key`, a string.

    Raises:
        RowError: it is missing, or no string.
    """
    if key not in row:
        raise RowError(f"key {key!r} is missing")
    value = row[key]
    if not isinstance(value, str):
        raise RowError(f"the value of key {key!r} is {kind_of(value)}, not a string")
    return value


def kind_of(value: object) -> str:
    """What JSON calls the value's type, for a message."""
    if isinstance(value, int | float):
        return JSON_KINDS.get(type(value), "a number")
    return JSON_KINDS.get(type(value), f"a {type(value).__name__}")


@dataclass(frozen=True)
class JsonLines(ABC):
    """Whole lines of JSON, the first of them line `first`, counting from 1."""

    path: str
    first: int
    advance: int

    def place(self, number: int) -> str:
        """Where a line is."""
        return f"{self.path}, line {number}"

    def rows(self, keys: Sequence[str]) -> Iterator[tuple[int, Row | RowError]]:
        """The objects of the lines."""
        content = self.content()
        if self.first == 1:
            content = content.removeprefix(BYTE_ORDER_MARK)
        # Only a line feed ends a line: other separators may stand in strings as they are.
        lines = content.removesuffix(b"\n").split(b"\n") if content else []
        for number, line in enumerate(lines, self.first):
            yield number, _parse(line, keys)

    @abstractmethod
    def content(self) -> bytes:
        """The lines, each but perhaps the last with its line feed."""


@dataclass(frozen=True)
class FileLines(JsonLines):
    """Lines that the worker reads for itself: `advance` bytes of the file from byte `start`."""

    start: int

    def content(self) -> bytes:
        """The lines, each but perhaps the last with its line feed."""
        with open(self.path, "rb") as file:
            file.seek(self.start)
            return file.read(self.advance)


@dataclass(frozen=True)
class HeldLines(JsonLines):
    """Lines that came out of something that only one process can read, such as a compressed file."""

    lines: bytes

    def content(self) -> bytes:
        """The lines, each but perhaps the last with its line feed."""
        return self.lines


@dataclass(frozen=True)
class Records:
    """Rows of a table, the first of them row `first`, counting from 0."""

    name: str
    first: int
    advance: int
    records: Sequence[Row | RowError]

    def place(self, number: int) -> str:
        """Where a row is."""
        return f"{self.name}, row {number}"

    def rows(self, keys: Sequence[str]) -> Iterator[tuple[int, Row | RowError]]:
        """The records."""
        return enumerate(self.records, self.first)


def _parse(line: bytes, keys: Sequence[str]) -> Row | RowError:
    """The object of a line. What the fast parser refuses, the standard one judges: it says more and takes NaN."""
    row = _parse_fast(line)
    if row is None:
        row = _parse_slowly(line, keys)
    return row if isinstance(row, dict | RowError) else RowError(f"not a JSON object but {kind_of(row)}")


def _parse_fast(line: bytes) -> Any:
    """What orjson reads, None where it is missing or refuses."""
    try:
        return orjson.loads(line) if orjson else None
    except ValueError:
        return None


def _parse_slowly(line: bytes, keys: Sequence[str]) -> Any:
    if not line.strip():
        return RowError("blank line")
    try:
        row = json.loads(line.decode("utf-8"))
        texts = {key: json.dumps(row.get(key), ensure_ascii=False) for key in keys} if isinstance(row, dict) else {}
    except UnicodeDecodeError as error:
        return RowError(f"not valid UTF-8 at byte {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return RowError(f"not JSON: {error}")
    for key, text in texts.items():
        if LONE_SURROGATE.search(text):
            return RowError(f"the value of key {key!r} has a lone surrogate, which no UTF-8 text can hold")
    return row
