"""What the prefix of some data names: the files of one kind of data, and the parts of it that a split may have."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from megatron.config import DataConfig, UsageError
from megatron.data.document_order import DocumentOrders
from megatron.data.gpt import Documents, GPTOptions, GPTSamples, document_bounds
from megatron.data.indexed import IndexedDataset, data_files
from megatron.data.instruction import InstructionDataset, InstructionSamples, role_prefix, text_prefix
from megatron.data.stream import Samples


class Part(NamedTuple):
    """Some rows or documents as samples, and a line for the user, or ""."""

    samples: Samples
    note: str = ""


class Files(Protocol):
    """The opened files of one prefix.

    Attributes:
        count: of the rows or documents.
        unit: what they are called.
    """

    count: int
    unit: str

    def part(self, start: int, stop: int, split: str) -> Part | None:
        """What rows or documents `start .. stop` are for the split (train, valid, test); None: no sample.

        Raises:
            UsageError: they are not enough.
        """


class InstructionFiles:
    """Files of instruction rows."""

    unit = "rows"

    def __init__(self, flag: str, prefix: str, config: DataConfig, seed: int) -> None:
        halves = (text_prefix(prefix), role_prefix(prefix))
        hint = "the flag takes the prefix that preprocess_instruct_data.py was given as --output_prefix, without -text"
        if all(file.is_file() for file in data_files(prefix)):
            hint = "there is pretraining text, for which leave --data_type instruction out"
        _check_files(flag, prefix, [file for half in halves for file in data_files(half)], hint)
        self._config = config
        self._dataset = InstructionDataset(prefix, warmup=config.mmap_warmup)
        self.count = len(self._dataset)

    def part(self, start: int, stop: int, split: str) -> Part | None:
        """With `--drop_long_samples` without the rows that would be cut off."""
        if start == stop:
            return None
        config, rows = self._config, np.arange(start, stop)
        length = config.seq_length
        assert length
        short = rows[self._dataset.lengths[start:stop] <= length + 1]
        longer = len(rows) - len(short)
        if config.drop_long_samples:
            if not len(short):
                raise UsageError(
                    f"--drop_long_samples leaves no {split} rows of {self._dataset.prefix}: all {len(rows):,} are "
                    f"longer than --seq_length {length}; raise it"
                )
            rows = short
        fate = "left out" if config.drop_long_samples else "cut off there"
        note = f"{longer:,} {split} rows of {self._dataset.prefix} are longer than --seq_length {length} and are {fate}"
        return Part(InstructionSamples(self._dataset, rows, config.scalar_loss_mask), note if longer else "")


class GPTFiles:
    """A token file of pretraining text."""

    unit = "documents"

    def __init__(self, flag: str, prefix: str, config: DataConfig, seed: int) -> None:
        hint = "the flag takes a prefix such as my_text_document, without .bin"
        if all(file.is_file() for file in data_files(text_prefix(prefix))):
            hint = "there is instruction data, for which give --data_type instruction"
        _check_files(flag, prefix, data_files(prefix), hint)
        self._prefix, self._config, self._seed = prefix, config, seed
        self._dataset = IndexedDataset(prefix, warmup=config.mmap_warmup)
        self.count = len(document_bounds(self._dataset)) - 1

    def part(self, start: int, stop: int, split: str) -> Part | None:
        """For training in an order that is kept beside the data, else in that of the file."""
        config, is_train = self._config, split == "train"
        assert config.seq_length
        if start == stop:
            return None
        documents = Documents(self._dataset, start, stop)
        tokens = int(documents.lengths().sum())
        if is_train and tokens <= config.seq_length:
            raise UsageError(
                f"{self._prefix} has too little text to train on: {tokens:,} tokens in {stop - start:,} documents, "
                f"less than one sample of --seq_length {config.seq_length} and the token after it; lower it"
            )
        if tokens < 2:
            return None
        options = GPTOptions(
            seq_length=config.seq_length,
            reset_position_ids=config.reset_position_ids,
            reset_attention_mask=config.reset_attention_mask,
            eod_mask_loss=config.eod_mask_loss,
        )
        orders = DocumentOrders(documents.lengths, self._seed if is_train else None, self._prefix)
        return Part(GPTSamples(self._prefix, documents, orders, options), orders.note)


FILES: dict[str, Callable[[str, str, DataConfig, int], Files]] = {"gpt": GPTFiles, "instruction": InstructionFiles}
"""`--data_type` -> what opens (the flag, the prefix that it names, the options, the seed of the documents' order)."""


def _check_files(flag: str, prefix: str, files: Iterable[Path], hint: str) -> None:
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise UsageError(f"{flag} {prefix}: no such file: {', '.join(missing)}; {hint}")
