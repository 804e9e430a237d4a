"""The tokenizers by which data and checkpoint were made, beside that of the run."""

from collections.abc import Mapping
from typing import Any

from megatron.checkpoint import Checkpoint
from megatron.config import DataConfig
from megatron.data.indexed import tokenizer_file
from megatron.tokenizer import Tokenizer, difference, read_description
from megatron.tokenizer.description import SPECIAL_TOKENS_FILE

Described = Mapping[str, Mapping[str, Any]]
"""What has a tokenizer, in words -> the tokenizer's description."""


def settle_tokenizer(data: DataConfig, checkpoint: Checkpoint | None, tokenizer: Tokenizer) -> list[str]:
    """Let `tokenizer` have the chat template that instruction data was made with, else the checkpoint's, so that an
    export has what training saw; returns lines that say in what the stored tokenizers differ from it.
    """
    of_data, of_checkpoint = _data_tokenizers(data), _checkpoint_tokenizer(checkpoint)
    conversations = of_data if data.data_type == "instruction" else {}
    found = {what: difference(stored, tokenizer) for what, stored in {**of_data, **of_checkpoint}.items()}
    return [
        *(f"warning: the tokenizer is not that of {what}: {change}" for what, change in found.items() if change),
        *_take_chat_template(tokenizer, {**conversations, **of_checkpoint}),
    ]


def _data_tokenizers(data: DataConfig) -> Described:
    """Those of the data, as far as they are known; training data first."""
    files = {f"the data {prefix}": tokenizer_file(prefix) for prefix in data.prefixes()}
    return {what: read_description(file.parent, file.name) for what, file in files.items() if file.is_file()}


def _checkpoint_tokenizer(checkpoint: Checkpoint | None) -> Described:
    """That of the checkpoint, if it is known."""
    folder = checkpoint.tokenizer_folder if checkpoint else None
    if checkpoint is None or folder is None or not (folder / SPECIAL_TOKENS_FILE).is_file():
        return {}
    return {f"the checkpoint {checkpoint.folder}": read_description(folder)}


def _take_chat_template(tokenizer: Tokenizer, described: Described) -> list[str]:
    """Let `tokenizer` have the chat template of the first; returns lines that say which of the others have another."""
    known = {what: stored["chat_template"] for what, stored in described.items() if "chat_template" in stored}
    if not known:
        return []
    first, tokenizer.chat_template = next(iter(known.items()))
    others = [what for what, template in known.items() if template != tokenizer.chat_template]
    return [f"warning: the chat template is that of {first}; {what} has another one" for what in others]
