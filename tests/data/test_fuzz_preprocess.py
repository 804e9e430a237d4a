"""Hostile files through both scripts: what a naive reader finds in them, or an error that says where; never a trace."""

import contextlib
import gzip
import importlib.util
import io
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron.config import run_entry
from megatron.data.indexed import IndexedDataset
from megatron.data.instruction import InstructionDataset
from megatron.tokenizer.chat import Role, render_messages
from megatron.tokenizer.sentencepiece import SentencePieceTokenizer

ROOT = Path(__file__).resolve().parents[2]
KEYS = ("text", "q")
TEXT = st.text(max_size=30) | st.sampled_from(
    ["", "\u2028\x85\r", "a\0b", "</s>", "<|im_end|>", "\ufeff", "x" * 100_000]
)
VALUE = (
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.lists(TEXT, max_size=2) | st.just({"text": "x"})
)
ROW = st.fixed_dictionaries({"text": TEXT, "q": TEXT}, optional={"other": VALUE})
ODD_ROW = st.dictionaries(st.sampled_from([*KEYS, "other"]), VALUE)


def dumped(ascii_only: bool) -> Callable[[Any], bytes]:
    return lambda value: json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")


GOOD_LINE = ROW.map(dumped(True)) | ROW.map(dumped(False))
HOSTILE = [
    *(b"", b" \t\r", b"\0", b"\xef\xbb\xbf", b"\xff\xfe{\0}\0", b"{}{}", b'{"text": "a'),
    *(b'{"text": "\\ud800", "q": ""}', b'{"text": "\xed\xa0\x80", "q": ""}', b'{"text": "a\tb", "q": ""}'),
    *(b"[" * 100_000, b'{"text":' * 20_000, b'{"text": ' + b"[" * 300 + b"]" * 300 + b"}"),
    b'{"q": "", "text": "x", "other": ' + b"[" * 300 + b"]" * 300 + b', "more": NaN}',
    '{"q": "\u2028\x85", "text": "\x0b\u2029"}'.encode(),
]
BAD_LINE = st.binary(max_size=40) | (ODD_ROW | VALUE).map(dumped(True)) | st.sampled_from(HOSTILE)
LINES = st.lists(GOOD_LINE | BAD_LINE, max_size=8)
LINE_ENDS = st.sampled_from([b"\n", b"\r\n", b"\r", "\u2028".encode()])


@dataclass(frozen=True)
class Script:
    """A script, its flags, and which ids it should make of a good row; None is nothing at all."""

    path: str
    flags: str
    keys: tuple[str, ...]
    expected: Callable[[SentencePieceTokenizer, dict[str, str]], list[int]]
    written: Callable[[Path], Sequence[Any]]


def read_documents(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(f"{prefix}_text_document")
    return [dataset[i].tolist() for i in range(len(dataset))]


def read_rows(prefix: Path) -> list[list[int]]:
    dataset = InstructionDataset(prefix)
    return [dataset[i][0].tolist() for i in range(len(dataset))]


def conversation(tokenizer: SentencePieceTokenizer, row: dict[str, str]) -> list[int]:
    return tokenizer.encode(render_messages([(Role.PROMPTER, row["q"]), (Role.ASSISTANT, row["text"])]))


SCRIPTS = {
    "documents": Script(
        "tools/preprocess_data.py",
        "--json_keys text",
        ("text",),
        lambda tokenizer, row: tokenizer.encode(row["text"]),
        read_documents,
    ),
    "instruction": Script(
        "instruct/preprocess_instruct_data.py",
        "--question_key=q --answer_key=text",
        ("q", "text"),
        conversation,
        read_rows,
    ),
}


@pytest.fixture(autouse=True, scope="module")
def in_process() -> Iterator[None]:
    """Small chunks, encoded in this process: starting others would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron.data.preprocess.SMALLEST_CHUNK", 1)
        patch.setattr("megatron.data.sources.COMPRESSED_BLOCK", 64)
        patch.setattr("megatron.data.preprocess.map_in_order", lambda function, items, _: (function(i) for i in items))
        patch.setattr("signal.signal", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def run(small_tokenizer: SentencePieceTokenizer) -> Callable[..., tuple[int, str]]:
    """Exit code and what is said of a run of a script in this process."""
    modules = {script.path: loaded(script.path, small_tokenizer) for script in SCRIPTS.values()}

    def run(script: Script, *arguments: str) -> tuple[int, str]:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = run_entry(modules[script.path].main, [*script.flags.split(), *arguments])
        return code, said.getvalue()

    return run


def loaded(path: str, tokenizer: SentencePieceTokenizer) -> Any:
    """The script as a module; its tokenizer is always the same."""
    spec = importlib.util.spec_from_file_location("script", ROOT / path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.__dict__["build_tokenizer"] = lambda _: tokenizer
    return module


def good_rows(content: bytes, keys: Sequence[str]) -> tuple[list[dict[str, str]], list[int]]:
    """The rows that a naive reader finds, and the numbers of the lines that are none."""
    rows, bad = [], []
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines[:-1] if lines[-1] == b"" else lines, 1):
        try:
            row = json.loads(line.decode())
            for key in keys:
                row[key].encode()
            rows.append(row)
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            bad.append(number)
    return rows, bad


def judge(
    script: Script, outcome: tuple[int, str], content: bytes, path: Path, tokenizer: SentencePieceTokenizer, skip: bool
) -> None:
    """Compare what a run did with what a naive reader would have done."""
    code, said = outcome
    rows, bad = good_rows(content, script.keys)
    sequences = [ids for row in rows if (ids := script.expected(tokenizer, row))]
    left = {file.name for file in path.parent.iterdir()} - {path.name}
    if bad and not skip:
        assert code == 1
        assert f"failed: {path}, line {bad[0]}: " in said
    elif not sequences:
        assert code == 1
        assert f"failed: no rows in {path}" in said
    else:
        assert code == 0, said
        assert len(left) in (3, 5)
        assert script.written(path.parent / "out") == sequences
        assert re.findall(r"skipped: .*, line (\d+): ", said) == [str(number) for number in bad]
    assert code == 0 or (left == set() and len(said.splitlines()) == 1)


@pytest.mark.parametrize("name", SCRIPTS)
@settings(max_examples=60, deadline=None)
@example(lines=HOSTILE, end=b"\n", tail=True, mark=True, skip=True, size=2, compressed=True)
@example(lines=HOSTILE, end=b"\r\n", tail=False, mark=False, skip=True, size=1, compressed=False)
@given(
    lines=LINES, end=LINE_ENDS, tail=st.booleans(), mark=st.booleans(), skip=st.booleans(), size=st.integers(1, 3),
    compressed=st.booleans(),
)  # fmt: skip
def test_hostile_lines(
    name: str,
    lines: list[bytes],
    end: bytes,
    tail: bool,
    mark: bool,
    skip: bool,
    size: int,
    compressed: bool,
    run: Callable[..., tuple[int, str]],
    small_tokenizer: SentencePieceTokenizer,
) -> None:
    content = b"\xef\xbb\xbf" * mark + end.join(lines) + end * tail
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("in.jsonl.gz" if compressed else "in.jsonl")
        path.write_bytes(gzip.compress(content, 1) if compressed else content)
        flags = [f"--input={path}", f"--output_prefix={folder}/out", f"--chunk_size={size}"]
        outcome = run(SCRIPTS[name], *flags, *["--skip_bad_lines"] * skip)
        judge(SCRIPTS[name], outcome, content, path, small_tokenizer, skip)


@settings(max_examples=60, deadline=None)
@given(lines=st.lists(GOOD_LINE, min_size=1, max_size=4), cut=st.integers(0, 400), flip=st.integers(0, 400) | st.none())
def test_damaged_compression(
    lines: list[bytes],
    cut: int,
    flip: int | None,
    run: Callable[..., tuple[int, str]],
    small_tokenizer: SentencePieceTokenizer,
) -> None:
    """Cut off or with a wrong byte: either nothing is said to be good, or the content is not concerned."""
    content, script = b"\n".join(lines), SCRIPTS["documents"]
    for ending, compress, package in ((".gz", gzip.compress, "zlib"), (".zst", checked_zstd, "zstandard")):
        if not importlib.util.find_spec(package):
            continue
        damaged = bytearray(compress(content))
        if flip is None:
            del damaged[-1 - cut % len(damaged) :]
        else:
            damaged[flip % len(damaged)] ^= 1 << cut % 8
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"in.jsonl{ending}"
            path.write_bytes(damaged)
            code, said = run(script, f"--input={path}", f"--output_prefix={folder}/out")
            if code == 0:
                judge(script, (code, said), content, path, small_tokenizer, False)
            else:
                assert code == 1
                assert re.search(f"failed: (no rows in )?{path}", said), said
                assert list(Path(folder).iterdir()) == [path]


def checked_zstd(content: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


COLUMN = (
    st.lists(TEXT | st.none(), min_size=3, max_size=3)
    | st.lists(st.binary(max_size=9), min_size=3, max_size=3)
    | st.lists(st.integers(-9, 9) | st.none(), min_size=3, max_size=3)
    | st.lists(st.lists(TEXT, max_size=2), min_size=3, max_size=3)
)


@settings(max_examples=40, deadline=None)
@given(columns=st.dictionaries(st.sampled_from([*KEYS, "other"]), COLUMN, min_size=1), skip=st.booleans())
def test_odd_tables(
    columns: dict[str, list[Any]],
    skip: bool,
    run: Callable[..., tuple[int, str]],
    small_tokenizer: SentencePieceTokenizer,
) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    script = SCRIPTS["documents"]
    texts = columns.get("text", [None] * 3)
    sequences = [ids for text in texts if isinstance(text, str) and (ids := small_tokenizer.encode(text))]
    bad = [row for row, text in enumerate(texts) if not isinstance(text, str)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "in.parquet"
        parquet.write_table(pyarrow.table(columns), path)
        flags = [f"--input={path}", f"--output_prefix={folder}/out", "--chunk_size=2"]
        code, said = run(script, *flags, *["--skip_bad_lines"] * skip)
        if bad and not skip:
            assert (code, f"failed: {path}, row {bad[0]}: " in said) == (1, True)
        elif not sequences:
            assert (code, f"failed: no rows in {path}" in said) == (1, True)
        else:
            assert code == 0, said
            assert script.written(Path(folder) / "out") == sequences
        assert code == 0 or list(Path(folder).iterdir()) == [path]
