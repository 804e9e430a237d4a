"""Tokenize instruction data: rows in, the files OUTPUT_PREFIX-text and OUTPUT_PREFIX-role out."""

import sys
from dataclasses import dataclass, fields
from pathlib import Path

from megatron.config import (
    PreprocessConfig,
    TokenizerConfig,
    UsageError,
    interrupt_on_sigterm,
    option,
    parse_command,
    run_entry,
)
from megatron.config.option import check_values
from megatron.data.conversations import build_encoder
from megatron.data.preprocess import preprocess
from megatron.data.rows import RowFormat
from megatron.data.sources import find_sources
from megatron.tokenizer import build_tokenizer
from megatron.tokenizer.chat_template import missing_markers, read_chat_template


@dataclass(frozen=True, kw_only=True)
class InstructionOptions:
    """Instruction data."""

    question_key: str = option("input", "Key of the prompt.")
    answer_key: str = option("output", "Key of the response.")
    system_key: str | None = option(None, "Key of the system prompt, if rows have one; null leaves it out of a row.")
    messages_key: str | None = option(
        None, "Key of a list of messages, if rows are conversations: {role, content} or ShareGPT's {from, value} each."
    )
    train_on: str = option("all", "Which of the assistant's turns are learned.", choices=("all", "last"))
    chat_template: str | None = option(
        None,
        "File with a chat template in Jinja, or a tokenizer_config.json that has one; by default Megatron-LLM's form.",
        metavar="FILE",
    )
    special_in_text: str = option(
        "keep",
        "Special strings in a row's own text: keep them special, make them ordinary text, or call the line bad.",
        choices=("keep", "text", "error"),
    )
    reference_doc_idx: bool = option(False, "Write doc_idx as Megatron-LLM did, for files of the same bytes.")

    def __post_init__(self) -> None:
        check_values(self)
        if self.chat_template is not None and not Path(self.chat_template).is_file():
            raise UsageError(f"--chat_template {self.chat_template}: no such file")
        if self.messages_key is not None and self.system_key is not None:
            raise UsageError(
                "--system_key has no effect with --messages_key: system prompts are messages; leave it out"
            )


def main(argv: list[str]) -> None:
    """Run the command."""
    interrupt_on_sigterm()
    options, instruction, tokenizer_config = parse_command(
        argv,
        *(PreprocessConfig, InstructionOptions, TokenizerConfig),
        prog="preprocess_instruct_data.py",
        description=__doc__,
    )
    sources = find_sources(options)
    tokenizer = build_tokenizer(tokenizer_config)
    if instruction.chat_template is not None:
        tokenizer.chat_template = read_chat_template(Path(instruction.chat_template))
    for marker in missing_markers(tokenizer):
        print(f"warning: {marker} is no special token; see --vocab_extra_ids_list", file=sys.stderr)
    row_format = RowFormat(**{item.name: getattr(instruction, item.name) for item in fields(RowFormat)})
    encoder = build_encoder(tokenizer, row_format)
    summary = preprocess(sources, encoder, options, reference_doc_idx=instruction.reference_doc_idx)
    for note in summary.notes():
        print(note, file=sys.stderr)
    print(f"{options.output_prefix}: {summary}")


if __name__ == "__main__":
    sys.exit(run_entry(main, sys.argv[1:]))
