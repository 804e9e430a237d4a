"""The tokenizer and the data."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from megatron.config.errors import UsageError
from megatron.config.option import check_values, option

TOKENIZER_TYPES = (
    *("BertWordPieceLowerCase", "BertWordPieceCase", "GPT2BPETokenizer", "SentencePieceTokenizer", "FalconTokenizer"),
    "HFTokenizer",
)
REFUSED_TOKENIZER_TYPES = ("BertWordPieceLowerCase", "BertWordPieceCase")
SPLIT_PATHS = ("train_data_path", "valid_data_path", "test_data_path")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Tokenizer."""

    tokenizer_type: str | None = option(None, "Kind of tokenizer.", choices=TOKENIZER_TYPES)
    vocab_file: str | None = option(
        None,
        "The tokenizer's file: a SentencePiece model, GPT-2's vocabulary, or a tokenizer.json, for which a folder that "
        "holds it or a name on the Hugging Face hub will do.",
    )
    merge_file: str | None = option(None, "Merges that go with GPT-2's vocabulary.")
    vocab_extra_ids: int = option(0, "Add this many tokens <extra_id_0>, <extra_id_1>, ...", within="[0, inf)")
    vocab_extra_ids_list: str | None = option(None, "Add these tokens, comma separated.")
    new_tokens: bool = option(True, "Add no special tokens but those of --vocab_extra_ids_list.")

    def __post_init__(self) -> None:
        check_values(self)
        if self.tokenizer_type in REFUSED_TOKENIZER_TYPES:
            others = ", ".join(kind for kind in TOKENIZER_TYPES if kind not in REFUSED_TOKENIZER_TYPES)
            raise UsageError(
                f"--tokenizer_type {self.tokenizer_type} belongs to BERT models, which this toolkit does not have; "
                f"give one of {others}"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data."""

    data_type: str = option("gpt", "Kind of data.", choices=("gpt", "instruction"))
    data_path: tuple[str, ...] | None = option(
        None,
        "Prefix of the token files, divided by --split: PREFIX.bin and .idx, or PREFIX-text and -role for instruction "
        "data. Several are blended: WEIGHT PREFIX WEIGHT PREFIX ...",
    )
    split: str = option("969, 30, 1", "Shares of train, valid and test in --data_path, by documents or rows.")
    train_data_path: tuple[str, ...] | None = option(None, "Prefix of the training data, or a blend.")
    valid_data_path: tuple[str, ...] | None = option(
        None, "Prefix of the validation data; of several, with weights, each is reported, and all together."
    )
    test_data_path: tuple[str, ...] | None = option(None, "Prefix of the test data, or several, with weights.")
    seq_length: int | None = option(
        None,
        "Most tokens of a sequence; by default the checkpoint's, else --max_position_embeddings.",
        within="[1, inf)",
    )
    variable_seq_lengths: bool = option(False, "Make rows only as long as their micro batch needs.")
    scalar_loss_mask: float = option(0.0, "Loss weight of tokens that are not the assistant's.", within="[0, inf)")
    packing: str | None = option(
        None,
        "padding_free: samples one after the other, as many as --micro_batch_size x --seq_length tokens hold; "
        "none: a row each, padded. By default padding_free under --variable_seq_lengths, else none.",
        choices=("none", "padding_free"),
    )
    drop_long_samples: bool = option(False, "Leave samples longer than --seq_length out instead of cutting them off.")
    num_workers: int = option(
        2, "0: read batches when they are needed; more: one thread reads ahead.", within="[0, inf)"
    )
    mmap_warmup: bool = option(False, "Read the data files once from end to end at the start.")
    data_impl: str = option(
        "infer", "No effect: files are always memory-mapped.", choices=("lazy", "cached", "mmap", "infer")
    )
    dataloader_type: str | None = option(
        None, "No effect: every epoch has a shuffle of its own.", choices=("single", "cyclic")
    )
    reset_position_ids: bool = option(False, "Restart positions at documents (--data_type gpt).")
    reset_attention_mask: bool = option(False, "Keep attention within documents (--data_type gpt).")
    eod_mask_loss: bool = option(
        False, "No loss on predicting a document's first token from the end of another one (--data_type gpt)."
    )

    def __post_init__(self) -> None:
        check_values(self)
        separate = [f"--{name}" for name in SPLIT_PATHS if getattr(self, name)]
        if self.data_path and separate:
            raise UsageError(
                f"--data_path and {separate[0]} exclude each other: give one prefix and --split, or a prefix each"
            )
        for name in ("data_path", *SPLIT_PATHS):
            self.blend(name)

    def prefixes(self) -> list[str]:
        """All prefixes named, each once, training data first."""
        return list(dict.fromkeys(prefix for name in ("data_path", *SPLIT_PATHS) for prefix in self.blend(name)))

    def blend(self, name: str) -> dict[str, Fraction]:
        """Prefix -> weight, of one of the options that name data; empty where it is not given.

        Raises:
            UsageError: neither one prefix nor weights and prefixes in turns, or a prefix twice.
        """
        words: Sequence[str] = getattr(self, name) or ()
        if len(words) < 2:
            return dict.fromkeys(words, Fraction(1))
        if len(words) % 2:
            raise UsageError(f"--{name} takes one prefix, or weights and prefixes in turns, not {len(words)} values")
        blend: dict[str, Fraction] = {}
        for weight, prefix in zip(words[::2], words[1::2], strict=True):
            if prefix in blend:
                raise UsageError(f"--{name} has {prefix} twice; give it once, with the sum of the weights")
            blend[prefix] = _weight(f"--{name}", weight, prefix)
        return blend


def _weight(flag: str, text: str, prefix: str) -> Fraction:
    """A weight, exactly as it was typed."""
    try:
        weight = Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise UsageError(
            f"{flag}: {text!r}, before {prefix}, is not a number; weights and prefixes alternate"
        ) from None
    if weight <= 0:
        raise UsageError(f"{flag}: weight {text} of {prefix} is not positive; leave out what is not wanted")
    return weight
