"""The exported tokenizer gives the ids that training saw."""

import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoTokenizer

from megatron.hf.tokenizer import export_tokenizer, stop_ids
from megatron.tokenizer.chat import Role, render_messages
from megatron.tokenizer.sentencepiece import SentencePieceTokenizer

MARKERS = ["<|im_start|>", "<|im_end|>"]
MESSAGES = [(Role.SYSTEM, "system_prompt"), (Role.PROMPTER, "question"), (Role.ASSISTANT, "response")]
CHAT_NAMES = {Role.SYSTEM: "system", Role.PROMPTER: "user", Role.ASSISTANT: "assistant"}


@pytest.fixture(scope="module", params=[True, False], ids=["new tokens", "no new tokens"])
def pair(request: pytest.FixtureRequest, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Our tokenizer and its export, opened by `transformers`."""
    source, target = tmp_path_factory.mktemp("ours"), tmp_path_factory.mktemp("theirs")
    model = shared_data / "tokenizers" / "mistral-v1.model"
    ours = SentencePieceTokenizer.from_file(model, extra_tokens=MARKERS, new_tokens=request.param)
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
        ({"model_type": "bpe", "remove_extra_whitespaces": True}, "it removes extra spaces"),
        ({"model_type": "bpe", "user_defined_symbols": ["<x>"]}, "it has user-defined pieces"),
    ],
)
def test_what_has_no_exact_equal_is_refused(tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"the sum of {i} and {2 * i}" for i in range(50)]),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
        **{"normalization_rule_name": "identity", "remove_extra_whitespaces": False, **options},
    )
    (tmp_path / "m.model").write_bytes(model.getvalue())
    SentencePieceTokenizer.from_file(tmp_path / "m.model", extra_tokens=MARKERS).save(tmp_path)
    with pytest.raises(ValueError, match=reason):
        export_tokenizer(tmp_path, tmp_path)
