"""Fixtures of whole runs."""

from pathlib import Path

import pytest
from tiny_runs import ARCHITECTURE, COURSE, preprocess, write_rows


@pytest.fixture(scope="session")
def course(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Flags of a run on 80 rows."""
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder / "rows.jsonl", 80)
    command = [
        *("--input", str(folder / "rows.jsonl"), "--output_prefix", str(folder / "rows"), "--workers", "1"),
        *("--tokenizer_type", "SentencePieceTokenizer", "--vocab_file", str(small_model)),
        *("--vocab_extra_ids_list", "<|im_start|>,<|im_end|>", "--question_key", "question"),
        *("--answer_key", "response"),
    ]
    preprocess(command)
    return f"{ARCHITECTURE} {COURSE} --vocab_file {small_model} --data_path {folder / 'rows'} --split 80,10,10"
