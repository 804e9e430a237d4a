"""What is said of a tokenizer that is not the stored one."""

from pathlib import Path

import pytest
from tiny_tokenizers import byte_level

from megatron.config import TokenizerConfig
from megatron.tokenizer import Tokenizer, build_tokenizer, describe, difference, read_description
from megatron.tokenizer.sentencepiece import SentencePieceTokenizer

LINES = {
    "type": "the type was SentencePieceTokenizer and is HFTokenizer",
    "one more": "special token number 2 was missing and is '<a>' (id 281)",
    "one less": "special token number 2 was '<a>' (id 281) and is missing",
    "order": "special token number 2 was '<a>' (id 281) and is '<b>' (id 281)",
    "id": "special token number 1 was '<|endoftext|>' (id 7) and is '<|endoftext|>' (id 280)",
    "pad": "the pad id was 3 and is None",
    "pieces": "the vocabulary has other pieces, though type, size and special tokens are equal",
}


def build(path: Path, names: str | None = None) -> Tokenizer:
    return build_tokenizer(
        TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=str(path), vocab_extra_ids_list=names)
    )


def test_no_difference(tmp_path: Path, small_tokenizer: SentencePieceTokenizer) -> None:
    for tokenizer in (small_tokenizer, build(byte_level(tmp_path / "source"), "<a>")):
        tokenizer.save(tmp_path)
        assert read_description(tmp_path) == describe(tokenizer)
        assert difference(read_description(tmp_path), tokenizer) is None


def test_the_first_difference(tmp_path: Path, small_tokenizer: SentencePieceTokenizer) -> None:
    path = byte_level(tmp_path)
    plain, one, two, turned = (build(path, names) for names in (None, "<a>", "<a>,<b>", "<b>,<a>"))
    told = {
        "type": difference(describe(small_tokenizer), plain),
        "one more": difference(describe(plain), one),
        "one less": difference(describe(one), plain),
        "order": difference(describe(two), turned),
        "id": difference({**describe(plain), "special_tokens": {"<|endoftext|>": 7}}, plain),
        "pad": difference({**describe(plain), "pad_id": 3}, plain),
        "pieces": difference({**describe(plain), "fingerprint": "0"}, plain),
    }
    assert told == LINES
    reordered = dict(reversed(list(two.special_tokens.items())))
    assert difference({"special_tokens": reordered}, two) is not None


def test_what_is_not_stored_is_not_compared(tmp_path: Path) -> None:
    tokenizer = build(byte_level(tmp_path))
    for part in ({}, {"fingerprint": tokenizer.fingerprint}, {"special_tokens": tokenizer.special_tokens, "more": 1}):
        assert difference(part, tokenizer) is None


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"tokenizer_type": 1}', "[1]"])
def test_damage(tmp_path: Path, content: str) -> None:
    (tmp_path / "special_tokens.json").write_text(content)
    with pytest.raises(ValueError, match=r"special_tokens\.json does not describe a tokenizer"):
        read_description(tmp_path)
