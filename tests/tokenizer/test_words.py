"""Words encoded one by one: always the ids that SentencePiece gives the whole text, or not done at all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from megatron.tokenizer import words
from megatron.tokenizer.sentencepiece import SentencePieceTokenizer
from megatron.tokenizer.words import WordMemo, words_are_apart

AWKWARD = [" ", "  ", "   ", "▁", "▁▁ ", "\n", "\n ", "\t", "\0", "\x7f", "\u00a0", "\u3000", "e\u0301", "日本", "🛘"]
COMMON = ["the sum", " of", "answer", "question is", "12", "<a>", "x" * 70, "un-", "'s", "(", ".", "?\n\n"]
TEXTS = st.lists(st.one_of(st.sampled_from(AWKWARD), st.sampled_from(COMMON), st.text(max_size=6)), max_size=14)
BATCHES = st.lists(TEXTS.map("".join), max_size=4)
NORMAL = sentencepiece_model_pb2.ModelProto.SentencePiece.NORMAL
USER = sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED
UNUSED = sentencepiece_model_pb2.ModelProto.SentencePiece.UNUSED
SPACES_REMOVED = "remove_extra_whitespaces"
Change = Callable[[Any], object]
APART: dict[str, Change] = {
    "plain": lambda model: None,
    "no byte fallback": lambda model: _forget_bytes(model),
    "runs of spaces": lambda model: [_add(model, piece, 0.0) for piece in ("▁▁", "▁▁▁▁", "▁▁t")],
    "user's pieces": lambda model: [_add(model, piece, 0.0, USER) for piece in ("<a>", "12", "\n\n")],
}
"""Name -> what makes a plain model another one whose words are apart."""
NOT_APART: dict[str, tuple[Change, str | None]] = {
    "reaches over a space": (lambda model: _add(model, "f▁", 0.0), "sum of it"),
    "no space in front": (lambda model: setattr(model.normalizer_spec, "add_dummy_prefix", False), "sum of"),
    "spaces removed": (lambda model: setattr(model.normalizer_spec, SPACES_REMOVED, True), "sum "),
    "space behind words": (lambda model: setattr(model.trainer_spec, "treat_whitespace_as_suffix", True), "sum of"),
    "spaces kept": (lambda model: setattr(model.normalizer_spec, "escape_whitespaces", False), "sum "),
    "no space mark": (lambda model: _rename(model, "▁", "\u0378"), None),
    "unigram": (lambda model: setattr(model.trainer_spec, "model_type", model.trainer_spec.UNIGRAM), None),
    "user's pieces with spaces": (lambda model: _add(model, "▁▁", 0.0, USER), None),
    "unused pieces": (lambda model: _add(model, "zqx", 0.0, UNUSED), None),
}
"""Name -> what makes a plain model one whose words are not apart, and a text that shows it."""


def _add(model: Any, piece: str, score: float, kind: int = NORMAL) -> None:
    model.pieces.add(piece=piece, score=score, type=kind)


def _rename(model: Any, old: str, new: str) -> None:
    next(piece for piece in model.pieces if piece.piece == old).piece = new


def _forget_bytes(model: Any) -> None:
    model.trainer_spec.byte_fallback = False
    for piece in model.pieces:
        piece.type = NORMAL if piece.type == piece.BYTE else piece.type


def changed(model: Path, change: Change) -> bytes:
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.read_bytes())
    change(proto)
    content: bytes = proto.SerializeToString()
    return content


@pytest.fixture(scope="module", params=[*APART, "mistral"])
def apart(request: pytest.FixtureRequest, exact_model: Path) -> bytes:
    """A model whose words are apart."""
    if request.param == "mistral":
        folder: Path = request.getfixturevalue("shared_data")
        return (folder / "tokenizers" / "mistral-v1.model").read_bytes()
    return changed(exact_model, APART[request.param])


def memo_of(processor: SentencePieceProcessor) -> WordMemo:
    def encode(texts: list[str]) -> list[Any]:
        return processor.encode(texts, return_type="numpy") if texts else []

    return WordMemo(encode, np.array([processor.piece_to_id("▁")], np.int32))


def ids_by(memo: WordMemo, texts: list[str]) -> list[list[int]]:
    return [ids.tolist() for ids in memo.encode(texts)]


@pytest.mark.parametrize(("most", "longest"), [(words.MOST_WORDS, words.LONGEST_WORD), (8, 4)])
def test_ids_are_those_of_the_whole_text(apart: bytes, most: int, longest: int) -> None:
    assert words_are_apart(apart)
    processor = SentencePieceProcessor(model_proto=apart)
    memo = memo_of(processor)

    @settings(deadline=None, max_examples=100)
    @given(BATCHES)
    def compare(texts: list[str]) -> None:
        assert ids_by(memo, texts) == processor.encode(texts)
        assert ids_by(memo, texts) == processor.encode(texts), "not the same a second time"
        assert len(memo._known) <= most
        assert max(map(len, memo._known)) <= longest

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(words, "MOST_WORDS", most)
        patch.setattr(words, "LONGEST_WORD", longest)
        compare()


def test_places_are_those_in_the_whole_text(apart: bytes) -> None:
    tokenizer = SentencePieceTokenizer(apart, {})
    processor = SentencePieceProcessor(model_proto=apart)

    @settings(deadline=None, max_examples=100)
    @given(BATCHES)
    def compare(texts: list[str]) -> None:
        for text, rows in zip(texts, tokenizer.encode_offsets(texts), strict=True):
            expected = processor.encode(text, return_type="offset_mapping")
            assert rows[:, 0].tolist() == expected["ids"]
            assert rows[:, 1:].tolist() == list(map(list, expected["offsets"]))

    compare()
    assert tokenizer._placed_words is not None
    assert len(tokenizer._placed_words._known) > 1


def test_real_text(shared_data: Path) -> None:
    lines = [
        *(shared_data / "data" / "cot_valid.jsonl").read_text(encoding="utf-8").splitlines(),
        *(shared_data / "data" / "chat_multiturn.jsonl").read_text(encoding="utf-8").splitlines(),
    ]
    rows = [json.loads(line) for line in lines]
    texts = [row[key] or "" for row in rows for key in ("question", "response") if key in row]
    texts += [message["content"] for row in rows for message in row.get("messages", ())]
    texts += [path.read_text(encoding="utf-8") for path in sorted(Path(words.__file__).parent.glob("*.py"))]
    processor = SentencePieceProcessor(model_file=str(shared_data / "tokenizers" / "mistral-v1.model"))
    assert ids_by(memo_of(processor), texts) == processor.encode(texts)


@pytest.mark.parametrize("name", NOT_APART)
def test_models_whose_words_are_not_apart(name: str, exact_model: Path) -> None:
    change, text = NOT_APART[name]
    model = changed(exact_model, change)
    assert not words_are_apart(model)
    processor = SentencePieceProcessor(model_proto=model)
    if text is not None:
        assert ids_by(memo_of(processor), [text]) != processor.encode([text]), "the text shows nothing"
        assert SentencePieceTokenizer(model, {}).encode(text) == processor.encode(text)


def test_normalizing_models_are_left_alone(small_model: Path) -> None:
    assert not words_are_apart(
        changed(small_model, lambda model: setattr(model.normalizer_spec, SPACES_REMOVED, False))
    )


def test_the_tokenizer_remembers_words(apart: bytes) -> None:
    tokenizer = SentencePieceTokenizer(apart, {})
    tokenizer.encode("question of the sum")
    assert tokenizer._words is not None
    assert "sum" in tokenizer._words._known
