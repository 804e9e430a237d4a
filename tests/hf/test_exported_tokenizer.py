"""The exported tokenizer gives the ids that training saw."""

import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megatron.data.chunks import FileLines
from megatron.data.rows import RowEncoder, RowFormat
from megatron.hf.tokenizer import export_tokenizer, stop_ids
from megatron.tokenizer.chat import Role, render_messages
from megatron.tokenizer.sentencepiece import SentencePieceTokenizer

MARKERS = ["<|im_start|>", "<|im_end|>"]
MESSAGES = [(Role.SYSTEM, "system_prompt"), (Role.PROMPTER, "question"), (Role.ASSISTANT, "response")]
CHAT_NAMES = {Role.SYSTEM: "system", Role.PROMPTER: "user", Role.ASSISTANT: "assistant"}
ROW_FORMAT = RowFormat(question_key="question", answer_key="response", system_key="system_prompt")
AWKWARD = [
    *MARKERS,
    "<s>",
    "</s>",
    "<unk>",
    "<0x0A>",
    " ",
    "  ",
    "\n",
    "\0",
    "\u2581",
    "\u200b",
    "e\u0301",
    "日本",
    "the",
]


MISTRAL, STORIES = "tokenizers/mistral-v1.model", "models/stories260K/tokenizer.model"
"""Models that leave text as it is, and that remove extra spaces."""


@pytest.fixture(scope="module", params=[(MISTRAL, True), (MISTRAL, False), (STORIES, True)], ids=str)
def pair(request: pytest.FixtureRequest, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Our tokenizer and its export, opened by `transformers`."""
    source, target = tmp_path_factory.mktemp("ours"), tmp_path_factory.mktemp("theirs")
    model, new_tokens = request.param
    ours = SentencePieceTokenizer.from_file(shared_data / model, extra_tokens=MARKERS, new_tokens=new_tokens)
    ours.save(source)
    export_tokenizer(source, target)
    assert stop_ids(source) == [ours.special_tokens["<|im_end|>"], ours.eos_id]
    return ours, AutoTokenizer.from_pretrained(target)


def rows(shared_data: Path) -> list[dict[str, str]]:
    """Real rows, and the awkward ones of the golden files."""
    with (shared_data / "data" / "cot_train.jsonl").open(encoding="utf-8") as real:
        awkward = (shared_data / "reference" / "golden" / "edge.jsonl").read_text(encoding="utf-8").split("\n")
        lines = [*itertools.islice(real, 500), *filter(None, awkward)]
    return [json.loads(line) for line in lines]


def test_same_ids_and_the_template_renders_what_training_saw(pair: Any, shared_data: Path) -> None:
    ours, theirs = pair
    assert len(theirs) == ours.vocab_size
    assert (theirs.eos_token, theirs.bos_token) == ("<|im_end|>", "<s>")
    for row in rows(shared_data):
        messages = [(role, row[key]) for role, key in MESSAGES]
        text = render_messages(messages)
        chat = [{"role": CHAT_NAMES[role], "content": content} for role, content in messages]
        assert theirs.apply_chat_template(chat, tokenize=False) == text
        ids = theirs.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
        assert ids == ours.encode(text)


def chat(row: dict[str, str], *keys: str) -> list[dict[str, str]]:
    """The messages of a row as `transformers` takes them."""
    return [{"role": CHAT_NAMES[role], "content": row[key]} for role, key in MESSAGES if key in keys]


def test_the_template_gives_the_ids_that_preprocessing_writes(pair: Any, shared_data: Path, tmp_path: Path) -> None:
    """Message after message there, all at once here."""
    ours, theirs = pair
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows(shared_data))), encoding="utf-8")
    written = RowEncoder(ours, ROW_FORMAT).encode(FileLines(str(path), 1, path.stat().st_size, 0))
    ids = [
        theirs.apply_chat_template(chat(row, *row), tokenize=True, return_dict=True)["input_ids"]
        for row in rows(shared_data)
    ]
    assert not written.bad_lines
    tokens, sizes = written.files[0]
    assert sizes.tolist() == [len(row) for row in ids]
    assert tokens.tolist() == list(itertools.chain.from_iterable(ids))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.one_of(st.sampled_from(AWKWARD), st.text(max_size=4)), max_size=12).map("".join))
def test_any_text_has_the_same_ids(pair: Any, text: str) -> None:
    ours, theirs = pair
    ids = ours.encode(text)
    assert theirs.encode(text, add_special_tokens=False) == ids
    assert theirs(text)["input_ids"] == ids


def test_the_answer_follows_the_generation_prompt(pair: Any, shared_data: Path) -> None:
    """What a trained model generates behind the prompt decodes to the answer, up to where generation ends."""
    _, theirs = pair
    for row in rows(shared_data)[:100]:
        messages = chat(row, "system_prompt", "question")
        prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        whole = theirs.apply_chat_template(chat(row, *row), return_dict=True)["input_ids"]
        assert whole[: len(prompt)] == prompt
        answer = whole[len(prompt) :]
        assert theirs.decode(answer[: answer.index(theirs.eos_token_id)]) == row["response"]


def test_text_goes_there_and_back(pair: Any, shared_data: Path) -> None:
    """Where the model removes extra spaces, what comes back is what our own tokenizer gives back."""
    ours, theirs = pair
    for row in rows(shared_data):
        for text in row.values():
            if "\u2581" not in text and not any(name in text for name in theirs.all_special_tokens):
                expected = text if ours.decode(ours.encode_plain("a  b")) == "a  b" else ours.decode(ours.encode(text))
                assert theirs.decode(theirs.encode(text)) == expected


def test_decodes_alike(pair: Any, shared_data: Path) -> None:
    ours, theirs = pair
    for row in rows(shared_data)[:50]:
        ids = ours.encode_plain(row["response"])
        assert theirs.decode(ids) == ours.decode(ids)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "it is not a byte-pair"),
        ({"model_type": "bpe", "normalization_rule_name": "nmt_nfkc"}, "it normalizes text"),
        ({"model_type": "bpe", "user_defined_symbols": ["<x>"]}, "it has user-defined pieces"),
        ({"model_type": "bpe", "treat_whitespace_as_suffix": True}, "it marks spaces behind words"),
        ({"model_type": "bpe", "control_symbols": ["a"]}, "it has a control piece of one character"),
        ({"model_type": "unigram", "normalization_rule_name": "nmt_nfkc"}, "byte-pair .* it normalizes text"),
    ],
)
def test_what_has_no_exact_equal_is_refused(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        exported(tmp_path, train(tmp_path, **options), MARKERS)


def train(folder: Path, **options: Any) -> Path:
    """A small SentencePiece model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"the sum of {i} and {2 * i}" for i in range(50)]),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
        **{"normalization_rule_name": "identity", "remove_extra_whitespaces": False, **options},
    )
    (folder / "m.model").write_bytes(model.getvalue())
    return folder / "m.model"


def exported(folder: Path, model: Path, special: list[str]) -> tuple[SentencePieceTokenizer, Any]:
    """A tokenizer and its export."""
    ours = SentencePieceTokenizer.from_file(model, extra_tokens=special)
    ours.save(folder)
    export_tokenizer(folder, folder)
    return ours, AutoTokenizer.from_pretrained(folder)


def test_a_model_that_puts_no_space_in_front(tmp_path: Path) -> None:
    ours, theirs = exported(tmp_path, train(tmp_path, model_type="bpe", add_dummy_prefix=False), MARKERS)
    for text in ("the sum", " the sum", "  2 ", "<|im_end|> sum<|im_end|>of"):
        ids = ours.encode(text)
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == ours.decode(ids) == text


def test_special_tokens_that_would_be_cut_otherwise_are_refused(tmp_path: Path) -> None:
    """Training takes the one registered first, where both start; `tokenizers` the longest."""
    model = train(tmp_path, model_type="bpe")
    ours, theirs = exported(tmp_path, model, ["[ab]", "[a"])
    assert theirs.encode("of [ab] [a") == ours.encode("of [ab] [a")
    with pytest.raises(ValueError, match=r"'\[a' is registered before '\[ab\]', which begins with it"):
        exported(tmp_path, model, ["[a", "[ab]"])
