"""From rows of text to indexed datasets, in worker processes."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from tqdm import tqdm

from megatron.config import PreprocessConfig
from megatron.data.chunks import Chunk
from megatron.data.indexed import Array, IndexedWriter, publish_datasets, tokenizer_file
from megatron.data.processes import map_in_order, usable_cores
from megatron.data.sources import Source
from megatron.tokenizer import Tokenizer, description_text

MOST_LISTED = 1000
SMALLEST_CHUNK = 1 << 18
"""Bytes; below this, handing chunks over takes a noticeable share of the time."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What a chunk became.

    Attributes:
        advance: of the chunk.
        files: for each output file, elements of all sequences back to back, and int32 [sequences] their lengths.
        rows: good rows of the chunk.
        tokens: ids that they became.
        longest: tokens of the longest sequence.
        bad_lines: places of the bad rows and what is wrong with them.
        forgeable: places of the rows in whose own text special strings became tokens that divide it; see `SpecialText`.
    """

    advance: int
    files: Sequence[tuple[Array, Array]]
    rows: int
    tokens: int
    longest: int
    bad_lines: list[str]
    forgeable: list[str]


@dataclass(kw_only=True)
class Summary:
    """What a run of `preprocess` did.

    Attributes:
        rows: rows written.
        tokens: tokens written.
        longest: tokens of the longest sequence.
        seconds: time taken.
        skipped: number of bad lines left out.
        bad_lines: the first of them, as `file, line N: what is wrong`.
        forgeable: rows in whose own text special strings became tokens that divide it.
        first_forgeable: place of the first one.
        forging: what such rows contain, and what it does.
    """

    forging: ClassVar[str]

    rows: int = 0
    tokens: int = 0
    longest: int = 0
    seconds: float = 0.0
    skipped: int = 0
    bad_lines: list[str] = field(default_factory=list)
    forgeable: int = 0
    first_forgeable: str = ""

    def add(self, encoded: Encoded) -> None:
        """Count a chunk in."""
        self.rows += encoded.rows
        self.tokens += encoded.tokens
        self.longest = max(self.longest, encoded.longest)
        self.skipped += len(encoded.bad_lines)
        self.bad_lines += encoded.bad_lines[: MOST_LISTED - len(self.bad_lines)]
        self.first_forgeable = self.first_forgeable or next(iter(encoded.forgeable), "")
        self.forgeable += len(encoded.forgeable)

    def notes(self) -> list[str]:
        """What the user should look at: the bad lines left out, and rows whose text divides itself."""
        notes = [f"skipped: {line}" for line in self.bad_lines]
        if self.skipped > len(self.bad_lines):
            notes.append(f"skipped: {self.skipped - len(self.bad_lines):,} more")
        if self.forgeable:
            notes.append(
                f"warning: {self.forgeable:,} rows contain {self.forging} "
                f"(the first: {self.first_forgeable}); --special_in_text text makes them ordinary text"
            )
        return notes

    def tokens_in_words(self) -> str:
        """How many tokens there are."""
        return f"{self.tokens:,} tokens"

    def __str__(self) -> str:
        return (
            f"{self.rows:,} rows, {self.tokens_in_words()}, longest row {self.longest:,} tokens, "
            f"{self.seconds:.1f} seconds" + (f", {self.skipped:,} bad lines skipped" if self.skipped else "")
        )


class Encoder(Protocol):
    """What makes sequences of rows.

    Attributes:
        tokenizer: what it encodes with.
        keys: of a row, the values that it looks at.
    """

    tokenizer: Tokenizer
    keys: Sequence[str]

    def files(self, output_prefix: str) -> Mapping[str, np.dtype[Any]]:
        """Prefix of each indexed dataset to write, in the order of `Encoded.files`, and its element type."""

    def datasets(self, output_prefix: str) -> Sequence[str]:
        """The prefixes by which training names the data; beside each lies the description of its tokenizer."""

    def summary(self) -> Summary:
        """A summary to count into."""

    def encode(self, chunk: Chunk) -> Encoded:
        """Encode the rows of `chunk`; bad ones are listed and left out."""


def preprocess(
    sources: Sequence[Source], encoder: Encoder, options: PreprocessConfig, *, reference_doc_idx: bool = False
) -> Summary:
    """Encode the rows of `sources`, in order, into the files of `encoder` at `options.output_prefix`.

    A `-tokenizer.json` says by which tokenizer, so that training with another one is noticed.

    The output depends neither on the number of workers nor on how many rows they take at a time. It appears when all of
    it is written, replacing what was there; nothing is left behind on an error or interrupt.

    Raises:
        ValueError: a bad line (unless `options.skip_bad_lines`), or no rows at all.
        OSError: a file cannot be read or written, or a worker died.
    """
    began = time.perf_counter()
    summary, output_prefix = encoder.summary(), options.output_prefix
    Path(output_prefix).absolute().parent.mkdir(parents=True, exist_ok=True)
    files, writers = encoder.files(output_prefix), list[IndexedWriter]()
    chunks = (chunk for source in sources for chunk in source.chunks(options.chunk_size, SMALLEST_CHUNK, encoder.keys))
    try:
        for prefix, dtype in files.items():
            writers.append(IndexedWriter(prefix, dtype, reference_doc_idx=reference_doc_idx))
        with closing(map_in_order(encoder.encode, chunks, options.workers or usable_cores())) as encoded_chunks:
            for encoded in _with_progress(encoded_chunks, sources, summary, options.log_interval):
                if encoded.bad_lines and not options.skip_bad_lines:
                    raise ValueError(f"{encoded.bad_lines[0]}; --skip_bad_lines leaves such lines out")
                summary.add(encoded)
                for writer, (values, sizes) in zip(writers, encoded.files, strict=True):
                    writer.extend(values, sizes)
        empty = [prefix for prefix, writer in zip(files, writers, strict=True) if not len(writer)]
        if empty:
            names = ", ".join(source.name for source in sources)
            raise ValueError(f"no rows in {names}: nothing to write to {empty[0]}")
    except BaseException:
        for writer in writers:
            writer.discard()
        raise
    description = description_text(encoder.tokenizer).encode()
    publish_datasets(writers, {tokenizer_file(prefix): description for prefix in encoder.datasets(output_prefix)})
    summary.seconds = time.perf_counter() - began
    return summary


def _with_progress(
    encoded_chunks: Iterator[Encoded], sources: Sequence[Source], summary: Summary, log_interval: int
) -> Iterator[Encoded]:
    """Pass chunks on; show a progress bar of the bytes read, or off a terminal a line every `log_interval` rows."""
    watched = sys.stderr.isatty()
    sizes = [source.size for source in sources]
    total = None if None in sizes else sum(size or 0 for size in sizes)
    began, due = time.perf_counter(), log_interval
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", disable=not watched) as bar:
        for encoded in encoded_chunks:
            yield encoded
            bar.update(encoded.advance)
            if summary.rows >= due:
                due = summary.rows - summary.rows % log_interval + log_interval
                bar.set_postfix_str(f"{summary.rows:,} rows", refresh=False)
                if not watched:
                    rate = summary.rows / (time.perf_counter() - began)
                    print(f"{summary.rows:,} rows, {rate:,.0f} rows per second", file=sys.stderr)
