"""Tokenize text for pretraining: rows of text in, the files OUTPUT_PREFIX_KEY_document for each key out."""

import sys
from dataclasses import dataclass

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
from megatron.data.documents import DocumentEncoder
from megatron.data.preprocess import preprocess
from megatron.data.sources import find_sources
from megatron.tokenizer import build_tokenizer


@dataclass(frozen=True, kw_only=True)
class DocumentOptions:
    """Documents."""

    json_keys: tuple[str, ...] = option(("text",), "Keys of the texts; each has output files of its own.", nargs="+")
    append_eod: bool = option(False, "End each document with the end-of-document token.")
    special_in_text: str = option(
        "keep",
        "Special strings in a text: keep them special, make them ordinary text, or call the line bad.",
        choices=("keep", "text", "error"),
    )
    split_sentences: bool = option(False, "Refused: a sequence is a whole document; sentences are for BERT.")
    keep_newlines: bool = option(False, "No effect: nothing is taken out of a text.")
    lang: str = option("english", "No effect: it is for splitting sentences.")

    def __post_init__(self) -> None:
        check_values(self)
        if self.split_sentences:
            raise UsageError(
                "--split_sentences makes data for BERT and T5 models, which this toolkit does not have; remove it: "
                "a GPT model learns whole documents"
            )


def main(argv: list[str]) -> None:
    """Run the command."""
    interrupt_on_sigterm()
    options, documents, tokenizer_config = parse_command(
        argv, PreprocessConfig, DocumentOptions, TokenizerConfig, prog="preprocess_data.py", description=__doc__
    )
    sources = find_sources(options)
    encoder = DocumentEncoder(
        build_tokenizer(tokenizer_config),
        documents.json_keys,
        append_eod=documents.append_eod,
        special_in_text=documents.special_in_text,
    )
    summary = preprocess(sources, encoder, options)
    for note in summary.notes():
        print(note, file=sys.stderr)
    print(f"{', '.join(encoder.datasets(options.output_prefix))}: {summary}")


if __name__ == "__main__":
    sys.exit(run_entry(main, sys.argv[1:]))
