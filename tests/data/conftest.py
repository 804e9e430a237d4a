"""A small tokenizer of its own, so that most tests need no outside data."""

import io
from pathlib import Path

import pytest
import sentencepiece

from megatron.tokenizer.sentencepiece import SentencePieceTokenizer

MARKERS = ["<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model with byte fallback, trained on a few sentences."""
    model = io.BytesIO()
    sentences = [f"question {i} answer system the sum of {i} and {i + 3} is {2 * i + 3}" for i in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def small_tokenizer(small_model: Path) -> SentencePieceTokenizer:
    """The tokenizer of `small_model` with the message markers."""
    return SentencePieceTokenizer.from_file(small_model, extra_tokens=MARKERS)
