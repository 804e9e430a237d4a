"""The tokenizer and the data."""

from dataclasses import dataclass

from megatron.config.errors import UsageError
from megatron.config.option import check_values, option

TOKENIZER_TYPES = (
    *("BertWordPieceLowerCase", "BertWordPieceCase", "GPT2BPETokenizer", "SentencePieceTokenizer", "FalconTokenizer"),
    "HFTokenizer",
)
REFUSED_TOKENIZER_TYPES = ("BertWordPieceLowerCase", "BertWordPieceCase")


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
    data_path: tuple[str, ...] | None = option(None, "Prefix of the token files, without -text; divided by --split.")
    split: str = option("969, 30, 1", "Shares of train, valid and test in --data_path.")
    train_data_path: tuple[str, ...] | None = option(None, "Prefix of the training data.")
    valid_data_path: tuple[str, ...] | None = option(None, "Prefix of the validation data.")
    test_data_path: tuple[str, ...] | None = option(None, "Prefix of the test data.")
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
    eod_mask_loss: bool = option(False, "No loss on end-of-document tokens (--data_type gpt).")

    def __post_init__(self) -> None:
        check_values(self)
        separate = [name for name in ("train", "valid", "test") if getattr(self, f"{name}_data_path")]
        if self.data_path and separate:
            raise UsageError(
                f"--data_path and --{separate[0]}_data_path exclude each other: "
                "give one prefix and --split, or a prefix each"
            )
