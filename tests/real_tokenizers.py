"""Real tokenizers of three kinds, with the markers of messages."""

from pathlib import Path

from megatron.config import TokenizerConfig
from megatron.tokenizer import Tokenizer, build_tokenizer

MARKERS = ("<|im_start|>", "<|im_end|>")
REAL = {
    "falcon": ("FalconTokenizer", {"vocab_file": "falcon"}),
    "gpt2": ("GPT2BPETokenizer", {"vocab_file": "gpt2/encoder.json", "merge_file": "gpt2/vocab.bpe"}),
    "mistral": ("SentencePieceTokenizer", {"vocab_file": "mistral-v1.model"}),
}
"""Name -> (`--tokenizer_type`, flags with files among the shared tokenizers)."""


def real_tokenizer(name: str, shared_data: Path, *more: str) -> Tokenizer:
    """The tokenizer `name` of `REAL`, with `more` special tokens."""
    kind, files = REAL[name]
    paths = {flag: str(shared_data / "tokenizers" / file) for flag, file in files.items()}
    added = ",".join([*MARKERS, *more])
    return build_tokenizer(TokenizerConfig(tokenizer_type=kind, vocab_extra_ids_list=added, **paths))
