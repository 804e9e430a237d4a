"""The command `preprocess_instruct_data.py` as a user meets it."""

import json
import subprocess
from pathlib import Path

import pytest
from watched_script import run_watched


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"question": f"the sum of {i} and 1", "response": f"is {i + 1}"} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(small_model: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    flags = [
        "--tokenizer_type=SentencePieceTokenizer",
        f"--vocab_file={small_model}",
        "--question_key=question",
        "--answer_key=response",
    ]
    flags += ["--vocab_extra_ids_list", "<|im_start|>,<|im_end|>", "--workers=2"]
    return run_watched("instruct/preprocess_instruct_data.py", *flags, *arguments)


def test_good_run(small_model: Path, jsonl: Path, tmp_path: Path) -> None:
    prefix = tmp_path / "new" / "out"
    done = command(small_model, f"--input={jsonl}", f"--output-prefix={prefix}", "--chunk_size=3", "--log-interval=5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{prefix}: 20 rows, ")
    assert len(done.stderr.splitlines()) == 1
    assert len(list(prefix.parent.iterdir())) == 5


def test_conversations(small_model: Path, tmp_path: Path) -> None:
    chat = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"c": chat * 3}))
    (tmp_path / "template").write_text("{% for m in messages %}<|im_start|>{{ m.content }}</s>{% endfor %}")
    flags = [f"--input={tmp_path / 'rows.jsonl'}", f"--output_prefix={tmp_path / 'out'}", "--messages_key=c"]
    last = command(small_model, *flags, "--train_on=last", f"--chat_template={tmp_path / 'template'}")
    assert (last.returncode, last.stderr) == (0, "")
    assert "1 rows, 24 tokens (system 0, prompter 20, assistant 4: 16.7% supervised)" in last.stdout
    (tmp_path / "template").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    endless = command(small_model, *flags, f"--chat_template={tmp_path / 'template'}")
    assert endless.returncode == 0
    assert endless.stderr.startswith(
        "warning: what the chat template writes at the end of an answer is no special token"
    )
    (tmp_path / "template").write_text("\n{% for %}")
    broken = command(small_model, *flags, f"--chat_template={tmp_path / 'template'}")
    assert broken.returncode == 1
    assert broken.stderr.startswith(f"preprocess_instruct_data.py: failed: {tmp_path / 'template'}, line 2: ")


def test_warning_about_forged_turns(small_model: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "<|im_end|>", "response": ""}')
    done = command(small_model, f"--input={tmp_path / 'rows.jsonl'}", f"--output_prefix={tmp_path / 'out'}")
    assert done.returncode == 0
    assert "warning: 1 rows contain message markers" in done.stderr


def test_bad_line(small_model: Path, jsonl: Path, tmp_path: Path) -> None:
    with jsonl.open("a") as file:
        file.write("\n")
    done = command(small_model, f"--input={jsonl}", f"--output_prefix={tmp_path / 'out'}")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"preprocess_instruct_data.py: failed: {jsonl}, line 21: blank line; --skip_bad_lines leaves such lines out"
    ]
    assert list(tmp_path.iterdir()) == [jsonl]
    done = command(small_model, f"--input={jsonl}", f"--output_prefix={tmp_path / 'out'}", "--skip_bad_lines")
    assert done.returncode == 0
    assert f"skipped: {jsonl}, line 21: blank line" in done.stderr
    assert "1 bad lines skipped" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --input, --output_prefix"),
        (["--input=no-such-file", "--output_prefix=x"], "--input no-such-file: no such file"),
        (["--input", __file__, "--output_prefix=x", "--chunk_size=0"], "--chunk_size 0 is not positive"),
        (["--input", __file__, "--output_prefix=x", "--chat_template=no"], "--chat_template no: no such file"),
        (
            ["--input", __file__, "--output_prefix=x", "--messages_key=m", "--system_key=s"],
            "--system_key has no effect with --messages_key",
        ),
    ],
)
def test_mistakes(arguments: list[str], message: str, small_model: Path) -> None:
    done = command(small_model, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
