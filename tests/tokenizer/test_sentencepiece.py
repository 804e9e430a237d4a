"""The vocabulary, the cutting of text at special strings, saving and loading."""

import random
from pathlib import Path

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor

from megatron.config import TokenizerConfig, UsageError
from megatron.tokenizer import build_tokenizer, load_tokenizer
from megatron.tokenizer.sentencepiece import SentencePieceTokenizer

MARKERS = ["<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def model(shared_data: Path) -> Path:
    return shared_data / "tokenizers" / "mistral-v1.model"


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer.from_file(model, extra_tokens=MARKERS)


def by_the_rule(tokenizer: SentencePieceTokenizer, processor: SentencePieceProcessor, text: str) -> list[int]:
    """The rule said again, one special string after the other."""
    ids: list[int] = []
    while True:
        places = {name: text.find(name) for name in tokenizer.special_tokens if name in text}
        if not places:
            return ids + processor.encode(text, out_type=int)
        name = min(places, key=lambda name: places[name])
        ids += [*processor.encode(text[: places[name]], out_type=int), tokenizer.special_tokens[name]]
        text = text[places[name] + len(name) :]


def test_vocabulary_order(tokenizer: SentencePieceTokenizer) -> None:
    assert list(tokenizer.special_tokens.items()) == [
        ("<CLS>", 32000),
        ("<SEP>", 32001),
        ("<EOD>", 32002),
        ("<MASK>", 32003),
        ("<PAD>", 32004),
        ("<s>", 1),
        ("</s>", 2),
        ("<|im_start|>", 32005),
        ("<|im_end|>", 32006),
    ]
    assert tokenizer.vocab_size == 32007
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eod_id, tokenizer.pad_id) == (1, 2, 32002, 32004)


def test_no_new_tokens(model: Path) -> None:
    tokenizer = SentencePieceTokenizer.from_file(model, vocab_extra_ids=3, extra_tokens=MARKERS, new_tokens=False)
    assert tokenizer.special_tokens == {"<s>": 1, "</s>": 2, "<|im_start|>": 32000, "<|im_end|>": 32001}
    assert tokenizer.vocab_size == 32002
    assert tokenizer.pad_id == tokenizer.eod_id == tokenizer.eos_id == 2


def test_extra_ids_come_before_the_list_and_known_names_keep_their_id(model: Path) -> None:
    tokenizer = SentencePieceTokenizer.from_file(model, vocab_extra_ids=2, extra_tokens=["<CLS>", "the", "[formula]"])
    names = list(tokenizer.special_tokens)
    assert names[-4:] == ["<extra_id_0>", "<extra_id_1>", "the", "[formula]"]
    assert tokenizer.special_tokens["<CLS>"] == 32000
    assert tokenizer.special_tokens["the"] == SentencePieceProcessor(model_file=str(model)).piece_to_id("the")
    assert tokenizer.vocab_size == 32008


def test_message_starts_with_a_dummy_prefix_and_ends_with_two_tokens(tokenizer: SentencePieceTokenizer) -> None:
    processor = SentencePieceProcessor(model_proto=tokenizer._model)
    ids = tokenizer.encode("<|im_start|>system\n<|im_end|>\n")
    pieces = [processor.id_to_piece(i) if i < 32000 else i for i in ids]
    assert pieces == [32005, "▁system", "<0x0A>", 32006, "▁", "<0x0A>"]


def test_a_tie_goes_to_the_one_registered_first(model: Path) -> None:
    short_first = SentencePieceTokenizer.from_file(model, extra_tokens=["[a", "[ab]"])
    long_first = SentencePieceTokenizer.from_file(model, extra_tokens=["[ab]", "[a"])
    assert short_first.encode("[ab]")[0] == short_first.special_tokens["[a"]
    assert long_first.encode("[ab]") == [long_first.special_tokens["[ab]"]]


def test_random_text_follows_the_rule(model: Path) -> None:
    tokenizer = SentencePieceTokenizer.from_file(model, extra_tokens=[*MARKERS, "<|im", "s>x", ">x<"])
    processor = SentencePieceProcessor(model_file=str(model))
    parts = [*tokenizer.special_tokens, " ", "x", "<", "|", "\n", "word", "é", "<s", "▁"]
    draw = random.Random(1)
    texts = ["".join(draw.choices(parts, k=draw.randrange(12))) for _ in range(300)]
    expected = [by_the_rule(tokenizer, processor, text) for text in texts]
    assert tokenizer.encode_batch(texts) == expected
    assert [tokenizer.encode(text) for text in texts] == expected
    assert [ids.tolist() for ids in tokenizer.encode_arrays(texts, special=False)] == processor.encode(texts)
    assert [tokenizer.encode_plain(text) for text in texts] == processor.encode(texts)
    assert tokenizer.encode_batch([]) == []
    assert all(ids.dtype == np.int32 for ids in tokenizer.encode_arrays(texts))


def test_decode_reverses_encode(tokenizer: SentencePieceTokenizer) -> None:
    for text in (
        "",
        "Hello  world\n",
        "<|im_start|>question\nWhat?<|im_end|>\n<|im_start|>answer\n42",
        "<s>a</s></s>b 日本",
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_save_and_load(tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    for name in ("vocab_size", "special_tokens", "bos_id", "eos_id", "pad_id", "eod_id", "fingerprint"):
        assert getattr(loaded, name) == getattr(tokenizer, name)
    assert list(loaded.special_tokens) == list(tokenizer.special_tokens)
    text = "<|im_start|>a <CLS> b"
    assert loaded.encode(text) == tokenizer.encode(text)


def test_fingerprint_sees_special_tokens(tokenizer: SentencePieceTokenizer, model: Path) -> None:
    assert tokenizer.fingerprint == SentencePieceTokenizer.from_file(model, extra_tokens=MARKERS).fingerprint
    assert tokenizer.fingerprint != SentencePieceTokenizer.from_file(model, extra_tokens=MARKERS[::-1]).fingerprint


def test_load_names_what_is_damaged(tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a SentencePiece model"):
        load_tokenizer(tmp_path)
    for content in ("{", "[]", "{}", '{"tokenizer_type": "SentencePieceTokenizer"}'):
        (tmp_path / "special_tokens.json").write_text(content)
        with pytest.raises(ValueError, match=r"special_tokens\.json"):
            load_tokenizer(tmp_path)
    (tmp_path / "special_tokens.json").write_text('{"tokenizer_type": "Other"}')
    with pytest.raises(ValueError, match="known: SentencePieceTokenizer"):
        load_tokenizer(tmp_path)


def test_build_from_options(model: Path) -> None:
    config = TokenizerConfig(
        tokenizer_type="SentencePieceTokenizer", vocab_file=str(model), vocab_extra_ids_list=",".join(MARKERS)
    )
    assert build_tokenizer(config).vocab_size == 32007


def test_model_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "bad.model"
    path.write_bytes(b"garbage")
    config = TokenizerConfig(tokenizer_type="SentencePieceTokenizer", vocab_file=str(path))
    with pytest.raises(ValueError, match=r"bad\.model is not a SentencePiece model"):
        build_tokenizer(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--tokenizer_type is not given"),
        ({"tokenizer_type": "BertWordPieceCase"}, "BertWordPieceCase belongs to BERT models.* give one of GPT2BPE"),
        ({"tokenizer_type": "SentencePieceTokenizer"}, "needs --vocab_file"),
        ({"tokenizer_type": "SentencePieceTokenizer", "vocab_file": "/no/such"}, "--vocab_file /no/such: no such file"),
    ],
)
def test_mistakes_in_options(options: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_tokenizer(TokenizerConfig(**options))


def test_empty_name_in_the_list(model: Path) -> None:
    config = TokenizerConfig(
        tokenizer_type="SentencePieceTokenizer", vocab_file=str(model), vocab_extra_ids_list="<a>,,<b>"
    )
    with pytest.raises(UsageError, match="--vocab_extra_ids_list"):
        build_tokenizer(config)
