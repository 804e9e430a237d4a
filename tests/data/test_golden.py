"""Faithfulness: the reference's bytes, and NVIDIA's reader."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron.config import PreprocessConfig
from megatron.data.documents import DocumentEncoder
from megatron.data.instruction import InstructionDataset
from megatron.data.merge import merge_datasets
from megatron.data.preprocess import preprocess
from megatron.data.rows import RowEncoder, RowFormat
from megatron.data.sources import find_sources
from megatron.tokenizer.sentencepiece import SentencePieceTokenizer

FILES = [f"{half}.{suffix}" for half in ("text", "role") for suffix in ("bin", "idx")]
ROW_FORMAT = RowFormat(question_key="question", answer_key="response", system_key="system_prompt")
READER = """
import json, sys
from megatron.core.datasets.indexed_dataset import IndexedDataset
for dataset in map(IndexedDataset, sys.argv[1:]):
    rows = [dataset[i].tolist() for i in range(len(dataset))]
    print(json.dumps([rows, dataset.document_indices.tolist()]))
"""


def run(
    shared_data: Path, jsonl: Path, prefix: Path, *, new_tokens: bool = True, reference_doc_idx: bool = True
) -> None:
    tokenizer = SentencePieceTokenizer.from_file(
        shared_data / "tokenizers" / "mistral-v1.model",
        extra_tokens=["<|im_start|>", "<|im_end|>"],
        new_tokens=new_tokens,
    )
    encoder = RowEncoder(tokenizer, ROW_FORMAT)
    options = PreprocessConfig(input=(str(jsonl),), output_prefix=str(prefix), workers=2)
    preprocess(find_sources(options), encoder, options, reference_doc_idx=reference_doc_idx)


@pytest.mark.parametrize("name", ["edge", "edge_nnt"])
def test_edge_cases_have_the_bytes_of_the_reference(name: str, shared_data: Path, tmp_path: Path) -> None:
    golden = shared_data / "reference" / "golden"
    run(shared_data, golden / "edge.jsonl", tmp_path / name, new_tokens=name == "edge")
    for file in FILES:
        assert (tmp_path / f"{name}-{file}").read_bytes() == (golden / f"{name}-{file}").read_bytes(), file


@pytest.mark.parametrize("name", ["cot_train", "cot_train_nnt"])
def test_real_data_has_the_bytes_of_the_reference(name: str, shared_data: Path, tmp_path: Path) -> None:
    listed = (shared_data / "reference" / "golden" / "cot_train.sha256").read_text().split()
    digests = dict(zip(listed[1::2], listed[::2], strict=True))
    run(shared_data, shared_data / "data" / "cot_train.jsonl", tmp_path / name, new_tokens=name == "cot_train")
    for file in FILES:
        content = (tmp_path / f"{name}-{file}").read_bytes()
        assert hashlib.sha256(content).hexdigest() == digests[f"{name}-{file}"], file


def read_by_nvidia(megatron_core: Path, *prefixes: Path) -> list[list[Any]]:
    """Sequences and document indices of each dataset."""
    done = subprocess.run(
        [sys.executable, "-c", READER, *map(str, prefixes)],
        env={"PYTHONPATH": str(megatron_core), "PATH": "/usr/bin:/bin", "HOME": str(prefixes[0].parent)},
        cwd=prefixes[0].parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()[-len(prefixes) :]]


@pytest.mark.slow
def test_nvidia_reader_reads_the_same(shared_data: Path, megatron_core: Path, tmp_path: Path) -> None:
    jsonl = shared_data / "reference" / "golden" / "edge.jsonl"
    run(shared_data, jsonl, tmp_path / "rows", reference_doc_idx=False)
    dataset = InstructionDataset(tmp_path / "rows")
    documents = list(range(len(dataset) + 1))
    for half, read in enumerate(read_by_nvidia(megatron_core, tmp_path / "rows-text", tmp_path / "rows-role")):
        assert read == [[dataset[i][half].tolist() for i in range(len(dataset))], documents]


@pytest.mark.slow
def test_nvidia_reader_reads_documents(
    small_tokenizer: SentencePieceTokenizer, megatron_core: Path, tmp_path: Path
) -> None:
    texts = ["the sum of 1 and 2", "", "is 3", "ü" * 3000]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    encoder = DocumentEncoder(small_tokenizer, append_eod=True)
    options = PreprocessConfig(input=(f"{tmp_path}/in.jsonl",), output_prefix=f"{tmp_path}/corpus", workers=1)
    preprocess(find_sources(options), encoder, options)
    merge_datasets([f"{tmp_path}/corpus_text_document"] * 2, f"{tmp_path}/twice")
    documents = [[*small_tokenizer.encode(text), small_tokenizer.eod_id] for text in texts if text]
    assert read_by_nvidia(megatron_core, tmp_path / "corpus_text_document", tmp_path / "twice") == [
        [documents, [0, 1, 2, 3]],
        [documents * 2, [0, 1, 2, 3, 4, 5, 6]],
    ]
