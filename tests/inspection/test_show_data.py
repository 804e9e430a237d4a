"""`tools/show_data.py`: what it shows, in which form, and when it fails."""

import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from small_data import Row, typed, write_documents, write_rows

from megatron.config import run_entry
from megatron.inspection import TextReport
from megatron.inspection.inspect import Selection, inspect_run
from megatron.inspection.vocabulary import find_vocabulary
from megatron.tokenizer import description_text
from megatron.tokenizer.sentencepiece import SentencePieceTokenizer

ROOT = Path(__file__).resolve().parents[2]
main = runpy.run_path(str(ROOT / "tools" / "show_data.py"))["main"]
GOOD: list[Row] = [([5, 6, 7], [0, 1, 2]), ([8, 9], [2, 2])]


def show(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the command."""
    try:
        code = run_entry(main, argv)
    except SystemExit as stop:
        code = int(str(stop.code))
    output, error = capsys.readouterr()
    return code, output, error


def flags_of(model: Path) -> list[str]:
    return [word for name, value in typed(model).items() for word in (f"--{name}", value)]


def conversation(tokenizer: SentencePieceTokenizer, *texts: str) -> Row:
    """The texts by role, in order."""
    ids = [tokenizer.encode(text) for text in texts]
    return [i for one in ids for i in one], [role for role, one in enumerate(ids) for _ in one]


@pytest.mark.parametrize(
    ("rows", "problems"),
    [
        (GOOD, []),
        ([([5, 6], [0, 1]), ([7, 8], [2, 1])], ["nothing is supervised"]),
        ([([5, 6], [1, 2]), ([7, 8], [2, 2])], ["everything is supervised"]),
        ([*GOOD, ([5, 999, 450], [0, 1, 2])], ["row 2, position 1: id 999 is outside the vocabulary of 4", "2 such"]),
        (
            [*GOOD, ([5, 6], [0, 7])],
            ["row 2, position 1: role 7 is none of 0 system, 1 prompter, 2 assistant", "1 such"],
        ),
        ([([], [])], ["nothing is supervised"]),
        ([([5, 999], [0, 3])], ["nothing is supervised", "id 999", "role 3"]),
    ],
    ids=["good", "nothing", "everything", "id", "role", "empty", "several"],
)
def test_problems_are_told_after_the_figures(
    tmp_path: Path, small_model: Path, capsys: pytest.CaptureFixture[str], rows: list[Row], problems: list[str]
) -> None:
    prefix = write_rows(tmp_path / "rows", rows)
    sizes = ["--seq_length", "9", "--micro_batch_size", "2"]
    code, output, error = show(capsys, "--data_path", prefix, *flags_of(small_model), *sizes)
    assert code == bool(problems)
    assert ("│<999>│" in output) == ("999" in error)
    assert "supervised share" in output
    assert "padding-free" in output
    assert "packing is not shown" not in output
    assert all(problem in error for problem in problems)
    assert all(line.startswith(f"problem: {prefix}: ") for line in error.splitlines())
    assert bool(error) == bool(problems)


def test_a_cut_off_answer_is_not_supervised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write_rows(tmp_path / "rows", [([5, 6, 7, 8], [1, 1, 1, 2])])
    code, output, _ = show(capsys, "--data_path", prefix, "--seq_length", "3")
    assert (code, "packing is not shown" in output) == (0, True)
    code, _, error = show(capsys, "--data_path", prefix, "--seq_length", "2")
    assert (code, "nothing is supervised" in error) == (1, True)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("role", "row 0 has 3 tokens in"),
        ("cut", "bytes long, but"),
        ("sidecar", "does not describe a tokenizer"),
    ],
)
def test_damaged_data_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str, reason: str) -> None:
    prefix = write_rows(tmp_path / "rows", GOOD)
    if damage == "role":
        write_rows(tmp_path / "other", [([5, 6], [1, 2]), ([7, 8, 9], [1, 1, 2])])
        for suffix in ("bin", "idx"):
            (tmp_path / f"other-role.{suffix}").rename(tmp_path / f"rows-role.{suffix}")
    elif damage == "cut":
        (tmp_path / "rows-text.bin").write_bytes(b"\0\0")
    else:
        (tmp_path / "rows-tokenizer.json").write_text('{"tokenizer_type": "x", "vocab_size": "9"}')
    code, _, error = show(capsys, "--data_path", prefix)
    assert (code, reason in error, len(error.splitlines())) == (1, True, 1)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ([], "--data_path is missing"),
        (["--data_path", "{}/none"], "none-text.bin"),
        (["--data_path", "{}/rows-text"], "give {}/rows"),
        (["--data_path", "{}/rows", "--data_type", "gpt"], "no such file: {}/rows.bin"),
        (["--data_path", "{}/rows", "--rows", "2"], "there are 2 rows, counted from 0"),
        (["--data_path", "{}/rows", "--rows", "-1"], "--rows"),
        (["--data_path", "{}/rows", "--colour", "never"], "did you mean --color?"),
    ],
)
def test_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], named: str) -> None:
    write_rows(tmp_path / "rows", GOOD)
    code, output, error = show(capsys, *(flag.format(tmp_path) for flag in flags))
    assert (code, output) == (2, "")
    assert named.format(tmp_path) in error


TEXTS = [
    ["system\n", "question: <|im_start|> the sum ", " äöü 😀 of\t3 <script>alert('x')</script>\n\n"],
    ["", "[31mred", "the sum is  5"],
]
ESCAPE = "\x1b"


@pytest.fixture
def prefix(tmp_path: Path, small_tokenizer: SentencePieceTokenizer) -> str:
    """Rows of `TEXTS`, and behind the last one what would make a terminal do as it says."""
    rows = [conversation(small_tokenizer, *texts) for texts in TEXTS]
    vocabulary = find_vocabulary("none", small_tokenizer)
    escape = next(i for i in range(small_tokenizer.vocab_size) if vocabulary.texts([i]) == [ESCAPE])
    rows[-1] = ([*rows[-1][0], escape], [*rows[-1][1], 2])
    return write_rows(tmp_path / "rows", rows)


def test_plain_text(prefix: str, small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output, _ = show(capsys, "--data_path", prefix, *flags_of(small_model), "--seq_length", "30")
    assert code == 0
    assert ESCAPE not in output  # neither ours, off a terminal, nor that of the data
    assert "│<U+001B>│" in output
    assert "│[<|im_start|>]│" in output
    assert "│␣│" in output
    assert re.search(r"^system, weight 0 +│", output, flags=re.M)
    assert "assistant, weight 1" in output
    assert "assistant, cut off" in output


@pytest.mark.parametrize(
    ("color", "no_color", "coloured"),
    [("always", "1", True), ("never", "", False), ("auto", "", True), ("auto", "1", False)],
)
def test_colours(
    prefix: str,
    small_model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    color: str,
    no_color: str,
    coloured: bool,
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    code, output, _ = show(capsys, "--data_path", prefix, *flags_of(small_model), "--color", color)
    assert (code, "\x1b[" in output) == (0, coloured)
    if coloured:
        assert output.count("\x1b[0m") == len(re.findall(r"\x1b\[[0-9;]+m", output)) / 2  # each colour ends
        assert re.search(r"\x1b\[32;1;4m the", output)  # the assistant's: green, bold, underlined
        assert re.search(r"\x1b\[36;7m<\|im_start\|>", output)  # the prompter's special token: reversed


def test_plain_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write_documents(tmp_path / "text", [[5, 6, 7, 2], [], [8, 2], [9, 9, 9, 2]])
    code, output, error = show(capsys, "--data_path", prefix, "--seq_length", "10")
    assert (code, "10 tokens are less than one sample" in error) == (1, True)
    assert "supervised" not in output
    code, output, _ = show(capsys, "--data_path", prefix, "--rows", "3")
    assert code == 0
    assert "│9│9│9│2│" in output


class Page(HTMLParser):
    """What a browser would fetch or run, and the text of the tokens."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.active: list[str] = []
        self.tokens: list[str] = []
        self._in_token = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        names = dict(attributes)
        if tag in {"script", "link", "img", "iframe", "object"} or {"src", "href", "onload", "onclick"} & names.keys():
            self.active.append(tag)
        self._in_token = "title" in names
        if self._in_token:
            self.tokens.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_token = False

    def handle_data(self, data: str) -> None:
        if self._in_token:
            self.tokens[-1] += data


def test_page(prefix: str, small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "page.html"
    argv = ["--data_path", prefix, *flags_of(small_model), "--seq_length", "60", "--micro_batch_size", "1"]
    code, output, _ = show(capsys, *argv, "--html", str(file))
    text = file.read_text(encoding="utf-8")
    page = Page(text)
    assert code == 0
    assert page.active == []
    assert not re.search(r"https?:|url\(|@import", text)
    (report,) = inspect_run({"data_path": (prefix,), **typed(small_model)}, 1, Selection(count=3))
    expected = [token.visible for sample in report.samples for part in sample.parts for token in part.tokens]
    assert page.tokens == expected
    assert "<script>" in "".join(page.tokens)
    assert re.search(r'title="id \d+ · position 0 · system · loss weight 0"', text)
    for line in output.splitlines()[-4:]:
        assert all(cell in text for cell in re.split(r" {2,}", line)), line
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_page_tells_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = write_rows(tmp_path / "a&b", [([5, 6], [1, 1])])
    file = tmp_path / "page.html"
    assert show(capsys, "--data_path", prefix, "--html", str(file))[0] == 1
    assert "a&amp;b: nothing is supervised" in file.read_text(encoding="utf-8")


def test_picture_of_several_prefixes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    rows, text = write_rows(tmp_path / "rows", GOOD), write_documents(tmp_path / "text", [[5, 6, 7]])
    file = tmp_path / "picture"
    code, output, _ = show(capsys, "--train_data_path", "0.3", rows, "0.7", text, "--png", str(file))
    assert code == 0
    assert [line for line in output.splitlines() if line in (rows, text)] == [rows, text]
    assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize("flag", ["--html", "--png"])
def test_a_file_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    if flag == "--png":
        pytest.importorskip("matplotlib")
    prefix = write_rows(tmp_path / "rows", GOOD)
    code, _, error = show(capsys, "--data_path", prefix, flag, str(tmp_path / "none" / "file"))
    assert (code, len(error.splitlines())) == (1, 1)


def test_a_picture_needs_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    prefix = write_rows(tmp_path / "rows", GOOD)
    code, _, error = show(capsys, "--data_path", prefix, "--png", "a.png")
    assert (code, "pip install matplotlib" in error) == (2, True)
    assert show(capsys, "--data_path", prefix)[0] == 0


def test_another_tokenizer_than_the_data_has(
    tmp_path: Path, small_model: Path, small_tokenizer: SentencePieceTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = write_rows(tmp_path / "rows", GOOD)
    argv = ["--data_path", prefix]
    assert "says what the ids are: none is checked" in show(capsys, *argv)[1]
    (tmp_path / "rows-tokenizer.json").write_text(description_text(small_tokenizer))
    assert "warning" not in show(capsys, *argv, *flags_of(small_model))[1]
    assert "without --tokenizer_type ids are shown as numbers" in show(capsys, *argv)[1]
    other = [*flags_of(small_model)[:-1], "<|im_end|>,<|im_start|>"]
    assert "warning: the tokenizer is not that of the data" in show(capsys, *argv, *other)[1]


def test_real_data(shared_data: Path, tmp_path: Path) -> None:
    prefix, model = str(tmp_path / "cot"), shared_data / "tokenizers" / "mistral-v1.model"
    keys = ["--question_key", "question", "--answer_key", "response", "--system_key", "system_prompt"]
    source = ["--input", str(shared_data / "data" / "cot_valid.jsonl"), "--output_prefix", prefix, *keys]
    runpy.run_path(str(ROOT / "instruct" / "preprocess_instruct_data.py"))["main"]([*source, *flags_of(model)])
    (report,) = inspect_run({"data_path": (prefix,), **typed(model)}, 1, Selection(count=5))
    assert report.problems() == []
    figures, sizes = report.figures, np.array([len(sample.parts) for sample in report.samples])
    assert (figures.rows, figures.duplicates, figures.double_bos, figures.unsupervised) == (643, 0, 0, 0)
    assert figures.ids[[32005, 32006]].tolist() == [3 * 643] * 2  # the markers of three messages a row
    assert sizes.tolist() == [3] * 5
    for sample in report.samples:
        assert [part.name for part in sample.parts] == ["system", "prompter", "assistant"]
        assert "".join(token.text for token in sample.parts[2].tokens).startswith("<|im_start|> answer\n")
    lines = list(TextReport(is_coloured=False).lines(report))
    assert lines.count("assistant, weight 1  │[<|im_start|>]│ answer│↵│") == 5


def test_showing_needs_no_torch(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows", GOOD)
    code = (
        "import runpy, sys\n"
        f"runpy.run_path('tools/show_data.py')['main'](['--data_path', {str(tmp_path / 'rows')!r}])\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
