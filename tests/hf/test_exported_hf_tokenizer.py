"""Exported tokenizers of the `tokenizers` library, and the chat template of all, give the ids that training saw."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_tokenizers import MARKERS, REAL, real_tokenizer
from tiny_tokenizers import byte_level, word_marks
from tokenizers import AddedToken
from transformers import AutoTokenizer

from megatron.config import TokenizerConfig
from megatron.data.chunks import FileLines
from megatron.data.rows import RowEncoder, RowFormat
from megatron.hf.tokenizer import export_tokenizer, stop_ids, token_ids
from megatron.tokenizer import Tokenizer, build_tokenizer

KEYS = {"system": "system_prompt", "user": "question", "assistant": "response"}
AWKWARD = [
    *MARKERS,
    "<|endoftext|>",
    ">>TITLE<<",
    " ",
    "  ",
    "\n",
    "\0",
    "\u200b",
    "e\u0301",
    "日本",
    "the",
    "'s",
    "12",
]


def exported(tokenizer: Tokenizer, folder: Path, model_type: str | None = None) -> Any:
    """The export, opened by `transformers`, beside a model's config.json if there is a `model_type`."""
    source, target = folder / "source", folder / "target"
    for path in (source, target):
        path.mkdir()
    tokenizer.save(source)
    export_tokenizer(source, target)
    if model_type:
        (target / "config.json").write_text(json.dumps({"model_type": model_type}))
    return AutoTokenizer.from_pretrained(target)


@pytest.fixture(scope="module", params=REAL)
def pair(request: pytest.FixtureRequest, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Our real tokenizer, and its export."""
    ours = real_tokenizer(request.param, shared_data)
    return ours, exported(ours, tmp_path_factory.mktemp("tokenizer"))


def lines(shared_data: Path) -> list[str]:
    """500 real rows, and the awkward ones of the golden files."""
    with (shared_data / "data" / "cot_train.jsonl").open(encoding="utf-8") as real:
        awkward = (shared_data / "reference" / "golden" / "edge.jsonl").read_text(encoding="utf-8").split("\n")
        return [*(line.rstrip("\n") for line in itertools.islice(real, 500)), *filter(None, awkward)]


def test_the_template_gives_the_ids_that_preprocessing_writes(pair: Any, shared_data: Path, tmp_path: Path) -> None:
    ours, theirs = pair
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines(shared_data)), encoding="utf-8")
    row_format = RowFormat(question_key="question", answer_key="response", system_key="system_prompt")
    written = RowEncoder(ours, row_format).encode(FileLines(str(path), 1, path.stat().st_size, 0))
    rows = [json.loads(line) for line in lines(shared_data)]
    ids = [
        theirs.apply_chat_template(
            [{"role": role, "content": row[key]} for role, key in KEYS.items()], tokenize=True, return_dict=True
        )["input_ids"]
        for row in rows
    ]
    assert not written.bad_lines
    tokens, sizes = written.files[0]
    assert sizes.tolist() == [len(row) for row in ids]
    assert tokens.tolist() == list(itertools.chain.from_iterable(ids))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.one_of(st.sampled_from(AWKWARD), st.text(max_size=4)), max_size=10).map("".join))
def test_any_text_has_the_same_ids(pair: Any, text: str) -> None:
    ours, theirs = pair
    ids = ours.encode(text)
    assert theirs.encode(text, add_special_tokens=False) == ids
    if ours.tokenizer_type != "SentencePieceTokenizer":  # its spaces behind special tokens stay there
        assert theirs.decode(ids) == ours.decode(ids)


def test_names_of_special_tokens(pair: Any, tmp_path: Path) -> None:
    ours, theirs = pair
    assert len(theirs) == ours.vocab_size
    assert theirs.eos_token == "<|im_end|>"
    assert (theirs.bos_token_id, theirs.pad_token_id) == (ours.bos_id, ours.pad_id)
    ours.save(tmp_path)
    assert stop_ids(tmp_path) == [ours.special_tokens["<|im_end|>"], ours.eos_id]
    assert token_ids(tmp_path) == {
        "bos_token_id": ours.bos_id,
        "eos_token_id": ours.eos_id,
        "pad_token_id": ours.pad_id,
    }


def test_without_markers_there_is_no_template(tmp_path: Path) -> None:
    ours = build(byte_level(tmp_path / "given"))
    theirs = exported(ours, tmp_path)
    assert (theirs.eos_token, theirs.chat_template) == ("<|endoftext|>", None)


def build(path: Path, *names: str) -> Tokenizer:
    return build_tokenizer(
        TokenizerConfig(
            tokenizer_type="HFTokenizer", vocab_file=str(path), vocab_extra_ids_list=",".join(names) or None
        )
    )


@pytest.mark.parametrize("make", [byte_level, word_marks])
def test_manners_of_special_tokens_go_along(make: Any, tmp_path: Path) -> None:
    special = [
        *("<unk>", "<s>", "</s>"),
        AddedToken("<mask>", lstrip=True, normalized=True),
        AddedToken("<|im_end|>", rstrip=True, normalized=False),
        AddedToken("sum", single_word=True, normalized=False),
    ]
    ours = build(make(tmp_path / "given", special), *MARKERS)
    theirs = exported(ours, tmp_path)
    parts = ["<mask>", "<|im_start|>", "<|im_end|>", "sum", "\u3000 ", "\n", "the", "_x"]
    for text in map("".join, itertools.product(parts, repeat=4)):
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids, text
        assert theirs.decode(ids) == ours.decode(ids), text


@pytest.mark.parametrize("model_type", ["llama", "mistral", "falcon", "gpt2", "qwen2", "qwen3"])
def test_beside_a_model_of_a_family(model_type: str, tmp_path: Path) -> None:
    """`transformers` puts a class of its own in the place of ours for some families: for Qwen 2, which is as Qwen's."""
    ours = build(byte_level(tmp_path / "given"), *MARKERS)
    theirs = exported(ours, tmp_path, model_type)
    for text in ("<|im_start|>question\nthe sum of 12  é e\u0301 it's<|im_end|>\n\n x", "<|endoftext|> ", "\n \n"):
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)


def test_nothing_is_put_around_a_text(tmp_path: Path) -> None:
    """A BOS that the tokenizer puts in front for others is not in training rows, so it is not in the export either."""
    path = byte_level(tmp_path / "given", ["<s>", "</s>"])
    content = json.loads(path.read_text(encoding="utf-8"))
    bos = content["added_tokens"][0]["id"]
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [bos], "tokens": ["<s>"]}},
    }
    path.write_text(json.dumps(content), encoding="utf-8")
    ours = build(path, *MARKERS)
    theirs = exported(ours, tmp_path)
    ids = ours.encode("<|im_start|>question\nthe sum<|im_end|>\n")
    chat = [{"role": "user", "content": "the sum"}]
    assert theirs.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"] == ids
    assert theirs.encode("the sum") == ours.encode("the sum")


def test_what_has_no_exact_equal_is_refused(tmp_path: Path) -> None:
    path = byte_level(tmp_path / "given", ["<|endoftext|>"])
    with pytest.raises(ValueError, match=r"'\[a' is registered before '\[ab\]', which begins with it"):
        exported(build(path, "[a", "[ab]"), tmp_path)
    content = json.loads(path.read_text(encoding="utf-8"))
    content["added_tokens"].append({**content["added_tokens"][0], "content": "  [", "id": 281, "special": False})
    path.write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "again").mkdir()
    with pytest.raises(ValueError, match=r"the ordinary token '  \[' runs into '\[a\]'"):
        exported(build(path, "[a]"), tmp_path / "again")
