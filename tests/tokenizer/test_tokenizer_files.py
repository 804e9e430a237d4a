"""Files that tokenizers of the `tokenizers` library come from: names of special tokens, damage, the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizers import byte_level, word_marks
from tokenizers import Tokenizer as FastTokenizer

from megatron.config import TokenizerConfig
from megatron.data.indexed import IndexedDataset
from megatron.data.rows import RowEncoder, RowFormat
from megatron.tokenizer import Tokenizer, build_tokenizer, load_tokenizer
from megatron.tokenizer.chat import Role, render_message

ROOT = Path(__file__).resolve().parents[2]
MARKERS = "<|im_start|>,<|im_end|>"


def build(path: Path, **more: Any) -> Tokenizer:
    return build_tokenizer(TokenizerConfig(tokenizer_type="HFTokenizer", vocab_file=str(path), **more))


def ids(tokenizer: Tokenizer) -> dict[str, str | None]:
    """Role -> string of its token."""
    names = {token_id: name for name, token_id in tokenizer.special_tokens.items()}
    return {role: names.get(getattr(tokenizer, f"{role}_id")) for role in ("bos", "eos", "pad", "eod")}


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        (["<s>", "</s>", "<pad>"], ("<s>", "</s>", "<pad>", "</s>")),
        (["<|endoftext|>"], (None, "<|endoftext|>", None, "<|endoftext|>")),
        (["<|end_of_text|>", "<|begin_of_text|>"], ("<|begin_of_text|>", "<|end_of_text|>", None, "<|end_of_text|>")),
        (["<x>"], (None, None, None, None)),
    ],
)
def test_well_known_names(tmp_path: Path, special: list[str], expected: tuple[str | None, ...]) -> None:
    assert tuple(ids(build(byte_level(tmp_path, special))).values()) == expected


def test_without_special_tokens_pieces_have_well_known_names(tmp_path: Path) -> None:
    path = byte_level(tmp_path, ["</s>"])
    content = json.loads(path.read_text(encoding="utf-8"))
    token_id = content["added_tokens"].pop()["id"]
    content["model"]["vocab"]["</s>"] = token_id
    path.write_text(json.dumps(content), encoding="utf-8")
    tokenizer = build(path)
    assert tokenizer.special_tokens == {"</s>": token_id}
    assert ids(tokenizer)["eos"] == "</s>"


def test_files_beside_it_name_the_tokens(tmp_path: Path) -> None:
    """tokenizer_config.json over special_tokens_map.json; what they leave out is not there."""
    path = byte_level(tmp_path, ["<s>", "</s>", "<|endoftext|>", "<|im_end|>"])
    mapping = {"eos_token": "</s>", "pad_token": {"content": "<|endoftext|>", "lstrip": False}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(mapping))
    assert ids(build(tmp_path)) == {"bos": None, "eos": "</s>", "pad": "<|endoftext|>", "eod": "<|endoftext|>"}
    config = {"eos_token": "<|im_end|>", "bos_token": None, "model_max_length": 1024}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ids(build(path))["eos"] == "<|im_end|>"
    (tmp_path / "special_tokens_map.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    assert ids(build(path)) == {"bos": "<s>", "eos": "</s>", "pad": None, "eod": "<|endoftext|>"}


def test_a_named_token_that_is_missing_is_added(tmp_path: Path) -> None:
    """As `transformers` does it; without new tokens there is none."""
    path = byte_level(tmp_path, ["</s>"])
    size = FastTokenizer.from_file(str(path)).get_vocab_size()
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>", "pad_token": "[PAD]"}')
    tokenizer = build(path, vocab_extra_ids_list=MARKERS)
    assert tokenizer.special_tokens["[PAD]"] == tokenizer.pad_id == size
    assert tokenizer.special_tokens["<|im_end|>"] == size + 2
    assert build(path, new_tokens=False).pad_id is None


def test_damage(tmp_path: Path) -> None:
    path = byte_level(tmp_path)
    good = path.read_text(encoding="utf-8")
    for content in (b"nothing of the kind", b"{}", b"\xff\xfe", b"[]"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"--vocab_file .*/tokenizer.json is not a tokenizer.json"):
            build(tmp_path)
    moved = json.loads(good)
    moved["added_tokens"][0]["id"] += 7
    path.write_text(json.dumps(moved))
    with pytest.raises(ValueError, match=r"'<\|endoftext\|>' cannot have the id 287"):
        build(tmp_path)
    path.write_text(good)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not a JSON object"):
        build(tmp_path)


def test_ids_with_gaps(tmp_path: Path) -> None:
    path = byte_level(tmp_path, [])
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["vocab"]["</s>"] = 1000
    path.write_text(json.dumps(content))
    assert build(path).vocab_size == 1001
    with pytest.raises(ValueError, match="its ids have gaps, so that '<a>' cannot be added"):
        build(path, vocab_extra_ids_list="<a>")


def test_damaged_folder(tmp_path: Path) -> None:
    build(byte_level(tmp_path / "source"), vocab_extra_ids_list=MARKERS).save(tmp_path)
    path = tmp_path / "special_tokens.json"
    path.write_text(path.read_text().replace('"<|im_end|>": 282', '"<|im_end|>": 17'))
    with pytest.raises(ValueError, match=r"tokenizer.json: special token '<\|im_end\|>' does not have the id 17"):
        load_tokenizer(tmp_path)


def test_gpt2_files(tmp_path: Path) -> None:
    vocabulary, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    config = TokenizerConfig(
        tokenizer_type="GPT2BPETokenizer", vocab_file=str(vocabulary), merge_file=str(merges), vocab_extra_ids=1
    )
    vocabulary.write_text('{"a": 0, "b": 1, "ab": 2}')
    merges.write_text("#version: 0.2\r\na b\r\n")
    tokenizer = build_tokenizer(config)
    assert tokenizer.encode("aab<extra_id_0>") == [0, 2, 3]
    assert tokenizer.eod_id is None
    for content, message in (("a b\nab", "line 2 is not a pair of pieces"), ("a c", "--merge_file .* `c`|c")):
        merges.write_text(content)
        with pytest.raises(ValueError, match=message):
            build_tokenizer(config)
    for content in ("[1]", "{}", '{"a": "b"}', "#version"):
        vocabulary.write_text(content)
        with pytest.raises(ValueError, match=f"--vocab_file {vocabulary} is not a"):
            build_tokenizer(config)


@pytest.mark.parametrize("make", [byte_level, word_marks])
def test_messages_have_the_same_ids_whatever_their_text_may_hold(make: Any, tmp_path: Path) -> None:
    """A body encoded apart from its markers, as text without special strings, is the one within the message."""
    tokenizer = build(make(tmp_path), vocab_extra_ids_list=MARKERS)
    messages = [(role, text) for role in Role for text in ("the sum of 3", "", " question", "_\n")]
    kept, text = (
        RowEncoder(tokenizer, RowFormat(question_key="q", answer_key="a", special_in_text=how))._encode_messages(
            messages
        )
        for how in ("keep", "text")
    )
    assert [row.tolist() for row in kept] == [row.tolist() for row in text]
    assert [row.tolist() for row in kept] == tokenizer.encode_batch([render_message(*message) for message in messages])


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = ROOT / "instruct" / "preprocess_instruct_data.py"
    return subprocess.run(
        [sys.executable, str(script), *arguments, "--workers=2", "--vocab_extra_ids_list", MARKERS],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_preprocessing_from_end_to_end(tmp_path: Path) -> None:
    """Several worker processes, special strings in the text, and nothing on the error channel but the warning."""
    path = byte_level(tmp_path / "tokenizer")
    texts = [(f"the sum of {i} and 1 日本", f"is {i + 1} <|endoftext|>") for i in range(100)]
    rows = "".join(json.dumps({"input": question, "output": answer}) + "\n" for question, answer in texts)
    (tmp_path / "rows.jsonl").write_text(rows)
    files = [f"--input={tmp_path / 'rows.jsonl'}", f"--output_prefix={tmp_path / 'out'}"]
    done = command(*files, "--tokenizer_type=HFTokenizer", f"--vocab_file={path.parent}", "--chunk_size=7")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("warning: 100 rows contain") and len(done.stderr.splitlines()) == 1
    tokenizer = build(path, vocab_extra_ids_list=MARKERS)
    written = IndexedDataset(f"{tmp_path / 'out'}-text")
    expected = [
        tokenizer.encode(render_message(Role.PROMPTER, question) + render_message(Role.ASSISTANT, answer))
        for question, answer in texts
    ]
    assert [written[index].tolist() for index in range(len(written))] == expected


def test_mistakes_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    (tmp_path / "empty").mkdir()
    for flags, code, message in (
        (["--tokenizer_type=GPT2BPETokenizer", f"--vocab_file={tmp_path / 'rows.jsonl'}"], 2, "--merge_file"),
        (["--tokenizer_type=HFTokenizer", f"--vocab_file={tmp_path / 'empty'}"], 2, "--vocab_file"),
        (["--tokenizer_type=HFTokenizer", f"--vocab_file={tmp_path / 'rows.jsonl'}"], 1, "--vocab_file"),
        (["--tokenizer_type=BertWordPieceCase"], 2, "--tokenizer_type BertWordPieceCase belongs to BERT models"),
    ):
        done = command(f"--input={tmp_path / 'rows.jsonl'}", f"--output_prefix={tmp_path / 'out'}", *flags)
        assert (done.returncode, message in done.stderr) == (code, True), done.stderr
        assert len(done.stderr.splitlines()) == 1
