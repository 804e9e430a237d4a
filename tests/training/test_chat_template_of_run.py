"""The chat template of the data goes into the checkpoint, and from there into the export."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import ARCHITECTURE, COURSE, finetune, preprocess, words
from transformers import AutoTokenizer

from megatron.checkpoint import open_checkpoint
from megatron.config import DataConfig
from megatron.hf.tokenizer import export_tokenizer
from megatron.tokenizer.description import description_text
from megatron.tokenizer.sentencepiece import SentencePieceTokenizer
from megatron.training.stored_tokenizers import settle_tokenizer

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
CHAT = [{"role": "user", "content": "the sum"}, {"role": "assistant", "content": "is 3"}]


def write_chats(folder: Path, model: Path) -> None:
    (folder / "chats.jsonl").write_text((json.dumps({"messages": CHAT}) + "\n") * 20)
    (folder / "template.jinja").write_text(TEMPLATE)
    preprocess(
        words(
            f"--input {folder / 'chats.jsonl'} --output_prefix {folder / 'chats'} --workers 1",
            f"--tokenizer_type SentencePieceTokenizer --vocab_file {model} --messages_key messages",
            f"--vocab_extra_ids_list <|im_start|>,<|im_end|> --chat_template {folder / 'template.jinja'}",
        )
    )


def test_from_data_to_export(exact_model: Path, tmp_path: Path) -> None:
    write_chats(tmp_path, exact_model)
    flags = f"{ARCHITECTURE} {COURSE} --vocab_file {exact_model} --data_path {tmp_path / 'chats'} --split 100,0,0"
    code, output = finetune(words(flags, f"--train_iters 1 --save {tmp_path / 'run'}"))
    assert code == 0, output
    assert "chat template" not in output
    folder = open_checkpoint(tmp_path / "run").tokenizer_folder
    assert folder
    export_tokenizer(folder, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.chat_template == TEMPLATE
    assert theirs.apply_chat_template(CHAT, tokenize=False) == "[user]the sum</s>[assistant]is 3</s>"


@pytest.mark.parametrize(
    ("stored", "options", "template", "others"),
    [
        ({}, {}, None, []),
        ({"a": TEMPLATE}, {"data_path": ("a",)}, TEMPLATE, []),
        ({"a": TEMPLATE, "b": None}, {"data_path": ("0.5", "a", "0.5", "b")}, TEMPLATE, ["b"]),
        ({"a": None, "b": TEMPLATE}, {"train_data_path": ("a",), "valid_data_path": ("b",)}, None, ["b"]),
        ({"a": TEMPLATE}, {"data_path": ("a",), "data_type": "gpt"}, None, []),
    ],
    ids=["unknown", "one", "two", "own and another", "plain text"],
)
def test_whose_template(
    stored: dict[str, str | None],
    options: dict[str, Any],
    template: str | None,
    others: list[str],
    exact_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, held in stored.items():
        tokenizer = SentencePieceTokenizer.from_file(exact_model)
        tokenizer.chat_template = held
        Path(f"{name}-tokenizer.json").write_text(description_text(tokenizer))
    tokenizer = SentencePieceTokenizer.from_file(exact_model)
    notes = settle_tokenizer(DataConfig(**{"data_type": "instruction", **options}), None, tokenizer)
    assert tokenizer.chat_template == template
    assert notes == [
        f"warning: the chat template is that of the data a; the data {other} has another one" for other in others
    ]
