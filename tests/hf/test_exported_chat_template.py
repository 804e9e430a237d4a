"""Conversations through an exported chat template: the ids that training saw, and what was learned of them."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from real_tokenizers import REAL, real_tokenizer
from transformers import AutoTokenizer

from megatron.data.conversations import build_encoder
from megatron.data.rows import RowFormat
from megatron.data.sources import JsonLinesFile
from megatron.hf.tokenizer import export_tokenizer, stop_ids
from megatron.tokenizer import Tokenizer, load_tokenizer
from megatron.tokenizer.chat import Role

TAGGED = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
UNTAGGED = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] | trim }} [/INST]"
    "{% else %}{{ message['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)


def exported(ours: Tokenizer, folder: Path) -> tuple[Path, Any]:
    """The folder of the saved tokenizer, and its export, opened by `transformers`."""
    source, target = folder / "source", folder / "target"
    for path in (source, target):
        path.mkdir()
    ours.save(source)
    export_tokenizer(source, target)
    return source, AutoTokenizer.from_pretrained(target)


def written(tokenizer: Tokenizer, path: Path) -> list[tuple[list[int], list[int]]]:
    """Tokens and roles of each row."""
    encoder = build_encoder(tokenizer, RowFormat(messages_key="messages"))
    (chunk,) = JsonLinesFile(str(path)).chunks(1000, 1 << 30, encoder.keys)
    encoded = encoder.encode(chunk)
    assert not encoded.bad_lines
    (tokens, sizes), (roles, _) = encoded.files
    bounds = pairwise([0, *np.cumsum(sizes).tolist()])
    return [(tokens[start:stop].tolist(), roles[start:stop].tolist()) for start, stop in bounds]


@pytest.mark.parametrize(
    ("name", "template"),
    [*((name, template) for name in REAL for template in (None, TAGGED)), ("mistral", UNTAGGED)],
    ids=lambda value: value if value in REAL else {None: "our own", TAGGED: "tagged", UNTAGGED: "untagged"}[value],
)
def test_same_ids_and_the_same_is_learned(name: str, template: str | None, shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "data" / "chat_multiturn.jsonl"
    ours = real_tokenizer(name, shared_data)
    ours.chat_template = template
    source, theirs = exported(ours, tmp_path)
    rows = written(ours, path)
    chats = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len(chats) == 250
    with_mask = {"return_assistant_tokens_mask": True} if template == TAGGED else {}
    rendered = theirs.apply_chat_template(chats, tokenize=True, return_dict=True, **with_mask)
    assert rendered["input_ids"] == [tokens for tokens, _ in rows]
    if with_mask:
        assert rendered["assistant_masks"] == [[int(role == Role.ASSISTANT) for role in roles] for _, roles in rows]
    end = "<|im_end|>" if template != UNTAGGED else ours.decode([ours.eos_id])
    assert stop_ids(source) == list(dict.fromkeys([ours.special_tokens[end], ours.eos_id]))
    assert load_tokenizer(source).chat_template == template
