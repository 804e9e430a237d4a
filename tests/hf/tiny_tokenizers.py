"""Small tokenizers of the `tokenizers` library, trained on the spot."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SENTENCES = [f"question {i} answer system the sum of {i} and {i + 3} is {2 * i + 3}" for i in range(200)]
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(folder: Path, special: Sequence[str | AddedToken] = ("<|endoftext|>",)) -> Path:
    """As Qwen's: bytes, composed characters. The special tokens come behind the vocabulary."""
    model = Tokenizer(models.BPE())
    model.normalizer = normalizers.NFC()
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    )
    return _saved(model, special, folder)


def word_marks(folder: Path, special: Sequence[str | AddedToken] = ("<unk>", "<s>", "</s>")) -> Path:
    """As Llama's newer ones: only the beginning of a text gets a space in front, text behind a special token does not.

    Text outside the alphabet becomes unknown.
    """
    model = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    model.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    alphabet = [*"<>|_.,\n"]
    model.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=400, initial_alphabet=alphabet, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
        ),
    )
    return _saved(model, special, folder)


def _saved(model: Tokenizer, special: Sequence[str | AddedToken], folder: Path) -> Path:
    model.add_special_tokens(list(special))
    folder.mkdir(exist_ok=True)
    path = folder / "tokenizer.json"
    model.save(str(path))
    return path
