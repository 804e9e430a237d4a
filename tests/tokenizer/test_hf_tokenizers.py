"""Tokenizers of the `tokenizers` library: its own ids, our rule for special strings, saving and loading."""

import importlib
import itertools
import json
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import byte_level, word_marks
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from megatron.config import TokenizerConfig, UsageError
from megatron.tokenizer import Tokenizer, build_tokenizer, difference, load_tokenizer, read_description

MARKERS = ["<|im_start|>", "<|im_end|>"]
KINDS = ("FalconTokenizer", "HFTokenizer", "GPT2BPETokenizer")
EDGES = [
    *(
        "",
        " ",
        "  \n\t \r\n  ",
        "😀👩‍👩‍👧",
        "\0",
        "a\0b",
        "e\u0301 é",
        "日本語",
        "\u2581",
        "\ufeff",
        "1234567 89",
        "it's  we'll",
    ),
    *("<|im_start|>", "<|im_end|>\n", "<|endoftext|>", "<|endoftext|><|endoftext|>", " <|im_start|> x <|im_end|> "),
    *("<|im_<|im_start|>start|>", "<|im_end<|im_end|>|>", "<<|endoftext|>>", ">>TITLE<<", "<|IM_START|>", "x" * 500),
]


def options(kind: str, shared_data: Path, **more: Any) -> TokenizerConfig:
    """Of a real tokenizer: Falcon's by its folder and by its file, GPT-2's by its two files."""
    folder = shared_data / "tokenizers"
    files = {
        "FalconTokenizer": {"vocab_file": folder / "falcon"},
        "HFTokenizer": {"vocab_file": folder / "falcon" / "tokenizer.json"},
        "GPT2BPETokenizer": {"vocab_file": folder / "gpt2/encoder.json", "merge_file": folder / "gpt2/vocab.bpe"},
    }
    return TokenizerConfig(tokenizer_type=kind, **{key: str(path) for key, path in files[kind].items()}, **more)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, shared_data: Path) -> Tokenizer:
    return build_tokenizer(options(request.param, shared_data, vocab_extra_ids_list=",".join(MARKERS)))


@pytest.fixture(scope="module")
def gpt2(shared_data: Path) -> Tokenizer:
    return build_tokenizer(options("GPT2BPETokenizer", shared_data))


@pytest.fixture(scope="module")
def falcon(shared_data: Path) -> Tokenizer:
    return build_tokenizer(options("FalconTokenizer", shared_data))


def rows(shared_data: Path, count: int = 500) -> list[str]:
    with (shared_data / "data" / "cot_train.jsonl").open(encoding="utf-8") as file:
        real = [json.loads(line) for line in itertools.islice(file, count)]
    return [f"{row['system_prompt']}<|im_start|>{row['question']}<|im_end|>\n{row['response']}" for row in real]


def library(tokenizer: Tokenizer, shared_data: Path) -> FastTokenizer:
    """The library's own tokenizer with the same added tokens; GPT-2's is made by `transformers`."""
    folder = shared_data / "tokenizers"
    if tokenizer.tokenizer_type == "GPT2BPETokenizer":
        from transformers import GPT2Tokenizer

        merges = (folder / "gpt2" / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
        vocabulary = json.loads((folder / "gpt2" / "encoder.json").read_text(encoding="utf-8"))
        fast = GPT2Tokenizer(vocab=vocabulary, merges=[tuple(line.split()) for line in merges])._tokenizer
    else:
        fast = FastTokenizer.from_file(str(folder / "falcon" / "tokenizer.json"))
    fast.add_special_tokens(MARKERS)
    return fast


def test_ids_are_the_librarys_own(tokenizer: Tokenizer, shared_data: Path) -> None:
    fast = library(tokenizer, shared_data)
    texts = [*rows(shared_data), *EDGES]
    expected = [fast.encode(text, add_special_tokens=False).ids for text in texts]
    assert tokenizer.encode_batch(texts) == expected
    assert [tokenizer.encode(text) for text in texts] == expected
    arrays = tokenizer.encode_arrays(texts)
    assert all(ids.dtype == np.int32 for ids in arrays)
    assert [ids.tolist() for ids in arrays] == expected
    assert tokenizer.encode_batch([]) == []
    assert tokenizer.vocab_size == fast.get_vocab_size()


def test_bytes_come_back(tokenizer: Tokenizer, shared_data: Path) -> None:
    for text in [*rows(shared_data), *EDGES]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer.encode_plain(text)) == text


@settings(deadline=None, max_examples=60)
@given(st.lists(st.one_of(st.sampled_from([*MARKERS, *EDGES]), st.text(max_size=4)), max_size=8).map("".join))
def test_any_text_has_the_librarys_ids(tokenizer: Tokenizer, shared_data: Path, text: str) -> None:
    """And comes back from GPT-2's; Falcon's vocabulary lacks some bytes, such as \\x1e."""
    ids = tokenizer.encode(text)
    assert ids == library_once(tokenizer, shared_data).encode(text, add_special_tokens=False).ids
    if tokenizer.tokenizer_type == "GPT2BPETokenizer":
        assert tokenizer.decode(ids) == text


LIBRARIES: dict[str, FastTokenizer] = {}


def library_once(tokenizer: Tokenizer, shared_data: Path) -> FastTokenizer:
    kind = tokenizer.tokenizer_type
    if kind not in LIBRARIES:
        LIBRARIES[kind] = library(tokenizer, shared_data)
    return LIBRARIES[kind]


def test_special_strings_as_ordinary_text(tokenizer: Tokenizer, shared_data: Path) -> None:
    fast = library(tokenizer, shared_data)
    fast.encode_special_tokens = True
    for text in [*rows(shared_data, 50), *EDGES]:
        expected = fast.encode(text, add_special_tokens=False).ids
        assert not set(expected) & set(tokenizer.special_tokens.values()) or "<" not in text
        assert tokenizer.encode_plain(text) == expected
        assert tokenizer.encode_arrays([text], special=False)[0].tolist() == expected
    assert tokenizer.special_strings_in("a<|im_end|><|x|><|endoftext|>") == ["<|im_end|>", "<|endoftext|>"]


def test_gpt2_equals_tiktoken(
    gpt2: Tokenizer, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiktoken = tiktoken_module(tmp_path, monkeypatch)
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    bytes_of = {character: byte for byte, character in bytes_to_unicode().items()}
    vocabulary = json.loads((shared_data / "tokenizers/gpt2/encoder.json").read_text(encoding="utf-8"))
    end = vocabulary.pop("<|endoftext|>")
    words = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    theirs = tiktoken.Encoding(
        "gpt2",
        pat_str=words,
        mergeable_ranks={bytes(bytes_of[c] for c in piece): token_id for piece, token_id in vocabulary.items()},
        special_tokens={"<|endoftext|>": end},
    )
    for text in [*rows(shared_data), *EDGES]:
        assert gpt2.encode(text) == theirs.encode(text, allowed_special="all")


def tiktoken_module(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`tiktoken`, from the registry if it is not installed."""
    try:
        return importlib.import_module("tiktoken")
    except ImportError:
        command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(folder), "--no-deps"]
        try:
            subprocess.run([*command, "tiktoken", "regex"], check=True, capture_output=True, timeout=100)
        except (subprocess.SubprocessError, OSError):
            pytest.skip("tiktoken is not installed, and not to be had from the registry")
    monkeypatch.syspath_prepend(folder)
    return importlib.import_module("tiktoken")


def test_vocabularies(falcon: Tokenizer, gpt2: Tokenizer) -> None:
    assert falcon.vocab_size == 65024
    assert list(falcon.special_tokens)[:2] == [">>TITLE<<", ">>ABSTRACT<<"]
    assert (falcon.bos_id, falcon.eos_id, falcon.pad_id, falcon.eod_id) == (None, 11, None, 11)
    assert (gpt2.vocab_size, gpt2.special_tokens) == (50257, {"<|endoftext|>": 50256})
    assert (gpt2.bos_id, gpt2.eos_id, gpt2.pad_id, gpt2.eod_id) == (50256, 50256, None, 50256)


def test_added_tokens_follow_the_vocabulary(shared_data: Path) -> None:
    """Extra ids, then the list; a name that is there keeps its id."""
    more = {"vocab_extra_ids": 2, "vocab_extra_ids_list": "<a>,the,<|endoftext|>,<a>,<extra_id_1>,[b]"}
    tokenizer = build_tokenizer(options("GPT2BPETokenizer", shared_data, **more))
    the = json.loads((shared_data / "tokenizers/gpt2/encoder.json").read_text(encoding="utf-8"))["the"]
    added = {"<extra_id_0>": 50257, "<extra_id_1>": 50258, "<a>": 50259, "the": the, "[b]": 50260}
    assert list(tokenizer.special_tokens.items()) == [("<|endoftext|>", 50256), *added.items()]
    assert tokenizer.vocab_size == 50261
    fewer = build_tokenizer(options("GPT2BPETokenizer", shared_data, new_tokens=False, **more))
    names = {"<|endoftext|>": 50256, "<a>": 50257, "the": the, "<extra_id_1>": 50258, "[b]": 50259}
    assert list(fewer.special_tokens.items()) == list(names.items())


def test_a_tie_goes_to_the_one_registered_first(tmp_path: Path) -> None:
    file = str(byte_level(tmp_path))
    for names, found in (("[a,[ab]", ["[a"]), ("[ab],[a", ["[ab]"])):
        tokenizer = build_tokenizer(
            TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=file, vocab_extra_ids_list=names)
        )
        assert tokenizer.special_strings_in("[ab]") == found
        assert tokenizer.encode("x[ab]y")[1] == tokenizer.special_tokens[found[0]]


@pytest.mark.parametrize("make", [byte_level, word_marks])
def test_manners_of_special_tokens(make: Any, tmp_path: Path) -> None:
    """White space that a special token swallows, one that is no part of a word, and beginnings of texts."""
    special = [
        *("<unk>", "<s>", "</s>"),
        AddedToken("<end>", rstrip=True, normalized=False),
        AddedToken("<mask>", lstrip=True, normalized=False),
        AddedToken("sum", single_word=True, normalized=False),
    ]
    path = make(tmp_path, special)
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=str(path)))
    fast = FastTokenizer.from_file(str(path))
    draw = random.Random(1)
    parts = [*tokenizer.special_tokens, " ", "  ", "\n", "\u3000", "\x1c", "the", " of", "_", "x", "é"]
    texts = ["".join(draw.choices(parts, k=draw.randrange(10))) for _ in range(1000)]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids == fast.encode(text, add_special_tokens=False).ids, text
        assert tokenizer.encode(text) == ids


def test_nothing_is_added_cut_off_or_left_to_chance(tmp_path: Path) -> None:
    path = byte_level(tmp_path, ["<s>", "<|endoftext|>"])
    content = json.loads(path.read_text(encoding="utf-8"))
    plain = build_tokenizer(TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=str(path)))
    fast = FastTokenizer.from_file(str(path))
    fast.enable_truncation(3)
    fast.enable_padding(length=8)
    content = json.loads(fast.to_str())
    content["model"]["dropout"] = 0.5
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [plain.special_tokens["<s>"]], "tokens": ["<s>"]}},
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=str(path)))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (plain.special_tokens["<s>"], plain.special_tokens["<|endoftext|>"])
    for text in ("the sum of 3 and 4", "", "a<s>b"):
        assert tokenizer.encode(text) == plain.encode(text)
        assert tokenizer.encode_plain(text) == plain.encode_plain(text)


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    loaded, sent = load_tokenizer(tmp_path), pickle.loads(pickle.dumps(tokenizer))
    texts = [*EDGES, "<|im_start|>system\nx<|im_end|>\n"]
    for other in (loaded, sent):
        for name in ("tokenizer_type", "vocab_size", "bos_id", "eos_id", "pad_id", "eod_id", "fingerprint"):
            assert getattr(other, name) == getattr(tokenizer, name)
        assert list(other.special_tokens.items()) == list(tokenizer.special_tokens.items())
        assert other.encode_batch(texts) == tokenizer.encode_batch(texts)
        assert [other.encode_plain(text) for text in texts] == [tokenizer.encode_plain(text) for text in texts]
    assert difference(read_description(tmp_path), loaded) is None


def test_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    byte_level(tmp_path, ["<|endoftext|>"])
    asked = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, set(allow_patterns)))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for config in (
        TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file="someone/model"),
        TokenizerConfig(tokenizer_type="FalconTokenizer"),
    ):
        assert build_tokenizer(config).eos_id is not None
    assert [name for name, _ in asked] == ["someone/model", "tiiuae/falcon-7b"]
    assert asked[0][1] == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **options: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot reach it\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ValueError, match=r"--vocab_file tiiuae/falcon-7b: .* from the hub: cannot reach it$"):
        build_tokenizer(TokenizerConfig(tokenizer_type="FalconTokenizer"))


def test_mistakes_in_options(tmp_path: Path) -> None:
    file = str(byte_level(tmp_path / "good"))
    (tmp_path / "empty").mkdir()
    cases = {
        "--tokenizer_type HFTokenizer needs --vocab_file": {"tokenizer_type": "HFTokenizer"},
        "--tokenizer_type GPT2BPETokenizer needs --vocab_file": {"tokenizer_type": "GPT2BPETokenizer"},
        "GPT2BPETokenizer needs --merge_file": {"tokenizer_type": "GPT2BPETokenizer", "vocab_file": file},
        "--vocab_file /no/such: no such file": {"tokenizer_type": "HFTokenizer", "vocab_file": "/no/such"},
        "/empty: there is no tokenizer.json": {"tokenizer_type": "HFTokenizer", "vocab_file": str(tmp_path / "empty")},
        "--vocab_extra_ids_list": {"tokenizer_type": "HFTokenizer", "vocab_file": file, "vocab_extra_ids_list": "a,,b"},
    }
    for message, fields in cases.items():
        with pytest.raises(UsageError, match=message):
            build_tokenizer(TokenizerConfig(**fields))
