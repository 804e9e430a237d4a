"""The quickstart: all of it with few iterations, and the data that it makes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "instruct" / "quickstart.sh"


def quickstart(*options: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    command = ["bash", str(SCRIPT), *map(str, options)]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_runs_from_data_to_an_answer(tmp_path: Path) -> None:
    result = quickstart("--iters", 10, "--questions", 10, "--out", tmp_path)
    assert result.returncode == 0, result.stdout[-4000:]
    for stage in ("before", "after"):
        assert re.search(rf"exact match {stage} training: \d+ of 10 held-out questions", result.stdout)
    assert re.search(r"^answer: ", result.stdout, flags=re.M)
    assert "2 ranks on cpu: 2 tensor x 1 pipeline x 1 data" in result.stdout
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    assert list((tmp_path / "finetuned" / "tensorboard").iterdir())


def test_wrong_options_are_named(tmp_path: Path) -> None:
    for options, message in [
        (["--modle", "x"], "unknown option --modle"),
        (["--tp"], "--tp needs a value"),
        (["--data", tmp_path / "absent.jsonl"], f"no file {tmp_path}/absent.jsonl"),
    ]:
        result = quickstart(*options)
        assert (result.returncode, message in result.stdout) == (2, True)
    assert "--tokenizer FILE" in quickstart("--help").stdout


def test_held_out_sums_never_occur_in_training(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "instruct" / "quickstart" / "make_data.py")]
    files = {name: tmp_path / f"{name}.jsonl" for name in ("train", "held_out")}
    flags = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    subprocess.run([*command, *flags, "--train_rows", "4000"], check=True, capture_output=True)
    rows = {name: [json.loads(line) for line in path.open(encoding="utf-8")] for name, path in files.items()}
    assert all(list(row) == ["id", "system_prompt", "question", "response"] for part in rows.values() for row in part)
    pairs = {name: {frozenset(re.findall(r"\d+", row["question"])) for row in part} for name, part in rows.items()}
    assert not pairs["train"] & pairs["held_out"]
    for row in rows["held_out"]:
        total = sum(map(int, re.findall(r"\d+", row["question"])))
        assert row["response"].endswith(f"The answer is {total}.")
