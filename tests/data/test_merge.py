"""Merged datasets: equal to preprocessing all of the rows at once; and what is refused."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.config import PreprocessConfig, UsageError
from megatron.data.documents import DocumentEncoder
from megatron.data.indexed import IndexedDataset, IndexedWriter
from megatron.data.merge import merge_datasets
from megatron.data.preprocess import Encoder, preprocess
from megatron.data.rows import RowEncoder, RowFormat
from megatron.data.sources import find_sources
from megatron.tokenizer.sentencepiece import SentencePieceTokenizer

PARTS = {
    "b": [{"text": "the sum of 1 and 2", "q": "question", "a": "3"}],
    "a": [{"text": f"is {i}", "q": f"sum {i}", "a": f"{i} " * i} for i in range(40)],
    "c-text": [{"text": "x" * 3000, "q": "", "a": "answer"}, {"text": "y", "q": "y", "a": "z"}],
}
Write = Callable[..., str]


def documents(tokenizer: SentencePieceTokenizer) -> Encoder:
    return DocumentEncoder(tokenizer, append_eod=True)


def rows(tokenizer: SentencePieceTokenizer) -> Encoder:
    return RowEncoder(tokenizer, RowFormat(question_key="q", answer_key="a"))


KINDS: dict[str, tuple[Callable[..., Encoder], bool]] = {
    "documents": (documents, False),
    "instruction": (rows, False),
    "instruction as the reference": (rows, True),
}


@pytest.fixture
def write(small_tokenizer: SentencePieceTokenizer, tmp_path: Path) -> Write:
    """Preprocess rows to `name`; returns the prefix as training names it."""

    def write(
        name: str, content: Sequence[Any], kind: str = "documents", tokenizer: SentencePieceTokenizer = small_tokenizer
    ) -> str:
        jsonl = tmp_path / "in.jsonl"
        jsonl.write_text("".join(json.dumps(row) + "\n" for row in content))
        build, reference_doc_idx = KINDS[kind]
        encoder = build(tokenizer)
        config = PreprocessConfig(input=(str(jsonl),), output_prefix=str(tmp_path / name), workers=1)
        preprocess(find_sources(config), encoder, config, reference_doc_idx=reference_doc_idx)
        return encoder.datasets(config.output_prefix)[0]

    return write


def files(folder: Path, prefix: str) -> dict[str, bytes]:
    return {path.name.removeprefix(prefix): path.read_bytes() for path in folder.glob(f"{prefix}*")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("as_folder", [True, False])
def test_merging_equals_preprocessing_at_once(kind: str, as_folder: bool, write: Write, tmp_path: Path) -> None:
    prefixes = {name: write(f"parts/{name}", part, kind) for name, part in PARTS.items()}
    order = sorted(PARTS) if as_folder else list(PARTS)
    inputs = [str(tmp_path / "parts")] if as_folder else [prefixes[name] for name in order]
    whole = write("whole/all", [row for name in order for row in PARTS[name]], kind)
    summary = merge_datasets(inputs, str(tmp_path / "merged" / "all"))
    expected = files(tmp_path / "whole", Path(whole).name)
    assert len(expected) == (3 if kind == "documents" else 5)
    assert files(tmp_path / "merged", "all") == expected
    assert summary.prefixes == [prefixes[name] for name in order]
    assert (summary.sequences, summary.notes()) == (43, [])
    half = "" if kind == "documents" else "-text"
    assert summary.tokens == int(IndexedDataset(whole + half).sizes.sum())
    assert str(summary).startswith(f"3 datasets, 43 sequences, {summary.tokens:,} tokens, ")


def test_documents_of_several_sequences_stay_together(tmp_path: Path) -> None:
    """As other tools write them, a sequence a sentence."""
    for name, bounds in (("a", [0, 2, 3]), ("b", [0, 1, 4])):
        with IndexedWriter(tmp_path / name, "<u2") as writer:
            for size in range(bounds[-1]):
                writer.append(np.arange(size))
        path = tmp_path / f"{name}.idx"
        sequences = bounds[-1]
        head = path.read_bytes()[: 34 + 12 * sequences]
        head = head[:26] + np.array([len(bounds)], "<u8").tobytes() + head[34:]
        path.write_bytes(head + np.array(bounds, "<i8").tobytes())
    merge_datasets([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "both"))
    merged = IndexedDataset(tmp_path / "both")
    assert merged.doc_idx.tolist() == [0, 2, 3, 4, 7]
    assert [len(merged[i]) for i in range(len(merged))] == [0, 1, 2, 0, 1, 2, 3]


def test_without_the_tokenizer_of_one_the_output_has_none(write: Write, tmp_path: Path) -> None:
    first, second = write("a", PARTS["a"]), write("b", PARTS["b"])
    merge_datasets([first, second], str(tmp_path / "out" / "both"))
    Path(f"{second}-tokenizer.json").unlink()
    summary = merge_datasets([first, second], str(tmp_path / "out" / "both"))
    assert summary.notes() == [
        f"warning: the output does not say by which tokenizer: there is no {second}-tokenizer.json"
    ]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"both.bin", "both.idx"}


@pytest.mark.parametrize("name", ["missing", "empty", "empty/x", "a_text_document.bin"])
def test_inputs_that_mean_nothing(name: str, write: Write, tmp_path: Path) -> None:
    write("a", PARTS["a"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=f"--input .*{name}: neither a folder with indexed datasets nor the prefix"):
        merge_datasets([str(tmp_path / name)], str(tmp_path / "out" / "x"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("output", ["parts/x", "./parts/../parts/x"])
def test_the_output_is_not_in_a_folder_of_the_input(output: str, write: Write, tmp_path: Path) -> None:
    write("parts/a", PARTS["a"])
    with pytest.raises(UsageError, match=r"is in the folder --input .*parts: the next run would merge it as well"):
        merge_datasets([str(tmp_path / "parts")], f"{tmp_path}/{output}")


def test_the_output_is_not_an_input(write: Write, tmp_path: Path) -> None:
    prefix = write("a", PARTS["a"])
    before = files(tmp_path, "a")
    with pytest.raises(UsageError, match=r"--output_prefix .* is one of the inputs"):
        merge_datasets([prefix], prefix)
    assert files(tmp_path, "a") == before


def test_kinds_are_not_mixed(write: Write, tmp_path: Path) -> None:
    plain, instruction = write("a", PARTS["a"]), write("b", PARTS["b"], "instruction")
    with pytest.raises(UsageError, match=f"{instruction} is instruction data, but {plain} is not; merge each"):
        merge_datasets([plain, instruction], str(tmp_path / "out" / "x"))


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize(
    ("kind", "spoil", "message"),
    [
        ("documents", lambda path: cut_off(path / "b_text_document.bin"), r"b_text_document\.bin is .* bytes long"),
        ("documents", lambda path: (path / "b_text_document.bin").unlink(), r"missing .*b_text_document\.bin"),
        ("documents", lambda path: (path / "b_text_document.idx").unlink(), r"missing .*b_text_document\.idx"),
        ("instruction", lambda path: (path / "b-role.idx").unlink(), r"missing .*b-role\.idx"),
        (
            "instruction",
            lambda path: [(path / f"b-text{end}").unlink() for end in (".bin", ".idx")],
            r"missing .*b-text\.bin and .*b-text\.idx",
        ),
        (
            "instruction",
            lambda path: [shutil.copy(path / f"a-role{end}", path / f"b-role{end}") for end in (".bin", ".idx")],
            r"b-text\.idx has 1 rows, but .*b-role\.idx has 40",
        ),
        ("documents", lambda path: (path / "b_text_document-tokenizer.json").write_text("{"), "does not describe a"),
    ],
)
def test_damaged_inputs(kind: str, spoil: Callable[[Path], None], message: str, write: Write, tmp_path: Path) -> None:
    for name in "ab":
        write(f"parts/{name}", PARTS[name], kind)
    merge_datasets([str(tmp_path / "parts")], str(tmp_path / "out" / "both"))
    before = files(tmp_path / "out", "")
    spoil(tmp_path / "parts")
    with pytest.raises((ValueError, OSError), match=message):
        merge_datasets([str(tmp_path / "parts")], str(tmp_path / "out" / "both"))
    assert files(tmp_path / "out", "") == before


def test_data_that_do_not_go_together(
    write: Write, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write("a", PARTS["a"])

    def merge(other: str, base: str = first) -> None:
        merge_datasets([base, other], str(tmp_path / "out" / "x"))

    more = SentencePieceTokenizer.from_file(small_model, extra_tokens=["<|im_start|>", "<|im_end|>", "<more>"])
    with pytest.raises(ValueError, match=r"the tokenizer of .*more_text_document-tok.* is not that of .*: special"):
        merge(write("more", PARTS["b"], tokenizer=more))
    rows = write("rows", PARTS["b"], "instruction")
    with pytest.raises(ValueError, match=r"documents of .*old-text.idx do not end where it ends, as in .*rows-text"):
        merge(write("old", PARTS["b"], "instruction as the reference"), rows)
    monkeypatch.setattr("megatron.data.indexed.SMALL_VOCABULARY", 0)
    with pytest.raises(ValueError, match=r"large_text_document.idx has elements of type int32, but .* of uint16"):
        merge(write("large", PARTS["b"]))
    assert not (tmp_path / "out").exists()


def test_an_interrupt_leaves_nothing(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write("a", PARTS["a"], "instruction")
    copied = []

    def interrupt_the_second(self: IndexedWriter, dataset: IndexedDataset, progress: Any) -> None:
        copied.append(dataset)
        if len(copied) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(IndexedWriter, "copy", interrupt_the_second)
    with pytest.raises(KeyboardInterrupt):
        merge_datasets([prefix], str(tmp_path / "out" / "x"))
    assert files(tmp_path / "out", "") == {}
