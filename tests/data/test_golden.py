"""Faithfulness: the reference's bytes, and NVIDIA's reader."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.data.instruction import InstructionDataset
from megatron.data.preprocess import preprocess
from megatron.data.rows import RowEncoder, RowFormat
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
    preprocess(
        [jsonl], str(prefix), encoder, vocab_size=tokenizer.vocab_size, workers=2, reference_doc_idx=reference_doc_idx
    )


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


@pytest.fixture(scope="session")
def megatron_core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with NVIDIA's package, whose name is ours too."""
    folder = tmp_path_factory.mktemp("megatron_core")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", "--retries=1"]
    try:
        done = subprocess.run(
            [*command, "--timeout=20", "--target", str(folder), "megatron-core==0.16.0"],
            capture_output=True,
            text=True,
            timeout=120,
        )
    except subprocess.TimeoutExpired:
        pytest.skip("pip took too long to fetch megatron-core==0.16.0")
    if done.returncode:
        pytest.skip(f"pip cannot fetch megatron-core==0.16.0: {done.stderr.strip()[-200:]}")
    return folder


@pytest.mark.slow
def test_nvidia_reader_reads_the_same(shared_data: Path, megatron_core: Path, tmp_path: Path) -> None:
    jsonl = shared_data / "reference" / "golden" / "edge.jsonl"
    run(shared_data, jsonl, tmp_path / "rows", reference_doc_idx=False)
    dataset = InstructionDataset(tmp_path / "rows")
    done = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path / "rows-text"), str(tmp_path / "rows-role")],
        env={"PYTHONPATH": str(megatron_core), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    documents = list(range(len(dataset) + 1))
    for half, line in enumerate(done.stdout.splitlines()[-2:]):
        assert json.loads(line) == [[dataset[i][half].tolist() for i in range(len(dataset))], documents]
