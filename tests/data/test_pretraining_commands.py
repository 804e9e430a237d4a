"""The commands `preprocess_data.py` and `merge_datasets.py` as a user meets them."""

import json
import subprocess
from pathlib import Path

import pytest
from watched_script import run_watched

TERMINATED = """
import os, signal
from megatron.data.preprocess import Summary
Summary.add = lambda *_: os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"the sum of {i} and 1", "title": f"sum {i}"}) + "\n" for i in range(20))
    )
    return path


def command(script: str, *arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    return run_watched(f"tools/{script}", *arguments, before=before)


def preprocess(
    model: Path, jsonl: Path, prefix: Path, *arguments: str, before: str = ""
) -> subprocess.CompletedProcess[str]:
    flags = [f"--input={jsonl}", f"--output_prefix={prefix}", "--tokenizer_type=SentencePieceTokenizer"]
    return command("preprocess_data.py", *flags, f"--vocab_file={model}", "--workers=2", *arguments, before=before)


def test_preprocess_then_merge(small_model: Path, jsonl: Path, tmp_path: Path) -> None:
    """With all flags of the reference's script."""
    for name in ("one", "two"):
        prefix = tmp_path / "parts" / name
        flags = (
            "--json-keys text title --append-eod --dataset_impl mmap --chunk_size 3 --log_interval 5 --no_new_tokens"
        )
        unused = "--keep_newlines --lang english --vocab_extra_ids 3 --vocab_extra_ids_list <more>"
        done = preprocess(small_model, jsonl, prefix, *flags.split(), *unused.split())
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{prefix}_text_document, {prefix}_title_document: 20 rows, ")
        assert 1 <= len(done.stderr.splitlines()) <= 4
    assert len(list((tmp_path / "parts").iterdir())) == 12
    merged = tmp_path / "merged" / "all"
    done = command("merge_datasets.py", "--input", str(tmp_path / "parts"), "--output-prefix", str(merged))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{merged}: 4 datasets, 80 sequences, ")
    assert {path.name for path in merged.parent.iterdir()} == {"all.bin", "all.idx", "all-tokenizer.json"}
    done = command("merge_datasets.py", "--input", str(tmp_path / "parts"), f"--output_prefix={tmp_path}/parts/all")
    assert done.returncode == 2
    assert done.stderr.startswith("merge_datasets.py: error: --output_prefix ")


@pytest.mark.parametrize(
    ("line", "message"),
    [("", "line 21: blank line"), ('{"text": 1}', "line 21: the value of key 'text' is a number, not a string")],
)
def test_bad_line(line: str, message: str, small_model: Path, jsonl: Path, tmp_path: Path) -> None:
    with jsonl.open("a") as file:
        file.write(line + "\n")
    done = preprocess(small_model, jsonl, tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"preprocess_data.py: failed: {jsonl}, {message}; --skip_bad_lines leaves such lines out"
    ]
    assert list(tmp_path.iterdir()) == [jsonl]
    done = preprocess(small_model, jsonl, tmp_path / "out", "--skip_bad_lines")
    assert done.returncode == 0
    assert done.stderr.splitlines() == [f"skipped: {jsonl}, {message}"]
    assert "1 bad lines skipped" in done.stdout


def test_termination_leaves_nothing(small_model: Path, jsonl: Path, tmp_path: Path) -> None:
    done = preprocess(small_model, jsonl, tmp_path / "out", before=TERMINATED)
    assert (done.returncode, done.stderr) == (130, "preprocess_data.py: interrupted\n")
    assert list(tmp_path.iterdir()) == [jsonl]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--split_sentences"],
            "--split_sentences makes data for BERT and T5 models, which this toolkit does not have",
        ),
        (["--json_keys"], "argument --json_keys: expected at least one argument"),
        (["--hf_split=train"], "--hf_split is for Hugging Face datasets"),
        (["--jsonkeys=x"], "unknown flag --jsonkeys; did you mean --json_keys?"),
    ],
)
def test_mistakes(arguments: list[str], message: str, small_model: Path, jsonl: Path, tmp_path: Path) -> None:
    done = preprocess(small_model, jsonl, tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == [jsonl]
