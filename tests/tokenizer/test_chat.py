"""The chat template renders what training saw."""

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron.data.rows import RowEncoder, RowFormat
from megatron.tokenizer.chat import CHAT_ROLES, CHAT_TEMPLATE, render_messages
from megatron.tokenizer.sentencepiece import SentencePieceTokenizer

KEYS = {"system": "system_prompt", "user": "question", "assistant": "response"}


def template() -> jinja2.Template:
    """Compiled as `transformers` does it."""
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(CHAT_TEMPLATE)


def render(messages: list[dict[str, str]], **options: Any) -> str:
    return template().render(messages=messages, **options)


@pytest.mark.parametrize(
    "text", ["", " ", "\n", "  a\n\n", "{{ 7 * 7 }} {% if %}", "'quotes\" \\n", "<|im_end|>", "é日😀"]
)
def test_template_equals_render_messages(text: str) -> None:
    messages = [{"role": role, "content": text} for role in CHAT_ROLES]
    assert render(messages) == render_messages([(role, text) for role in CHAT_ROLES.values()])


def test_generation_prompt_opens_an_answer() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    expected = "<|im_start|>question\nHi<|im_end|>\n<|im_start|>answer\n"
    assert render(messages, add_generation_prompt=True) == expected


def test_unknown_role_is_refused() -> None:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    with pytest.raises(jinja2.TemplateError, match="unknown role narrator; known: system, user, assistant, tool"):
        render([{"role": "narrator", "content": ""}], raise_exception=raise_exception)


def test_rendered_rows_equal_training_rows(shared_data: Path) -> None:
    tokenizer = SentencePieceTokenizer.from_file(
        shared_data / "tokenizers" / "mistral-v1.model", extra_tokens=["<|im_start|>", "<|im_end|>"]
    )
    encoder = RowEncoder(
        tokenizer, RowFormat(question_key="question", answer_key="response", system_key="system_prompt")
    )
    golden = (shared_data / "reference" / "golden" / "edge.jsonl").read_bytes().splitlines()
    real = (shared_data / "data" / "cot_valid.jsonl").read_bytes().splitlines()
    compiled = template()
    for line in [*golden, *real[:100]]:
        row = json.loads(line)
        rendered = compiled.render(messages=[{"role": role, "content": row[key]} for role, key in KEYS.items()])
        training = [i for ids in encoder._encode_messages(encoder.messages(row)) for i in ids.tolist()]
        assert tokenizer.encode(rendered) == training
