"""Fixtures shared by all tests."""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch.distributed as dist
from worlds import World, WorldPools

from megatron.tokenizer.sentencepiece import SentencePieceTokenizer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data, tokenizers, models and golden files; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("MEGATRON_TEST_DATA", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip("no shared test data: set MEGATRON_TEST_DATA to its folder")
    return folder


@pytest.fixture(autouse=True, scope="module")
def no_process_group_is_left() -> Iterator[None]:
    """A run that fails leaves its group open, since its process would end; that of the tests goes on."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    """`world(size, function, *args)`: run a function on real ranks, and get what each returned."""
    pools = WorldPools()
    yield pools.run
    pools.close()


MARKERS = ["<|im_start|>", "<|im_end|>"]


def train_model(path: Path, **options: Any) -> Path:
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
        **options,
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model that normalizes text and takes extra spaces away."""
    return train_model(tmp_path_factory.mktemp("tokenizer") / "small.model")


@pytest.fixture(scope="session")
def exact_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model that leaves text as it is, so that it can be exported."""
    path = tmp_path_factory.mktemp("tokenizer") / "exact.model"
    return train_model(path, normalization_rule_name="identity", remove_extra_whitespaces=False)


@pytest.fixture(scope="session")
def small_tokenizer(small_model: Path) -> SentencePieceTokenizer:
    """The tokenizer of `small_model` with the message markers."""
    return SentencePieceTokenizer.from_file(small_model, extra_tokens=MARKERS)
