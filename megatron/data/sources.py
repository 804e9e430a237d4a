"""Where rows come from: an input for each name that the user gives."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

from megatron.config import PreprocessConfig, UsageError
from megatron.data.chunks import Chunk, FileLines, HeldLines
from megatron.data.tables import HuggingFaceDataset, ParquetFile, require

COMPRESSED_BLOCK = 1 << 14
"""Bytes of a compressed file that are read at a time; they may stand for a thousand times as many."""
LARGEST_WINDOW = 31
"""Of zstd, as a power of two: the most that `zstd --long=31` needs."""


class Source(Protocol):
    """An input.

    Attributes:
        name: as the user gave it.
        size: what its chunks advance in all, in bytes; None where nobody knows.
    """

    name: str
    size: int | None

    def chunks(self, rows: int, size: int, keys: Sequence[str]) -> Iterator[Chunk]:
        """All rows in order, in chunks of at least `rows` rows and `size` bytes.

        `keys` are those whose values will be looked at.

        Raises:
            ValueError: the input is damaged.
            OSError: it cannot be read.
        """


def find_sources(options: PreprocessConfig) -> list[Source]:
    """The inputs that `options` name.

    Raises:
        UsageError: one does not exist, or the package that reads it is missing.
    """
    sources = [_find(name, options) for name in options.input]
    for flag in ("hf_split", "hf_subset"):
        if getattr(options, flag) and not any(isinstance(source, HuggingFaceDataset) for source in sources):
            raise UsageError(f"--{flag} is for Hugging Face datasets, but every --input is a file")
    return sources


def _find(name: str, options: PreprocessConfig) -> Source:
    path = Path(name)
    if path.is_file():
        return FILES.get(path.suffix, JsonLinesFile)(name)
    if path.is_dir() or options.hf_split:
        return HuggingFaceDataset(name, options.hf_subset, options.hf_split)
    raise UsageError(f"--input {name}: no such file; --hf_split SPLIT makes it the name of a dataset on the hub")


class JsonLinesFile:
    """A file with a JSON object a line; workers read their lines for themselves."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.size: int | None = Path(name).stat().st_size

    def chunks(self, rows: int, size: int, keys: Sequence[str]) -> Iterator[Chunk]:
        """Its lines."""
        first, start = 1, 0
        count, stop = 0, 0
        with open(self.name, "rb") as file:
            while block := list(islice(file, rows)):
                count, stop = count + len(block), stop + sum(map(len, block))
                if stop - start >= size:
                    yield FileLines(self.name, first, stop - start, start)
                    first, start, count = first + count, stop, 0
        if count:
            yield FileLines(self.name, first, stop - start, start)


class Decompressor(Protocol):
    """One compressed stream, of which a file may have several, one after the other."""

    @property
    def eof(self) -> bool:
        """Whether the stream has ended."""

    @property
    def unused_data(self) -> bytes:
        """What came behind its end."""

    def decompress(self, data: bytes, /) -> bytes:
        """What the next bytes of the stream stand for."""


class Codec(NamedTuple):
    """How to decompress: a new decompressor, and what it raises for damaged data."""

    start: Callable[[], Decompressor]
    error: type[Exception]


class CompressedJsonLines:
    """A compressed file with a JSON object a line; what it advances are its compressed bytes."""

    def __init__(self, codec: Callable[[str], Codec], name: str) -> None:
        self.name = name
        self.size: int | None = Path(name).stat().st_size
        self._codec = codec(name)

    def chunks(self, rows: int, size: int, keys: Sequence[str]) -> Iterator[Chunk]:
        """Its lines."""
        first, count, advanced, read = 1, 0, 0, 0
        held = bytearray()
        for read, block in self._blocks():
            end = block.rfind(b"\n") + 1
            held += block[:end]
            count += block.count(b"\n")
            if end and count >= rows and len(held) >= size:
                yield HeldLines(self.name, first, read - advanced, bytes(held))
                first, count, advanced = first + count, 0, read
                held.clear()
            held += block[end:]
        if held:
            yield HeldLines(self.name, first, read - advanced, bytes(held))

    def _blocks(self) -> Iterator[tuple[int, bytes]]:
        """How many bytes have been read, and what the last of them stand for."""
        stream: Decompressor | None = None
        read = 0
        with open(self.name, "rb") as file:
            while data := file.read(COMPRESSED_BLOCK):
                read += len(data)
                while data := data if stream else data.lstrip(b"\0"):  # zeros may fill a file up behind a stream
                    stream = stream or self._codec.start()
                    try:
                        yield read, stream.decompress(data)
                    except self._codec.error as error:
                        raise ValueError(f"{self.name} is damaged before byte {read:,}: {error}") from error
                    data, stream = (stream.unused_data, None) if stream.eof else (b"", stream)
        if stream:
            raise ValueError(f"{self.name} is cut off: its last compressed stream does not end")


def _gzip(name: str) -> Codec:
    return Codec(partial(zlib.decompressobj, 16 + zlib.MAX_WBITS), zlib.error)


def _zstd(name: str) -> Codec:
    try:
        from compression import zstd  # Python 3.14 and later
    except ImportError:
        return _zstd_of_package(name)
    options = {zstd.DecompressionParameter.window_log_max: LARGEST_WINDOW}
    return Codec(partial(zstd.ZstdDecompressor, options=options), zstd.ZstdError)


def _zstd_of_package(name: str) -> Codec:
    require("zstandard", name)
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << LARGEST_WINDOW)
    return Codec(decompressor.decompressobj, zstandard.ZstdError)


FILES: dict[str, Callable[[str], Source]] = {
    ".gz": partial(CompressedJsonLines, _gzip),
    ".zst": partial(CompressedJsonLines, _zstd),
    ".parquet": ParquetFile,
}
"""Ending of a file's name -> the input that it is; others are plain lines of JSON."""
