"""Train a small SentencePiece model on the rows' text, and put a small Llama with fresh weights in Hugging Face's form.

The SentencePiece settings are those of Llama's own tokenizer (byte-pair encoding, byte fallback, text left as it is,
one token a digit), so everything after this step treats the folder as it would treat a downloaded Llama.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

ROLES = ("system", "question", "answer")


def texts(path: Path) -> Iterator[str]:
    """Each message of each row the way training sees it: the role's name, a new line, the text."""
    with path.open(encoding="utf-8") as rows:
        for row in map(json.loads, rows):
            messages = (row.get("system_prompt") or "", row["question"], row["response"])
            for role, message in zip(ROLES, messages, strict=True):
                yield role
                yield from message.split("\n")


def train_tokenizer(data: Path, vocab_size: int, folder: Path) -> Path:
    """Write `tokenizer.model` into the folder; a soft limit lets small corpora end with fewer pieces."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=texts(data),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        num_threads=2,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    return folder / "tokenizer.model"


def model_config(vocab_size: int) -> LlamaConfig:
    """A Llama of about 700,000 parameters, with grouped-query attention."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        initializer_range=0.06,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="Training rows (.jsonl).")
    parser.add_argument("--out", type=Path, required=True, help="Folder to write.")
    parser.add_argument("--tokenizer", type=Path, help="A SentencePiece model to use instead of training one.")
    parser.add_argument("--vocab_size", type=int, default=800, help="Pieces of the trained SentencePiece model.")
    parser.add_argument("--seed", type=int, default=1234)
    options = parser.parse_args()

    logging.disable_progress_bar()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.tokenizer:
        model_file = Path(shutil.copyfile(options.tokenizer, options.out / "tokenizer.model"))
    else:
        model_file = train_tokenizer(options.data, options.vocab_size, options.out)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_file)).vocab_size()
    torch.manual_seed(options.seed)
    model = LlamaForCausalLM(model_config(pieces))
    model.save_pretrained(options.out)
    print(f"{model_file}: {pieces} pieces")
    print(f"{options.out}: a Llama of {model.num_parameters():,} parameters, fresh weights")


if __name__ == "__main__":
    main()
