"""Chat templates: what a turn is, what they refuse, and what a sandbox keeps from them."""

import json
import pickle
from pathlib import Path

import pytest

from megatron.tokenizer.chat import CHAT_TEMPLATE, Message, RenderedChat, Role, render_chat
from megatron.tokenizer.chat_template import (
    ChatTemplate,
    ChatTemplateError,
    missing_markers,
    named_tokens,
    read_chat_template,
    turn_end,
)
from megatron.tokenizer.sentencepiece import SentencePieceTokenizer

CHAT = [("system", "Be brief."), ("user", "Hi"), ("assistant", " Hello\n"), ("user", ""), ("assistant", "Bye")]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
INST = (  # as Llama 2's and Mistral's: the system prompt is part of the user's turn, texts are trimmed
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content ~ ' ' %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token }}[INST] {{ system if loop.first }}{{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
HEADERS = (  # as Llama 3's and Qwen's
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TAGGED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|end|>{% endgeneration %}\n"
    "{% else %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
)
FORGETTING = (  # as those of models that think: earlier answers lose what is in front of a mark
    "{% for m in messages %}<{{ m.role }}>{{ m.content if loop.last else m.content.split('=')[-1] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def render(source: str, messages: list[Message], learned: list[int]) -> RenderedChat:
    return ChatTemplate(source, TOKENS).render(messages, learned)


def spoken(rendered: RenderedChat, role: Role) -> list[str]:
    return [rendered.text[start:stop] for who, start, stop in rendered.runs if who is role]


@pytest.mark.parametrize(
    ("source", "system", "answers"),
    [
        (CHAT_TEMPLATE, ["<|im_start|>system\nBe brief.<|im_end|>\n"], [" Hello\n<|im_end|>\n", "Bye<|im_end|>\n"]),
        (HEADERS, ["<s><|system|>\nBe brief.<|end|>\n"], [" Hello\n<|end|>\n", "Bye<|end|>\n"]),
        (INST, [""], [" Hello </s>", " Bye </s>"]),
        (TAGGED, ["<|system|>Be brief.<|end|>\n"], [" Hello\n<|end|>", "Bye<|end|>"]),
    ],
    ids=["our own", "headers", "inst", "tagged"],
)
def test_turns(source: str, system: list[str], answers: list[str]) -> None:
    rendered = render(source, CHAT, [2, 4])
    assert (spoken(rendered, Role.SYSTEM), spoken(rendered, Role.ASSISTANT)) == (system, answers)
    assert spoken(render(source, CHAT, [4]), Role.ASSISTANT) == answers[1:]
    assert render(source, CHAT, [4]).text == rendered.text


def test_our_own_form_is_its_template() -> None:
    messages = [*CHAT, ("tool", "<|im_end|>"), ("system", "Again"), ("assistant", "")]
    ours, theirs = render_chat(messages, [2, 7]), render(CHAT_TEMPLATE, messages, [2, 7])
    assert (theirs.text, sorted(theirs.runs)) == (ours.text, sorted(ours.runs))


def test_an_answer_that_a_template_forgets() -> None:
    chat = [("user", "a"), ("assistant", "why=b"), ("user", "c"), ("assistant", "why=d")]
    with pytest.raises(ChatTemplateError, match=r"message 2 cannot be found .* --train_on last"):
        render(FORGETTING, chat, [1, 3])
    rendered = render(FORGETTING, chat, [3])
    assert spoken(rendered, Role.ASSISTANT) == ["why=d</>"]
    assert rendered.text.startswith("<user>a</><assistant>b</>")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('no system role') if messages[0].role == 'system' }}", "fails: no system role"),
        ("{{ messages[9].role }}", "fails: list object has no element 9"),
        ("{{ 1 / 0 }}", "fails: division by zero"),
        ("{{ messages + 1 }}", "fails: "),
        ("{% if false %}{% generation %}{% endgeneration %}{% endif %}", "writes none of this conversation"),
        ("{% generation %}x{% endgeneration %}", "1 {% generation %} blocks for 2 turns"),
    ],
)
def test_a_conversation_that_a_template_cannot_take(source: str, message: str) -> None:
    with pytest.raises(ChatTemplateError) as raised:
        render(source, CHAT, [4])
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ (messages | first).__class__.__base__ }}",
        "{{ messages | map(attribute='__class__.__base__') | list }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'user'}) }}",
        "{% set n = namespace(__html__=1) %}",
        "{% set n = namespace() %}{% set n.__call__ = 1 %}",
        "{% include '/etc/passwd' %}",
        "{% import '/etc/passwd' as x %}",
        "{% extends '/etc/passwd' %}",
        "{{ range(1000000000) | list }}",
        "{{ self._TemplateReference__context.parent }}",
    ],
)
def test_the_sandbox_keeps_a_template_in(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="the chat template fails: "):
        render(source + "{{ n }}", CHAT, [2, 4])


def test_what_a_template_is_given() -> None:
    source = (
        "{% set n = namespace(found=false) %}{% for m in messages %}{% if m.role == 'user' %}{% set n.found = true %}"
        "{% break %}{% endif %}{% endfor %}"
        "{{ n.found }} {{ {'é<': 1} | tojson }} {{ strftime_now('%Y') | length }} {{ tools is none }} {{ bos_token }}"
        "{{ pad_token }} {{ add_generation_prompt }}"
    )
    rendered = ChatTemplate(source, TOKENS).render(CHAT, []).text
    assert rendered == 'True {"é<": 1} 4 True <s> False'


def test_a_template_goes_to_another_process() -> None:
    template = pickle.loads(pickle.dumps(ChatTemplate(HEADERS, TOKENS)))
    assert template.render(CHAT, [2, 4]) == render(HEADERS, CHAT, [2, 4])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.jinja", HEADERS),
        ("tokenizer_config.json", json.dumps({"chat_template": HEADERS})),
        (
            "tokenizer_config.json",
            json.dumps(
                {"chat_template": [{"name": "tools", "template": "x"}, {"name": "default", "template": HEADERS}]}
            ),
        ),
    ],
)
def test_files(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_chat_template(tmp_path / name) == HEADERS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jinja", b"a\n{% for %}", r"t\.jinja, line 2: "),
        ("t.jinja", b"{% generation %}", r"t\.jinja, line 1: .*endgeneration"),
        ("t.jinja", b"\xff", r"t\.jinja has no chat template: .* invalid start byte"),
        ("t.json", b"{}", r"t\.json has no chat template: 'chat_template'"),
        ("t.json", b"[]", r"t\.json has no chat template: "),
        ("t.json", b'{"chat_template": 1}', r"t\.json has no chat template: it is not a string"),
        ("t.json", b'{"chat_template": [{"name": "rag", "template": "x"}]}', r"has no chat template: 'default'"),
        ("t.json", b"[" * 100_000, r"t\.json has no chat template: "),
    ],
)
def test_files_without_a_template(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ChatTemplateError, match=message):
        read_chat_template(tmp_path / name)


def test_the_end_of_a_turn(small_model: Path) -> None:
    tokenizer = SentencePieceTokenizer.from_file(small_model, extra_tokens=["<|im_start|>", "<|im_end|>", "<|end|>"])
    assert (turn_end(tokenizer), named_tokens(tokenizer)["eos_token"]) == ("<|im_end|>", "<|im_end|>")
    for template, end in ((HEADERS, "<|end|>"), (INST, "</s>"), (TAGGED, "<|end|>"), ("{{ 1 / 0 }}", None)):
        tokenizer.chat_template = template
        assert turn_end(tokenizer) == end
        assert bool(missing_markers(tokenizer)) == (end is None)
        assert named_tokens(tokenizer)["eos_token"] == "</s>"
    tokenizer = SentencePieceTokenizer.from_file(small_model)
    assert (turn_end(tokenizer), missing_markers(tokenizer)) == (None, ["<|im_start|>", "<|im_end|>"])
