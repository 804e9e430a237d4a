"""Where each token lies in the text, and special strings that are taken as ordinary text."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_tokenizers import REAL, real_tokenizer
from tiny_tokenizers import byte_level, word_marks
from tokenizers import AddedToken

from megatron.config import TokenizerConfig
from megatron.tokenizer import Tokenizer, build_tokenizer
from megatron.tokenizer.special import NONCHARACTERS, SpecialStrings

AWKWARD = ["<|im_start|>", "<|im_end|>", "</s>", "answer\n", " ", "  ", "\n", "\n\n", "e\u0301", "日本", "🛘", "the"]
CHARACTERS = st.characters(exclude_categories=["Cc", "Cn", "Co", "Cs"])
"""Falcon's tokenizer has no tokens for some others, and then its library miscounts."""
TEXTS = st.lists(st.one_of(st.sampled_from(AWKWARD), st.text(CHARACTERS, max_size=4)), max_size=12).map("".join)


@pytest.fixture(scope="module", params=REAL)
def real(request: pytest.FixtureRequest, shared_data: Path) -> Tokenizer:
    return real_tokenizer(request.param, shared_data)


@settings(deadline=None, max_examples=100)
@given(st.lists(TEXTS, max_size=3))
def test_ids_are_those_of_encode_and_the_places_are_theirs(real: Tokenizer, texts: list[str]) -> None:
    arrays = real.encode_offsets(texts)
    assert [array[:, 0].tolist() for array in arrays] == real.encode_batch(texts)
    for text, array in zip(texts, arrays, strict=True):
        reached = 0
        for token_id, begin, end in [*array.tolist(), [None, len(text), len(text)]]:
            assert 0 <= begin <= end <= len(text)
            assert begin <= reached, "a gap"
            if token_id in real.special_tokens.values():
                assert real.special_tokens[text[begin:end]] == token_id
            reached = max(reached, end)


@settings(deadline=None, max_examples=100)
@given(TEXTS)
def test_hidden_special_strings_are_ordinary(real: Tokenizer, text: str) -> None:
    hidden = real.hide_special(text)
    assert len(hidden) == len(text)
    assert real.special_strings_in(hidden) == []
    (behind,) = real.encode_offsets(["<|im_start|>" + hidden])
    (plain,) = real.encode_arrays([text], special=False)
    assert behind[1:, 0].tolist() == plain.tolist()
    assert behind[0, 0] == real.special_tokens["<|im_start|>"]


def test_hiding_one_special_string_may_uncover_another() -> None:
    special = SpecialStrings({"<a>": 0, ">b": 1, "a": 2})
    assert special.find("<a>b") == ["<a>"]
    assert special.find(special.hide("<a>b")) == []


def test_too_many_to_hide() -> None:
    names = {chr(0x4E00 + number): number for number in range(len(NONCHARACTERS) + 1)}
    with pytest.raises(ValueError, match="more than 32 different characters"):
        SpecialStrings(names).hide("x")


@pytest.mark.parametrize("make", [byte_level, word_marks])
def test_manners_of_special_tokens(make: object, tmp_path: Path) -> None:
    """White space that a special token swallows is no token's; text at the beginning and behind differ in their ids."""
    special = ["<unk>", "</s>", AddedToken("<mask>", lstrip=True, rstrip=True, normalized=False)]
    path = make(tmp_path, special)
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=str(path)))
    text = "the sum\n <mask>  the<mask>\n</s>sum "
    (array,) = tokenizer.encode_offsets([text])
    assert array[:, 0].tolist() == tokenizer.encode(text)
    names = {"<mask>", "</s>"}
    found = [text[begin:end] for token, begin, end in array.tolist() if tokenizer.decode([token]) in names]
    assert found == ["<mask>", "<mask>", "</s>"]
    covered = {place for _, begin, end in array.tolist() for place in range(begin, end)}
    assert "".join(character for place, character in enumerate(text) if place in covered) == (
        "the sum<mask>the<mask></s>sum "
    )
