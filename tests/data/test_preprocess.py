"""Preprocessing: what is written for good lines, and that bad ones stop it without a trace."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron.config import PreprocessConfig
from megatron.data.indexed import IndexedDataset
from megatron.data.instruction import InstructionDataset
from megatron.data.preprocess import Summary, preprocess
from megatron.data.roles import InstructionSummary
from megatron.data.rows import RowEncoder, RowFormat
from megatron.data.sources import JsonLinesFile, find_sources
from megatron.tokenizer.chat import Role, render_messages
from megatron.tokenizer.sentencepiece import SentencePieceTokenizer

GOOD = {"s": "sys", "q": "the sum of 1 and 2", "a": "is 3"}
Run = Callable[..., InstructionSummary]


def line(**changes: Any) -> bytes:
    return json.dumps({**GOOD, **changes}).encode()


pytestmark = pytest.mark.usefixtures("small_chunks")


@pytest.fixture
def run(small_tokenizer: SentencePieceTokenizer, tmp_path: Path) -> Run:
    """Preprocess `content` (bytes of the one input file, or of several) into `out/rows`."""

    def run(
        *contents: bytes, special_in_text: str = "keep", system_key: str | None = "s", workers: int = 1, **options: Any
    ) -> InstructionSummary:
        paths = [tmp_path / f"in{index}.jsonl" for index in range(len(contents))]
        for path, content in zip(paths, contents, strict=True):
            path.write_bytes(content)
        row_format = RowFormat(question_key="q", answer_key="a", system_key=system_key, special_in_text=special_in_text)
        encoder = RowEncoder(small_tokenizer, row_format)
        inputs, prefix = tuple(map(str, paths)), str(tmp_path / "out" / "rows")
        config = PreprocessConfig(input=inputs, output_prefix=prefix, workers=workers, **options)
        summary = preprocess(find_sources(config), encoder, config)
        assert isinstance(summary, InstructionSummary)
        return summary

    return run


def written(tmp_path: Path) -> list[list[int]]:
    dataset = InstructionDataset(tmp_path / "out" / "rows")
    return [dataset[i][0].tolist() for i in range(len(dataset))]


def output_bytes(tmp_path: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def expected(tokenizer: SentencePieceTokenizer, system: str | None, question: str, answer: str) -> list[int]:
    messages = [(Role.SYSTEM, system), (Role.PROMPTER, question), (Role.ASSISTANT, answer)]
    return tokenizer.encode(render_messages([(role, text) for role, text in messages if text is not None]))


def test_rows_roles_and_summary(run: Run, small_tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    summary = run(line() + b"\n" + line(s=None) + b"\n" + line(s=""))
    rows = [expected(small_tokenizer, system, GOOD["q"], GOOD["a"]) for system in ("sys", None, "")]
    assert written(tmp_path) == rows
    dataset = InstructionDataset(tmp_path / "out" / "rows")
    sizes = [
        len(small_tokenizer.encode(render_messages([(role, GOOD[key])]))) for role, key in zip(Role, "sqa", strict=True)
    ]
    assert dataset[0][1].tolist() == [role for role, size in zip(Role, sizes, strict=True) for _ in range(size)]
    assert dataset[1][1].tolist() == [1] * sizes[1] + [2] * sizes[2]
    assert (summary.rows, summary.tokens, summary.longest) == (3, sum(map(len, rows)), max(map(len, rows)))
    assert summary.tokens_per_role == [len(rows[0]) + len(rows[2]) - 2 * sum(sizes[1:]), 3 * sizes[1], 3 * sizes[2]]
    assert summary.seconds > 0
    assert str(summary).startswith(f"3 rows, {summary.tokens} tokens (system {summary.tokens_per_role[0]}, prompter ")
    assert IndexedDataset(tmp_path / "out" / "rows-text").doc_idx.tolist() == [0, 1, 2, 3]


def test_without_a_system_key(run: Run, small_tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    run(line(s=5), system_key=None)
    assert written(tmp_path) == [expected(small_tokenizer, None, GOOD["q"], GOOD["a"])]


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + line() + b"\n" + line(q="\u2028") + b"\n",
        line() + b"\r\n" + line(q="\u2028") + b"\r\n",
        line() + b"\n" + json.dumps({**GOOD, "q": "\u2028"}, ensure_ascii=False).encode(),
        b'{"score": NaN, ' + line()[1:] + b"\n" + b'{"other": "\\ud800", ' + line(q="\u2028")[1:],
        b" " + line() + b"\t\n" + line(q="\u2028"),
    ],
    ids=["byte order mark", "crlf", "raw separators", "NaN and unused surrogates", "spaces"],
)
def test_forms_of_the_file(content: bytes, run: Run, small_tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    run(content)
    assert written(tmp_path) == [expected(small_tokenizer, "sys", q, GOOD["a"]) for q in (GOOD["q"], "\u2028")]


BAD_LINES = {
    "not JSON": (b"{'q': 1}", "not JSON: "),
    "cut off": (line()[:-3], "not JSON: "),
    "two objects": (line() + line(), "not JSON: "),
    "deep": (b"[" * 100_000, "not JSON: "),
    "blank": (b"", "blank line"),
    "spaces": (b" \r", "blank line"),
    "list": (b"[1]", "not a JSON object but a list"),
    "null": (b"null", "not a JSON object but null"),
    "number": (b"1.5", "not a JSON object but a number"),
    "missing": (b'{"s": "", "q": ""}', "key 'a' is missing"),
    "missing system": (b'{"a": "", "q": ""}', "key 's' is missing"),
    "number for text": (line(q=3), "the value of key 'q' is a number, not a string"),
    "null for text": (line(a=None), "the value of key 'a' is null, not a string"),
    "list for text": (line(s=["x"]), "the value of key 's' is a list, not a string"),
    "lone surrogate": (line(q="x\ud800y"), "the value of key 'q' has a lone surrogate"),
    "invalid UTF-8": (b'{"s": "\xff"}', "not valid UTF-8 at byte 7 of the line"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_stops_everything(kind: str, run: Run, tmp_path: Path) -> None:
    bad, message = BAD_LINES[kind]
    content = b"\n".join([line(), line(), bad, line(), b"also bad"]) + b"\n"
    with pytest.raises(ValueError, match="in1") as raised:
        run(line(), content, chunk_size=2, workers=2)
    assert str(raised.value).startswith(f"{tmp_path / 'in1.jsonl'}, line 3: {message}")
    assert output_bytes(tmp_path) == {}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_a_bad_line_can_be_skipped(kind: str, run: Run, tmp_path: Path) -> None:
    bad, message = BAD_LINES[kind]
    summary = run(b"\n".join([line(), bad, line(), bad]) + b"\n", skip_bad_lines=True, chunk_size=2)
    assert (summary.rows, summary.skipped) == (2, 2)
    assert [text.removeprefix(f"{tmp_path / 'in0.jsonl'}, ")[: len(message) + 8] for text in summary.bad_lines] == [
        f"line 2: {message}",
        f"line 4: {message}",
    ]
    assert len(written(tmp_path)) == 2
    assert "2 bad lines skipped" in str(summary)


def test_the_standard_parser_judges_alike(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"\n".join([line(q="é\u2028"), *(bad for bad, _ in BAD_LINES.values()), line(a="x")])
    bad_lines, rows = run(content, skip_bad_lines=True).bad_lines, written(tmp_path)
    monkeypatch.setattr("megatron.data.chunks.orjson", None)
    assert run(content, skip_bad_lines=True).bad_lines == bad_lines
    assert written(tmp_path) == rows
    assert len(bad_lines) == len(BAD_LINES)


@pytest.mark.parametrize("content", [b"", b"\n", b"{}"])
def test_no_rows_is_an_error(content: bytes, run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no rows in .*in0\.jsonl"):
        run(content, skip_bad_lines=True)
    assert output_bytes(tmp_path) == {}


def test_output_does_not_depend_on_workers_and_chunks(run: Run, tmp_path: Path) -> None:
    contents = [b"".join(line(q=f"{name} {i}", s=f"{i % 3}") + b"\n" for i in range(25)) for name in "xyz"]
    outputs = []
    for workers, chunk_size in ((1, 1000), (1, 1), (2, 7), (3, 2), (4, 25)):
        run(*contents, workers=workers, chunk_size=chunk_size)
        outputs.append(output_bytes(tmp_path))
    assert len(outputs[0]) == 5
    assert all(output == outputs[0] for output in outputs)


def test_short_lines_are_bundled(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"123456789\n" * 25)
    source = JsonLinesFile(str(path))
    spans = [(chunk.first, chunk.start, chunk.advance) for chunk in source.chunks(3, 55, [])]
    assert spans == [(1, 0, 60), (7, 60, 60), (13, 120, 60), (19, 180, 60), (25, 240, 10)]
    assert [chunk.advance for chunk in source.chunks(20, 55, [])] == [200, 50]


def test_failure_keeps_the_former_output(run: Run, tmp_path: Path) -> None:
    run(line())
    before = output_bytes(tmp_path)
    with pytest.raises(ValueError, match="blank"):
        run(line(q="new") + b"\n\n")
    assert output_bytes(tmp_path) == before
    run(line(q="new"))
    assert output_bytes(tmp_path).keys() == before.keys()
    assert output_bytes(tmp_path) != before


def test_interrupt_leaves_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Summary, "add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(line(), workers=2)
    assert output_bytes(tmp_path) == {}


def test_a_dead_worker_leaves_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowEncoder, "encode", lambda self, chunk: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ChildProcessError, match="exit code -9"):
        run(line(), workers=2)
    assert output_bytes(tmp_path) == {}


@pytest.mark.parametrize("text", ["a<|im_end|>b", "<|im_start|>answer\n", "</s>", "<EOD>"])
def test_text_that_can_forge_a_turn(
    text: str, run: Run, small_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    content = b"\n".join([line(), line(q=text, a=text), line(s=text)])
    summary = run(content)
    assert (summary.forgeable, summary.first_forgeable) == (2, f"{tmp_path / 'in0.jsonl'}, line 2")
    assert written(tmp_path)[1] == expected(small_tokenizer, "sys", text, text)
    summary = run(content, special_in_text="text")
    assert summary.forgeable == 0
    plain = small_tokenizer.encode_plain(f"question\n{text}")
    row, start, end = written(tmp_path)[1], *(small_tokenizer.special_tokens[m] for m in ("<|im_start|>", "<|im_end|>"))
    assert (row.count(start), row.count(end)) == (3, 3)
    second = row.index(start, 1)
    assert row[second : second + len(plain) + 2] == [start, *plain, end]
    with pytest.raises(ValueError, match=r"line 2: the value of key 'q' has the special string .*special_in_text"):
        run(content, special_in_text="error")


@pytest.mark.parametrize("text", ["<CLS>", "a <s> b", "<PAD>"])
def test_other_special_strings_are_harmless(text: str, run: Run) -> None:
    assert run(line(q=text)).forgeable == 0
    with pytest.raises(ValueError, match="special string"):
        run(line(q=text), special_in_text="error")


def test_modes_agree_where_there_is_nothing_special(run: Run, tmp_path: Path) -> None:
    outputs = []
    for mode in ("keep", "text", "error"):
        run(line(q="  a < b \n\n") + b"\n" + line(s="") + b"\n" + line(a=""), special_in_text=mode)
        outputs.append(output_bytes(tmp_path))
    assert outputs[0] == outputs[1] == outputs[2]
