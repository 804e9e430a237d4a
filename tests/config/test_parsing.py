"""From a command line to typed flags."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron.config import UsageError, option, parse_command, parse_run, run_entry
from megatron.config.parser import with_underscores

ROOT = Path(__file__).resolve().parents[2]


def typed(*argv: str) -> dict[str, object]:
    return parse_run(argv, prog="finetune.py", description="")[0]


def test_both_spellings_and_both_forms() -> None:
    expected = {"micro_batch_size": 4}
    for argv in (["--micro_batch_size", "4"], ["--micro-batch-size", "4"], ["--micro-batch-size=4"]):
        assert typed(*argv) == expected


def test_only_what_was_typed() -> None:
    assert typed() == {}
    assert typed("--no_tie_embed_logits", "--bf16") == {"tie_embed_logits": False, "bf16": True}


def test_values_with_dashes_stay_as_they_are() -> None:
    assert typed("--load", "my-folder", "--split=9-1") == {"load": "my-folder", "split": "9-1"}


def test_only_names_of_flags_are_respelled() -> None:
    assert with_underscores("--a-b=c-d") == "--a_b=c-d"
    assert with_underscores("--two-words, one-value") == "--two-words, one-value"


def test_several_values_are_a_tuple() -> None:
    assert typed("--skip_iters", "3", "5") == {"skip_iters": (3, 5)}


@pytest.mark.parametrize(("argv", "value"), [(["true"], True), (["false"], False), ([], True)])
def test_boolean_with_a_value(argv: list[str], value: bool) -> None:
    assert typed("--log_learning_rate_to_tensorboard", *argv) == {"log_learning_rate_to_tensorboard": value}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--hiden_size", "3"], "unknown flag --hiden_size; did you mean --hidden_size?"),
        (["--micro_batch", "3"], "unknown flag --micro_batch; did you mean --micro_batch_size?"),
        (["--lr", "much"], "argument --lr: invalid float value: 'much'"),
        (["--optimizer", "lion"], "argument --optimizer: invalid choice: 'lion'"),
        (["stray"], "unexpected argument 'stray'"),
        (["--num-classes", "3"], "--num_classes belongs to vision models, which this toolkit does not have"),
        (["--fp8_e4m3"], "--fp8_e4m3: FP8 is not available yet"),
        (["--DDP_impl", "--bf16"], "--DDP_impl takes a value"),
        (["--DDP_impl"], "--DDP_impl takes a value"),
        (["--no_bias_gelu_fusion=1"], "--no_bias_gelu_fusion takes no value"),
    ],
)
def test_mistakes_are_named(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        typed(*argv)
    assert message in str(error.value)


def test_accepted_flags_are_noted_and_leave_nothing() -> None:
    argv = ["--DDP-impl", "local", "--no_bias_gelu_fusion", "--fp8_margin=3", "--lr", "1"]
    flags, notes = parse_run(argv, prog="finetune.py", description="")
    assert flags == {"lr": 1.0}
    assert [note.split()[0] for note in notes] == ["--DDP_impl", "--no_bias_gelu_fusion", "--fp8_margin"]


def test_other_names() -> None:
    assert typed("--tokenizer-model", "x", "--encoder_seq_length=8") == {"vocab_file": "x", "seq_length": 8}


@dataclass(frozen=True, kw_only=True)
class Tool:
    """A tool."""

    family: str = option(help="", choices=("a", "b"), positional=True)
    out: str = option(help="")
    fast: bool = option(True, "")
    files: tuple[str, ...] = option((), "", nargs="+")


def test_options_of_a_tool() -> None:
    (tool,) = parse_command(["a", "--out", "x", "--no-fast", "--files", "1", "2"], Tool, prog="tool", description="")
    assert tool == Tool(family="a", out="x", fast=False, files=("1", "2"))
    with pytest.raises(UsageError, match="unknown flag --ut; did you mean --out"):
        parse_command(["a", "--ut", "x"], Tool, prog="tool", description="")
    for argv in (["a"], ["--out", "x"], ["c", "--out", "x"]):
        with pytest.raises(UsageError):
            parse_command(argv, Tool, prog="tool", description="")


@pytest.mark.parametrize(
    ("error", "code", "last"),
    [
        (UsageError("wrong"), 2, "error: wrong"),
        (ValueError("bad file"), 1, "failed: bad file"),
        (OSError("no disk"), 1, "failed: no disk"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes(error: BaseException, code: int, last: str, capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: list[str]) -> None:
        raise error

    assert run_entry(main, []) == code
    assert capsys.readouterr().err.strip().endswith(last)
    assert run_entry(lambda argv: None, []) == 0


def test_a_failure_is_told_where_the_launcher_cannot_be(tmp_path: Path) -> None:
    """As on a full disk, which may be the failure."""
    code = "from megatron.config import run_entry\ndef main(argv): raise OSError('disk full')\nrun_entry(main, [])"
    environment = {"TORCHELASTIC_RUN_ID": "1", "TORCHELASTIC_ERROR_FILE": str(tmp_path / "absent" / "error.json")}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (1, "<string>: failed: disk full\n")


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, runpy; sys.argv = ['finetune.py', '--help']\n"
        "try: runpy.run_path('finetune.py', run_name='__main__')\n"
        "except SystemExit as end: print('code', end.code, 'torch' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert output.endswith("code 0 False\n")
    assert "--micro_batch_size" in output
    assert "learning rate:" in output
