"""Texts for pretraining: what is written for them, and what is left out or refused."""

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron.config import PreprocessConfig, TokenizerConfig, UsageError
from megatron.data.documents import DocumentEncoder, DocumentSummary
from megatron.data.indexed import IndexedDataset
from megatron.data.preprocess import preprocess
from megatron.data.sources import find_sources
from megatron.tokenizer import build_tokenizer, difference, read_description
from megatron.tokenizer.sentencepiece import SentencePieceTokenizer

TEXTS = ["the sum of 1 and 2", "", "is 3\n\n\n  and ü \u2028", "question", "x" * 500]
Run = Callable[..., DocumentSummary]


pytestmark = pytest.mark.usefixtures("small_chunks")


@pytest.fixture
def run(small_tokenizer: SentencePieceTokenizer, tmp_path: Path) -> Run:
    """Preprocess `rows` into `out/corpus`."""

    def run(
        rows: Sequence[Any],
        tokenizer: Any = small_tokenizer,
        *,
        keys: tuple[str, ...] = ("text",),
        append_eod: bool = False,
        special_in_text: str = "keep",
        **options: Any,
    ) -> DocumentSummary:
        path = tmp_path / "in.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = PreprocessConfig(
            **{"input": (str(path),), "output_prefix": str(tmp_path / "out" / "corpus"), "workers": 1, **options}
        )
        encoder = DocumentEncoder(tokenizer, keys, append_eod=append_eod, special_in_text=special_in_text)
        summary = preprocess(find_sources(config), encoder, config)
        assert isinstance(summary, DocumentSummary)
        return summary

    return run


def written(tmp_path: Path, key: str = "text") -> list[list[int]]:
    dataset = IndexedDataset(tmp_path / "out" / f"corpus_{key}_document")
    return [dataset[i].tolist() for i in range(len(dataset))]


def output_bytes(tmp_path: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def as_rows(texts: Sequence[Any]) -> list[dict[str, Any]]:
    return [{"text": text} for text in texts]


def golden_files(documents: Sequence[Sequence[int]], code: str, number: int) -> tuple[bytes, bytes]:
    """The two files, from the table in the format's description."""
    width, sizes = struct.calcsize(code), [len(document) for document in documents]
    pointers = [width * sum(sizes[:place]) for place in range(len(sizes))]
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, number, len(sizes), len(sizes) + 1)
    index += struct.pack(f"<{len(sizes)}i", *sizes) + struct.pack(f"<{len(sizes)}q", *pointers)
    index += struct.pack(f"<{len(sizes) + 1}q", *range(len(sizes) + 1))
    return b"".join(struct.pack(f"<{len(document)}{code}", *document) for document in documents), index


@pytest.mark.parametrize("append_eod", [False, True])
def test_files_have_the_bytes_of_the_format(
    append_eod: bool, run: Run, small_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    summary = run(as_rows(TEXTS), append_eod=append_eod)
    end = [small_tokenizer.special_tokens["<EOD>"]] * append_eod
    documents = [small_tokenizer.encode(text) + end for text in TEXTS if text]
    prefix = tmp_path / "out" / "corpus_text_document"
    files = (Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes())
    assert files == golden_files(documents, "H", 8)
    tokens = sum(map(len, documents))
    assert (summary.rows, summary.tokens, summary.longest) == (5, tokens, max(map(len, documents)))
    assert str(summary).startswith(f"5 rows, {tokens:,} tokens, longest row ")
    assert summary.notes() == ["1 empty texts are left out"]
    assert difference(read_description(prefix.parent, f"{prefix.name}-tokenizer.json"), small_tokenizer) is None
    assert len(output_bytes(tmp_path)) == 3


def test_a_large_vocabulary_takes_four_bytes(
    run: Run, small_tokenizer: SentencePieceTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron.data.indexed.SMALL_VOCABULARY", small_tokenizer.vocab_size)
    run(as_rows(["question 3"]))
    bin_file, idx_file = golden_files([small_tokenizer.encode("question 3")], "i", 4)
    assert output_bytes(tmp_path)["corpus_text_document.bin"] == bin_file
    assert output_bytes(tmp_path)["corpus_text_document.idx"] == idx_file


def test_each_key_has_files_of_its_own(run: Run, small_tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    rows = [{"title": f"sum {i}" * (i != 1), "text": "is the sum " * i, "other": None} for i in range(4)]
    summary = run(rows, keys=("text", "title"))
    counts = {}
    for key in ("text", "title"):
        expected = [small_tokenizer.encode(str(row[key])) for row in rows if row[key]]
        assert written(tmp_path, key) == expected
        counts[key] = sum(map(len, expected))
    assert summary.tokens_per_key == counts
    assert f"4 rows, {sum(counts.values())} tokens (text {counts['text']}, title {counts['title']}), " in str(summary)
    assert summary.empty == 2
    assert len(output_bytes(tmp_path)) == 6


def test_output_does_not_depend_on_workers_and_chunks(run: Run, tmp_path: Path) -> None:
    rows = as_rows([f"the sum of {i} and {i % 7}" * (i % 5) for i in range(60)])
    outputs = []
    for workers, chunk_size in ((1, 1000), (1, 1), (2, 7), (3, 2), (4, 25)):
        run(rows, append_eod=True, workers=workers, chunk_size=chunk_size)
        outputs.append(output_bytes(tmp_path))
    assert all(output == outputs[0] for output in outputs)


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "FalconTokenizer"])
def test_documents_are_encoded_as_the_tokenizer_encodes(kind: str, run: Run, shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "tokenizers"
    files = {
        "SentencePieceTokenizer": {"vocab_file": folder / "mistral-v1.model"},
        "FalconTokenizer": {"vocab_file": folder / "falcon/tokenizer.json"},
    }[kind]
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type=kind, **{k: str(v) for k, v in files.items()}))
    with (shared_data / "data" / "cot_valid.jsonl").open() as file:
        texts = [json.loads(line)["response"] for line in file][:50]
    run(as_rows(texts), tokenizer, append_eod=True, workers=2)
    assert written(tmp_path) == [[*tokenizer.encode(text), tokenizer.eod_id] for text in texts]


def test_special_strings_in_a_text(run: Run, small_tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    rows = as_rows(["a", "a</s>b<s>", "<CLS> is harmless", "<EOD>"])
    summary = run(rows)
    assert written(tmp_path) == [small_tokenizer.encode(row["text"]) for row in rows]
    assert summary.forgeable == 2
    assert [note for note in summary.notes() if note.startswith("warning")] == [
        f"warning: 2 rows contain end tokens in their own text, which end a document early (the first: "
        f"{tmp_path / 'in.jsonl'}, line 2); --special_in_text text makes them ordinary text"
    ]
    assert run(rows, special_in_text="text").notes() == []
    assert written(tmp_path) == [small_tokenizer.encode_plain(row["text"]) for row in rows]
    with pytest.raises(ValueError, match=r"line 2: the value of key 'text' has the special string '</s>' \(--spec"):
        run(rows, special_in_text="error")
    with pytest.raises(ValueError, match=r"line 1: the value of key 'text' has the special string '<CLS>'"):
        run(rows[2:], special_in_text="error")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}, {"text": 3}], "line 2: the value of key 'text' is a number, not a string; --skip_bad_lines"),
        ([{"text": "a"}, {"txt": "a"}], "line 2: key 'text' is missing; --skip_bad_lines"),
        ([{"text": "a"}, "a"], "line 2: not a JSON object but a string; --skip_bad_lines"),
        ([], "no rows in .*jsonl: nothing to write to .*corpus_text_document"),
        (as_rows(["", ""]), "no rows in .*jsonl: nothing to write to .*corpus_text_document"),
    ],
)
def test_bad_input_leaves_nothing(rows: list[Any], message: str, run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(rows, workers=2)
    assert output_bytes(tmp_path) == {}


def test_bad_lines_can_be_skipped(run: Run, small_tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    summary = run([{"text": "a"}, {"text": None}, [], {"text": "b"}], skip_bad_lines=True)
    assert written(tmp_path) == [small_tokenizer.encode("a"), small_tokenizer.encode("b")]
    assert (summary.rows, summary.skipped) == (2, 2)


def test_mistakes(small_tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--json_keys a b a: name each key once"):
        DocumentEncoder(small_tokenizer, ("a", "b", "a"))
    with pytest.raises(UsageError, match="--json_keys b/c: a key names files"):
        DocumentEncoder(small_tokenizer, ("a", "b/c"))
    monkeypatch.setattr(small_tokenizer, "eod_id", None)
    with pytest.raises(UsageError, match="--append_eod: the tokenizer has no end-of-document token"):
        DocumentEncoder(small_tokenizer, append_eod=True)
