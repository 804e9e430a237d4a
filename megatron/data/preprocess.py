"""Instruction rows from jsonl files to `PREFIX-text` and `PREFIX-role`, in worker processes."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from megatron.data.indexed import IndexedWriter, publish_datasets, token_dtype
from megatron.data.instruction import role_prefix, text_prefix, tokenizer_file
from megatron.data.processes import map_in_order
from megatron.data.rows import ROLE_DTYPE, Chunk, EncodedChunk, RowEncoder
from megatron.tokenizer import write_description
from megatron.tokenizer.chat import Role

MOST_LISTED = 1000
SMALLEST_CHUNK = 1 << 18
"""Bytes; below this, handing chunks over takes a noticeable share of the time."""


@dataclass(kw_only=True)
class Summary:
    """What a run of `preprocess` did.

    Attributes:
        rows: rows written.
        tokens: tokens written.
        tokens_per_role: of these, int64 [3], by `Role`.
        longest: tokens of the longest row.
        seconds: time taken.
        skipped: number of bad lines left out.
        bad_lines: the first of them, as `file, line N: what is wrong`.
        forgeable: rows whose own text has message markers or end tokens that became special tokens.
        first_forgeable: place of the first one.
    """

    rows: int = 0
    tokens: int = 0
    tokens_per_role: list[int] = field(default_factory=lambda: [0] * len(Role))
    longest: int = 0
    seconds: float = 0.0
    skipped: int = 0
    bad_lines: list[str] = field(default_factory=list)
    forgeable: int = 0
    first_forgeable: str = ""

    def add(self, encoded: EncodedChunk) -> None:
        """Count a chunk in."""
        path = encoded.chunk.path
        self.rows += len(encoded.sizes)
        self.tokens += len(encoded.tokens)
        counts = encoded.tokens_per_role.tolist()
        self.tokens_per_role = [total + count for total, count in zip(self.tokens_per_role, counts, strict=True)]
        self.longest = max(self.longest, int(encoded.sizes.max(initial=0)))
        self.skipped += len(encoded.bad_lines)
        room = MOST_LISTED - len(self.bad_lines)
        self.bad_lines += [f"{path}, line {number}: {reason}" for number, reason in encoded.bad_lines[:room]]
        if encoded.forgeable and not self.forgeable:
            self.first_forgeable = f"{path}, line {encoded.forgeable[0]}"
        self.forgeable += len(encoded.forgeable)

    def notes(self) -> list[str]:
        """What the user should look at: the bad lines left out, and rows that can forge a turn."""
        notes = [f"skipped: {line}" for line in self.bad_lines]
        if self.skipped > len(self.bad_lines):
            notes.append(f"skipped: {self.skipped - len(self.bad_lines):,} more")
        if self.forgeable:
            notes.append(
                f"warning: {self.forgeable:,} rows contain message markers or end tokens in their own text, which can "
                f"forge a turn (the first: {self.first_forgeable}); --special_in_text text makes them ordinary text"
            )
        return notes

    def __str__(self) -> str:
        shares = ", ".join(f"{role.name.lower()} {self.tokens_per_role[role]:,}" for role in Role)
        return (
            f"{self.rows:,} rows, {self.tokens:,} tokens ({shares}), longest row {self.longest:,} tokens, "
            f"{self.seconds:.1f} seconds" + (f", {self.skipped:,} bad lines skipped" if self.skipped else "")
        )


def chunks_of(path: Path, lines: int) -> Iterator[Chunk]:
    """The file in chunks of `lines` lines, or of a multiple of it where that is less than `SMALLEST_CHUNK` bytes."""
    number, start = 1, 0
    count, stop = 0, 0
    with path.open("rb") as file:
        while block := list(islice(file, lines)):
            count, stop = count + len(block), stop + sum(map(len, block))
            if stop - start >= SMALLEST_CHUNK:
                yield Chunk(str(path), number, start, stop)
                number, start, count = number + count, stop, 0
    if count:
        yield Chunk(str(path), number, start, stop)


def preprocess(
    inputs: Sequence[Path],
    output_prefix: str,
    encoder: RowEncoder,
    *,
    vocab_size: int,
    workers: int = 1,
    chunk_size: int = 32,
    log_interval: int = 10_000,
    skip_bad_lines: bool = False,
    reference_doc_idx: bool = False,
) -> Summary:
    """Encode the rows of `inputs`, in order, into `OUTPUT_PREFIX-text` and `OUTPUT_PREFIX-role`.

    `OUTPUT_PREFIX-tokenizer.json` says by which tokenizer, so that training with another one is noticed.

    Workers take `chunk_size` lines at a time (more where they are short); the output does not depend on either number.
    It appears when all of it is written, replacing what was there; nothing is left behind on an error or interrupt.

    Raises:
        ValueError: a bad line (unless `skip_bad_lines`), or no rows at all.
        OSError: a file cannot be read or written, or a worker died.
    """
    began = time.perf_counter()
    summary = Summary()
    Path(output_prefix).absolute().parent.mkdir(parents=True, exist_ok=True)
    writers: list[IndexedWriter] = []
    chunks = (chunk for path in inputs for chunk in chunks_of(path, chunk_size))
    try:
        for prefix, dtype in ((text_prefix, token_dtype(vocab_size)), (role_prefix, ROLE_DTYPE)):
            writers.append(IndexedWriter(prefix(output_prefix), dtype, reference_doc_idx=reference_doc_idx))
        text, role = writers
        with closing(map_in_order(encoder.encode, chunks, workers)) as encoded_chunks:
            for encoded in _with_progress(encoded_chunks, inputs, summary, log_interval):
                if encoded.bad_lines and not skip_bad_lines:
                    number, reason = encoded.bad_lines[0]
                    raise ValueError(
                        f"{encoded.chunk.path}, line {number}: {reason}; --skip_bad_lines leaves such lines out"
                    )
                summary.add(encoded)
                text.extend(encoded.tokens, encoded.sizes)
                role.extend(encoded.roles, encoded.sizes)
        if not summary.rows:
            raise ValueError(f"no rows in {', '.join(map(str, inputs))}")
    except BaseException:
        for writer in writers:
            writer.discard()
        raise
    publish_datasets(writers)
    described = tokenizer_file(output_prefix)
    write_description(encoder.tokenizer, described.parent, described.name)
    summary.seconds = time.perf_counter() - began
    return summary


def _with_progress(
    encoded_chunks: Iterator[EncodedChunk], inputs: Sequence[Path], summary: Summary, log_interval: int
) -> Iterator[EncodedChunk]:
    """Pass chunks on; show a progress bar of the bytes read, or off a terminal a line every `log_interval` rows."""
    watched = sys.stderr.isatty()
    total = sum(path.stat().st_size for path in inputs)
    began, due = time.perf_counter(), log_interval
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", disable=not watched) as bar:
        for encoded in encoded_chunks:
            yield encoded
            bar.update(encoded.chunk.stop - encoded.chunk.start)
            if summary.rows >= due:
                due = summary.rows - summary.rows % log_interval + log_interval
                bar.set_postfix_str(f"{summary.rows:,} rows", refresh=False)
                if not watched:
                    rate = summary.rows / (time.perf_counter() - began)
                    print(f"{summary.rows:,} rows, {rate:,.0f} rows per second", file=sys.stderr)
