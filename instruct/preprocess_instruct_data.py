"""Tokenize instruction data: jsonl files in, the files OUTPUT_PREFIX-text and OUTPUT_PREFIX-role out."""

import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron.config import TokenizerConfig, UsageError, option, parse_command, run_entry
from megatron.data.preprocess import preprocess
from megatron.data.processes import usable_cores
from megatron.data.rows import RowEncoder, RowFormat
from megatron.tokenizer import build_tokenizer
from megatron.tokenizer.chat import MESSAGE_END, MESSAGE_START


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """Instruction data"""

    input: tuple[str, ...] = option(help="The jsonl files, one JSON object a line.", nargs="+")
    output_prefix: str = option(help="Path of the output files without -text.bin and so on.")
    question_key: str = option("input", "Key of the prompt.")
    answer_key: str = option("output", "Key of the response.")
    system_key: str | None = option(None, "Key of the system prompt, if rows have one; null leaves it out of a row.")
    special_in_text: str = option(
        "keep",
        "Special strings in a row's own text: keep them special, make them ordinary text, or call the line bad.",
        choices=("keep", "text", "error"),
    )
    skip_bad_lines: bool = option(False, "Leave bad lines out and list them, instead of stopping at the first.")
    workers: int | None = option(None, "Worker processes; by default, one a processor core.")
    chunk_size: int = option(32, "Lines that a worker takes at a time; more where lines are short.")
    log_interval: int = option(10_000, "Rows between two progress lines where there is no progress bar.")
    dataset_impl: str = option("mmap", "Accepted, no effect: there is one format.", choices=("lazy", "cached", "mmap"))
    reference_doc_idx: bool = option(False, "Write doc_idx as Megatron-LLM did, for files of the same bytes.")

    def __post_init__(self) -> None:
        for name in self.input:
            if not Path(name).is_file():
                raise UsageError(f"--input {name}: no such file")
        for name in ("workers", "chunk_size", "log_interval"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} {value}: must be at least 1")


def main(argv: list[str]) -> None:
    """Run the command."""
    # What a job scheduler sends is an interrupt too: it must not leave half-written files.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    options, tokenizer_config = parse_command(
        argv, PreprocessOptions, TokenizerConfig, prog="preprocess_instruct_data.py", description=__doc__
    )
    tokenizer = build_tokenizer(tokenizer_config)
    for marker in (MESSAGE_START, MESSAGE_END):
        if marker not in tokenizer.special_tokens:
            print(f"warning: {marker} is no special token; see --vocab_extra_ids_list", file=sys.stderr)
    row_format = RowFormat(
        question_key=options.question_key,
        answer_key=options.answer_key,
        system_key=options.system_key,
        special_in_text=options.special_in_text,
    )
    summary = preprocess(
        [Path(name) for name in options.input],
        options.output_prefix,
        RowEncoder(tokenizer, row_format),
        vocab_size=tokenizer.vocab_size,
        workers=options.workers or usable_cores(),
        chunk_size=options.chunk_size,
        log_interval=options.log_interval,
        skip_bad_lines=options.skip_bad_lines,
        reference_doc_idx=options.reference_doc_idx,
    )
    for note in summary.notes():
        print(note, file=sys.stderr)
    print(f"{options.output_prefix}: {summary}")


if __name__ == "__main__":
    sys.exit(run_entry(main, sys.argv[1:]))
