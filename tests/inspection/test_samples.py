"""Tokens as they are shown."""

from pathlib import Path

import pytest
from small_data import MARKERS, write_documents, write_rows

from megatron.config import TokenizerConfig
from megatron.inspection.inspect import Selection, inspect_run
from megatron.inspection.samples import Token
from megatron.inspection.vocabulary import find_vocabulary
from megatron.tokenizer import Tokenizer, build_tokenizer
from megatron.tokenizer.sentencepiece import SentencePieceTokenizer

TEXTS = ["question: <|im_start|> the sum ", " äöü 😀 of\t3 <script>\n\n", "\x1b[31mred\u202e", ""]


@pytest.mark.parametrize("name", ["small", "mistral-v1.model", "falcon", "gpt2"])
def test_texts_of_tokens_are_the_text(
    name: str, small_tokenizer: SentencePieceTokenizer, request: pytest.FixtureRequest
) -> None:
    tokenizer = small_tokenizer if name == "small" else real_tokenizer(request.getfixturevalue("shared_data"), name)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        texts = find_vocabulary("none", tokenizer).texts(ids)
        assert len(texts) == len(ids)
        # SentencePiece puts a space in front of each piece of text; a decoder removes it at the beginning only.
        assert "".join(texts).replace(" ", "") == tokenizer.decode(ids).replace(" ", "")
        assert all("\ufffd" not in one for one in texts)


def real_tokenizer(shared_data: Path, name: str) -> Tokenizer:
    path = shared_data / "tokenizers" / name
    options = {
        "mistral-v1.model": {"tokenizer_type": "SentencePieceTokenizer", "vocab_file": str(path)},
        "falcon": {"tokenizer_type": "FalconTokenizer", "vocab_file": str(path / "tokenizer.json")},
        "gpt2": {
            "tokenizer_type": "GPT2BPETokenizer",
            "vocab_file": str(path / "encoder.json"),
            "merge_file": str(path / "vocab.bpe"),
        },
    }[name]
    return build_tokenizer(TokenizerConfig(**options, vocab_extra_ids_list=MARKERS))


@pytest.mark.parametrize(
    ("text", "visible"),
    [("  ", "␣␣"), (" a b", " a b"), ("\n\t", "↵⇥"), ("", "·"), ("\u202e\x00x", "<U+202E><U+0000>x"), ("ä😀", "ä😀")],
)
def test_what_cannot_be_seen_is_made_visible(text: str, visible: str) -> None:
    token = Token(position=0, token_id=1, text=text, weight=0, is_special=False, is_known=True)
    assert token.visible == visible


def test_long_rows_are_shown_by_their_ends(tmp_path: Path) -> None:
    prefix = write_rows(tmp_path / "rows", [(range(100, 200), [1] * 50 + [2] * 50)])
    (report,) = inspect_run({"data_path": (prefix,)}, 1, Selection(count=1, most_tokens=5))
    (sample,) = report.samples
    head, gap, tail = sample.parts
    assert [token.token_id for token in head.tokens] == [100, 101, 102]
    assert gap.left_out == 95
    assert [(token.token_id, token.weight) for token in tail.tokens] == [(198, 1), (199, 1)]


def test_samples_of_documents(tmp_path: Path) -> None:
    prefix = write_documents(tmp_path / "text", [[5, 6, 7, 2], [], [8, 2], [9, 9, 9, 2]])
    typed = {"data_path": (prefix,), "seq_length": 4, "eod_mask_loss": True}
    (report,) = inspect_run(typed, 1, Selection(count=9))
    shown = [
        [(part.name, part.fate, [token.token_id for token in part.tokens]) for part in sample.parts]
        for sample in report.samples
    ]
    assert shown == [
        [("document 0", "weight 1", [5, 6, 7, 2]), ("document 2", "weight 0", [8])],
        [
            ("document 2", "weight 1", [8, 2]),
            ("document 3", "weight 0", [9]),
            ("document 3", "weight 1", [9, 9]),
        ],
        [("document 3", "weight 1", [9, 2])],
    ]
